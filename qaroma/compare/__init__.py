"""Methods side by side: the same data, seeds, steps and metric for each, one table and a verdict."""
