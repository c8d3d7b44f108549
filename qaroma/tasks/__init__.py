"""What a model is trained to do: each task bundles collation, loss and metrics."""
