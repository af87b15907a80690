"""The PyTorch path: tiles that stay in cache, without an N×M array. It runs on machines without a GPU."""
