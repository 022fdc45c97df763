"""Loops that the graph of a backward shows unrolled: which weights repeat, and what crosses a step."""
