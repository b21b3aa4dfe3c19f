"""The only folder that imports NVFLARE. No maths, no training, no images."""
