"""The textbook formulas, dense, differentiable any number of times, in any floating dtype: the oracle of every test."""

from fastvae.reference.mmd import mmd, mmd_to_normal
from fastvae.reference.reparameterize_kl import reparameterize_kl
from fastvae.reference.total_correlation import KLDecomposition, total_correlation

__all__ = ["KLDecomposition", "mmd", "mmd_to_normal", "reparameterize_kl", "total_correlation"]
