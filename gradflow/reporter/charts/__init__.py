"""One file per picture: `prepare` makes small arrays and words of a layer, `draw` shows them.

Drawing computes nothing, so tests look at what `prepare` returns.
"""
