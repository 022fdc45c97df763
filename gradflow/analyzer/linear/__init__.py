"""Linear recurrences: gains without any S × S product, per head where there are heads."""
