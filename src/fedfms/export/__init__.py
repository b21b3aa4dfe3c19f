"""A trained model to what others load: SAM's own file, one file of ours, ONNX, a MONAI bundle."""
