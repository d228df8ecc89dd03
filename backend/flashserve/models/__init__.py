"""Model architectures: one file each, one line in the registry; and the reading of checkpoints."""
