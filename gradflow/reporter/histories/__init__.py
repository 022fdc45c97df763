"""Pictures, page and terminal of a training: everything that shows a `History`."""
