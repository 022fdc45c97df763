"""Cells of the user's own: found by what comes back, marked where they return it."""
