"""How much memory a training step takes, without weights and without a GPU."""
