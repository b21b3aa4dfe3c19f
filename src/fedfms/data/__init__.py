"""Files to tensors. Knows nothing of models or rounds."""
