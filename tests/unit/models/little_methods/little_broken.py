raise ImportError("No module named 'frobnicate'")
