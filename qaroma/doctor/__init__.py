"""Looks at a machine: what a run needs of it, what is there, and what to do about the difference."""
