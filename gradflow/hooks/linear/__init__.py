"""Linear recurrences: scans that the user marks, and functions of libraries that are observed."""
