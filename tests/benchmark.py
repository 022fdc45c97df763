"""Run the benchmark suite and write reports/benchmarks/: numbers as JSON, and one page with plots.

    python tests/benchmark.py            # all of it, some twenty minutes on two quiet cores
    python tests/benchmark.py --only recording
    python tests/benchmark.py --against REVISION   # processor time over that of an earlier version
    python tests/benchmark.py --readme   # put the table of the last run into README.md

Every speed is a ratio of two things timed in turn in this run; the machine is named beside it.
"""

from __future__ import annotations

import sys

from benchmarks.suite import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
