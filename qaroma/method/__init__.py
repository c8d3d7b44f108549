"""AROMA itself: growth, criteria, factors, optimiser. Knows nothing of files, data or commands."""
