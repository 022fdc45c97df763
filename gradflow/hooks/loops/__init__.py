"""Loops of calls: stitched together, replayed in groups, read as one track."""
