"""torch.library custom ops and their derivatives, one file for each operation."""
