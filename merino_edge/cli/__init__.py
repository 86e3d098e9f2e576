"""The command line: one file per verb. It is the only package that imports every room."""
