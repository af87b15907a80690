"""The streaming PyTorch path: tiles that stay in cache, no N×M array. What a machine without a GPU runs."""
