"""The ELBO beside MMD-VAE on data whose ELBO collapses."""

from __future__ import annotations
def compare(epochs: int = 100) -> None: ...
