"""Text that others wrote, taken within bounds: YAML, JSON, paths and regular expressions.

A configuration, a run, an adapter or a model may come from anywhere. Whatever stands in it ends in a value or
in an error of the reader's own kind, soon: never in an exception of a library's inside, and never in none.
"""
