"""Fused losses for variational autoencoders and for matching distributions, on a GPU (Triton) and on a CPU: MMD, SIGReg, Stein
discrepancies, reparameterise + KL, β-TC-VAE."""

from fastvae import recipes, reference, schedules
from fastvae.bandwidths import mean_bandwidth, median_bandwidth
from fastvae.densities import log_kernel_density
from fastvae.features import NystromFeatures, RandomFeatures
from fastvae.functional import (
    GroupMMD,
    gaussian_kl,
    group_mmd,
    kernel_matmul,
    mmd,
    mmd_to_normal,
    reparameterize_kl,
    reparameterize_kl_moments,
    total_correlation,
    witness,
)
from fastvae.kernel_mean import KernelMean
from fastvae.losses import MMDLoss, SIGReg
from fastvae.objectives import Bernoulli, Gaussian, ImportanceWeighted, Laplace, Likelihood, ObjectiveTerms, VAEObjective, VAEOutput
from fastvae.posteriors import DiagonalGaussianDistribution
from fastvae.preparation import Standardise
from fastvae.radial import Kernel
from fastvae.reference import KLDecomposition
from fastvae.sliced import sigreg
from fastvae.stein import ksd_to_normal
from fastvae.two_sample import KernelTest, TwoSampleTest, two_sample_test
from fastvae.vae import VAE
from fastvae.version import __version__

__all__ = [
    "VAE",
    "Bernoulli",
    "DiagonalGaussianDistribution",
    "Gaussian",
    "GroupMMD",
    "ImportanceWeighted",
    "KLDecomposition",
    "Kernel",
    "KernelMean",
    "KernelTest",
    "Laplace",
    "Likelihood",
    "MMDLoss",
    "NystromFeatures",
    "ObjectiveTerms",
    "RandomFeatures",
    "SIGReg",
    "Standardise",
    "TwoSampleTest",
    "VAEObjective",
    "VAEOutput",
    "__version__",
    "gaussian_kl",
    "group_mmd",
    "kernel_matmul",
    "ksd_to_normal",
    "log_kernel_density",
    "mean_bandwidth",
    "median_bandwidth",
    "mmd",
    "mmd_to_normal",
    "recipes",
    "reference",
    "reparameterize_kl",
    "reparameterize_kl_moments",
    "schedules",
    "sigreg",
    "total_correlation",
    "two_sample_test",
    "witness",
]
