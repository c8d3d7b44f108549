"""What a run keeps on disk: its directory, log, checkpoints and adapter."""
