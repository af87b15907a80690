"""The textbook formulas, dense, in any floating dtype, differentiable any number of times. Every test compares with them."""

from fastvae.reference.kernel_hvp import kernel_hvp
from fastvae.reference.kernel_matmul import kernel_matmul
from fastvae.reference.kernel_mean import mmd_to_mean
from fastvae.reference.ksd_to_normal import ksd_to_normal
from fastvae.reference.log_kernel_density import log_kernel_density, normalized_matmul
from fastvae.reference.mmd import mmd, mmd_to_normal
from fastvae.reference.quadratic_form import quadratic_form
from fastvae.reference.reparameterize_kl import gaussian_kl, reparameterize_kl
from fastvae.reference.sigreg import sigreg
from fastvae.reference.total_correlation import KLDecomposition, total_correlation

__all__ = [
    "KLDecomposition",
    "gaussian_kl",
    "kernel_hvp",
    "kernel_matmul",
    "ksd_to_normal",
    "log_kernel_density",
    "mmd",
    "mmd_to_mean",
    "mmd_to_normal",
    "normalized_matmul",
    "quadratic_form",
    "reparameterize_kl",
    "sigreg",
    "total_correlation",
]
