"""The textbook formulas, dense, differentiable any number of times, in any floating dtype: the oracle of every test."""

from fastvae.reference.kernel_matmul import kernel_matmul
from fastvae.reference.mmd import mmd, mmd_to_normal
from fastvae.reference.quadratic_form import quadratic_form
from fastvae.reference.reparameterize_kl import reparameterize_kl
from fastvae.reference.total_correlation import KLDecomposition, total_correlation

__all__ = ["KLDecomposition", "kernel_matmul", "mmd", "mmd_to_normal", "quadratic_form", "reparameterize_kl", "total_correlation"]
