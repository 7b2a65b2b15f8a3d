"""Training without Ray: model steps, losses, optimizers, checkpoints."""
