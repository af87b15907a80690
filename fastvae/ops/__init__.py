"""torch.library custom ops, one file an operation: the sweep and the autograd.Function of each."""
