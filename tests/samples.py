"""Make the sample reports again: `gradflow demo`, and the three of its files that are shown.

    python tests/samples.py        # minutes; writes reports/samples/adding/

`python tests/validation.py` makes the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "reports/samples/adding"
COMMAND = "gradflow demo"
PAGES = {"rnn.html": "rnn/report/report.html", "lstm.html": "lstm/report/report.html"}


def headed(page: str, source: str) -> str:
    """A page that says in its second line which command made it."""
    kind, rest = page.split("\n", 1)
    return f"{kind}\n<!-- {COMMAND}: gradflow-demo/{source} -->\n{rest}"


def main() -> None:
    """Run the demo in a folder of its own and keep what is shown."""
    root = str(FOLDER.parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", *COMMAND.split()]
        subprocess.run(command, cwd=work, env=environment, check=True)
        made = Path(work, "gradflow-demo")
        for name, source in PAGES.items():
            (FOLDER / name).write_text(headed((made / source).read_text(), source))
        shutil.copy(made / "comparison.png", FOLDER / "comparison.png")


if __name__ == "__main__":
    main()
