"""How fast gradflow is, as ratios taken in one run; `python tests/benchmark.py` runs it all."""
