"""Recipe to network, and which of its tensors learn. Knows nothing of data or optimizers."""
