"""The functions of other packages that are observed, by kind of recurrence."""

from gradflow.hooks.linear.kinds import delta, diagonal, mamba, weighted

ENTRIES = (*mamba.ENTRIES, *delta.ENTRIES, *diagonal.ENTRIES, *weighted.ENTRIES)
