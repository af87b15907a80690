"""The MMD of other libraries and papers: each function gives the value and gradient of one formula, in one sweep or a few.

Notation: d² = ‖x − y‖²; V and U are the biased and the unbiased estimator of `fastvae.mmd`. x is (N, D) and y (M, D), floating point, with
the same dtype and device; N = M where a formula pairs the rows of x and y. A bandwidth that the library computes from the data has no
gradient, as in the library. All functions but `drifting` take the arguments `precision` and `backend` of `fastvae.mmd` and raise its
errors. They work under `torch.compile(fullgraph=True)`, and no call waits for a GPU, except `trvae` without `num_groups`.
`docs/coming-from.md` shows how to switch from each library.

The formulas were read from the source of each project. Rounding, and lower bounds of 1e-8 or less on d², are not reproduced.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor

from fastvae import checks
from fastvae.bandwidths import mean_bandwidth, median_bandwidth, ranked_squared_distance
from fastvae.devices import float64_on_cpu
from fastvae.dispatch import accumulation_dtype
from fastvae.drifting import drifting
from fastvae.functional import group_mmd, kernel_matmul, mmd
from fastvae.kernel_mean import KernelMean
from fastvae.objectives import IMQ_SCALES
from fastvae.radial import IMQ, RBF, Energy, Kernel, Laplace, Linear, Polynomial, RationalQuadratic
from fastvae.sliced import sigreg
from fastvae.two_sample import squared

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = [
    "KID",
    "alibi_detect",
    "cmmd",
    "dan",
    "deepda",
    "drifting",
    "eb_jepa",
    "geomloss",
    "imm",
    "info_vae",
    "irdm",
    "kid",
    "lejepa",
    "mmd_gan",
    "mmd_gan_mix",
    "mmdagg",
    "mmdfuse",
    "pythae",
    "pytorch_adapt",
    "pytorch_vae",
    "stable_audio",
    "trvae",
    "wae",
]

STABLE_AUDIO_SCALES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TRVAE_ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)


class Options(TypedDict, total=False):
    """The options that every recipe passes on to `fastvae.mmd`."""

    precision: checks.Precision | None
    backend: checks.Backend | None


class SliceOptions(Options, total=False):
    """The options that `lejepa` and `eb_jepa` pass on to `fastvae.sigreg`."""

    directions: Tensor | None
    num_slices: int
    generator: torch.Generator | None
    process_group: ProcessGroup | None


P = ParamSpec("P")
R = TypeVar("R")


def _recipe(function: Callable[P, R]) -> Callable[P, R]:
    """Names the recipe in the error of an unknown option, which would name a function that it calls."""
    own = [
        name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    passed_on = SliceOptions if function.__name__ in ("lejepa", "eb_jepa") else Options
    known = (*own, *passed_on.__annotations__)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        checks.known_options(f"recipes.{function.__name__}", kwargs, known)
        return function(*args, **kwargs)

    return checked


@float64_on_cpu
@_recipe
def pythae(
    x: Tensor,
    y: Tensor,
    *,
    kernel_choice: Literal["imq", "rbf"] = "imq",
    kernel_bandwidth: float = 1.0,
    scales: Sequence[float] = IMQ_SCALES,
    **options: Unpack[Options],
) -> Tensor:
    """The `mmd_loss` of pythae's WAE_MMD and INFOVAE_MMD, for codes x and a sample y of the prior, N = M.

        U − 2·S,   k = exp(−d²/C) and S = 1 ("rbf"), or k = Σ_s sC/(sC + d²) over the S scales ("imq");   C = 2·D·kernel_bandwidth²

    Its quirks: The objective multiplies this number by N, so the weight of the MMD grows with the batch. The constant −2·S comes from
    `k − k.diag()`, which subtracts the diagonal from every row instead of removing it; U is this number plus 2·S. WAE_MMD uses all scales,
    INFOVAE_MMD one: `scales=(1.0,)`. The default weight α + λ − 1 of INFOVAE_MMD is −0.999, which maximises the MMD.

    Source: github.com/clementchadebec/benchmark_VAE, models/wae_mmd and models/info_vae.
    """
    x, y = _samples(x, y, "this recipe")
    checks.option("kernel_choice", kernel_choice, ("imq", "rbf"))
    c = 2 * x.shape[1] * checks.real("kernel_bandwidth", kernel_bandwidth, above=0) ** 2
    if kernel_choice == "rbf":
        return mmd(x, y, bandwidth=math.sqrt(c / 2), estimator="unbiased", **options) - 2
    return _imq_set(x, y, c, scales, options) - 2 * len(scales)


@float64_on_cpu
@_recipe
def wae(x: Tensor, y: Tensor, *, pz_scale: float = 1.0, scales: Sequence[float] = IMQ_SCALES, **options: Unpack[Options]) -> Tensor:
    """The MMD penalty of the Wasserstein autoencoder's authors, for codes x and a sample y of the prior N(0, pz_scale²), N = M.

        U of k = Σ_s sC/(sC + d²),   C = 2·D·pz_scale²

    It may be negative. Their other kernel, "RBF", whose bandwidth has a gradient, is not reproduced.

    Source: github.com/tolstikhin/wae, wae.py; Tolstikhin et al. 2018, "Wasserstein auto-encoders", section 4.
    """
    x, y = _samples(x, y, "this recipe")
    return _imq_set(x, y, 2 * x.shape[1] * checks.real("pz_scale", pz_scale, above=0) ** 2, scales, options)


@float64_on_cpu
@_recipe
def info_vae(x: Tensor, y: Tensor, **options: Unpack[Options]) -> Tensor:
    """The MMD of InfoVAE's authors (MMD-VAE), for codes x and a sample y of the prior (200 rows in the original).

        V of k = exp(−d²/D²)

    Its quirk: The mean of d² over features is divided by D a second time. For D of 20 or more, k is near 1 everywhere, and the gradient
    falls as 1/D².

    Source: github.com/ShengjiaZhao/MMD-Variational-Autoencoder, mmd_vae.py; Zhao, Song and Ermon 2019, "InfoVAE".
    """
    x, y = _samples(x, y, biased=True)
    return mmd(x, y, bandwidth=x.shape[1] / math.sqrt(2), **options)


@float64_on_cpu
@_recipe
def stable_audio(
    x: Tensor, y: Tensor, *, kernel: Literal["gaussian", "rational_quadratic"] = "gaussian", **options: Unpack[Options]
) -> Tensor:
    """The MMD of stable-audio-tools between latents x (B, C, T) and noise y of this form. Each frame is a row of C features.

        V of k = exp(−d²/C²), of its Wasserstein bottleneck ("gaussian"), or of k = ⅕·Σ_b 1/(1 + d²/(2bC)) with b = 10⁻⁴, 10⁻³, …, 1, of its
        latent MMD loss ("rational_quadratic")

    Either may also be rows, (N, C). Its quirk: as in `info_vae`, k of the first is near 1 everywhere for 20 channels or more.

    Source: github.com/Stability-AI/stable-audio-tools, models/bottleneck.py and training/losses.
    """
    x, y = (t.movedim(1, 2).flatten(0, 1) if isinstance(t, Tensor) and t.ndim == 3 else t for t in (x, y))
    x, y = _samples(x, y, biased=True)
    checks.option("kernel", kernel, ("gaussian", "rational_quadratic"))
    if kernel == "gaussian":
        return info_vae(x, y, **options)
    h = [math.sqrt(b * x.shape[1]) for b in STABLE_AUDIO_SCALES]
    return mmd(x, y, bandwidth=h, bandwidth_weights=[1 / len(h) for _ in h], kernel="rational_quadratic", **options)


@float64_on_cpu
@_recipe
def pytorch_vae(
    x: Tensor,
    y: Tensor,
    *,
    model: Literal["info_vae", "wae_mmd"] = "info_vae",
    kernel_type: Literal["imq", "rbf"] = "imq",
    latent_var: float = 2.0,
    **options: Unpack[Options],
) -> Tensor:
    """The MMD that AntixK's PyTorch-VAE multiplies by `reg_weight`, for codes x and a sample y of the prior, N = M = B.

        "rbf": V/(B(B−1)) with k = exp(−d²/(2·D²·latent_var)) for model="info_vae", exp(−d²/D²) for "wae_mmd"
        "imq": Σ_{i≠j} (k(x_i, x_j) + k(y_i, y_j) − 2·k(x_i, y_j))/(B(B−1)) with k = C/(C + d²), C = 2·D·latent_var

    Its quirks: With "rbf", a mean over B² pairs is divided by B(B−1) a second time, so the penalty falls as 1/B². With "imq", the sum is
    divided once, and the pairs i = j are left out of all three terms: a U-statistic, but not U. For "info_vae" replace `reg_weight` by
    alpha + reg_weight − 1.

    Source: github.com/AntixK/PyTorch-VAE, models/info_vae.py and models/wae_mmd.py.
    """
    x, y = _samples(x, y, "this recipe")
    checks.option("model", model, ("info_vae", "wae_mmd"))
    checks.option("kernel_type", kernel_type, ("imq", "rbf"))
    n, d = x.shape
    variance = checks.real("latent_var", latent_var, above=0)
    if kernel_type == "rbf":
        h = d / math.sqrt(2) if model == "wae_mmd" else d * math.sqrt(variance)
        return mmd(x, y, bandwidth=h, **options) / (n * (n - 1))
    c, eps = 2 * d * variance, 1e-7
    return _without_pairs(x, y, IMQ(), math.sqrt(c + eps), options) * (c / (c + eps))


@float64_on_cpu
@_recipe
def geomloss(
    x: Tensor,
    y: Tensor,
    *,
    loss: Literal["gaussian", "laplacian", "energy"] = "gaussian",
    blur: float = 0.05,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The kernel norms of `geomloss.SamplesLoss(loss, blur=blur)`, for x (..., N, D) and y (..., M, D).

        ½·V,   k = exp(−d²/(2·blur²)) ("gaussian"), exp(−d/blur) ("laplacian") or −d ("energy", without blur)

    Weights, (..., N) and (..., M), must sum to one and get no gradient. Its quirks: Without KeOps it uses d ≥ 1e-4 (in units of blur), also
    between a point and itself, which changes "laplacian" and "energy" by up to 1e-4·(Σ p² + Σ q²)/2. Its second derivative is wrong.

    Source: github.com/jeanfeydy/geomloss, kernel_samples.py; Feydy et al. 2019, "Interpolating between optimal transport and MMD".
    """
    checks.option("loss", loss, ("gaussian", "laplacian", "energy"))
    kernel: Kernel = {"gaussian": RBF(), "laplacian": Laplace(), "energy": Energy()}[loss]
    h = 1.0 if loss == "energy" else checks.real("blur", blur, above=0)
    return 0.5 * mmd(x, y, bandwidth=h, kernel=kernel, x_weights=x_weights, y_weights=y_weights, **options)


@float64_on_cpu
@_recipe
def alibi_detect(
    x: Tensor, y: Tensor, *, sigma: checks.BandwidthRule | float | Sequence[float] | Tensor = "median", **options: Unpack[Options]
) -> Tensor:
    """The MMD² of alibi-detect's `MMDDrift`, for the reference set x and the test set y.

        U of the mean over σ of exp(−d²/(2σ²))

    `sigma` is a number, several, or a rule on the pairs i < j of the reference set, as with `configure_kernel_from_x_ref=True`: "median"
    √(½·median d²), the lower of two medians, as in its PyTorch backend, or "mean" √(½·mean d²), as in its KeOps backend. Its quirks: With
    `configure_kernel_from_x_ref=False` the rule uses only the pairs of x with the y of the first test. Its p-value leaves out the observed
    statistic, so it may be 0.

    Source: github.com/SeldonIO/alibi-detect, cd/pytorch/mmd.py, utils/pytorch/kernels.py and utils/keops/kernels.py.
    """
    x, y = _samples(x, y)
    if isinstance(sigma, str):
        checks.option("sigma", sigma, checks.BANDWIDTH_RULES)
        sigma = _of_data((median_bandwidth if sigma == "median" else mean_bandwidth)(x))
    h = checks.bandwidth_vector("sigma", sigma, x.device)
    return mmd(x, y, bandwidth=h, bandwidth_weights=[1 / len(h)] * len(h), estimator="unbiased", **options)


@float64_on_cpu
@_recipe
def dan(
    x: Tensor,
    y: Tensor,
    *,
    alphas: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0),
    linear: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """`MultipleKernelMaximumMeanDiscrepancy` of the Transfer-Learning-Library (DAN) with a `GaussianKernel(alpha)` for each α, N = M.

        U + 2/(N−1);   if `linear` the mean over i of k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i), plus 2/(N−1), j = i+1 mod N
        k = Σ_α exp(−d²/(2σ²)),   σ² = α·mean d² over all (2N)² pairs of x and y together, those of a row with itself included

    Its quirks: 2/(N−1) is added "to make up for the diagonal", for any number of kernels, and also if `linear`. The library's scripts use
    these five α. The linear form takes time O(N·D).

    Source: github.com/thuml/Transfer-Learning-Library, tllib/alignment/dan.py and tllib/modules/kernels.py; Long et al. 2015.
    """
    x, y = _samples(x, y, "this recipe")
    checks.flag("linear", linear)
    width = _of_data(mean_bandwidth(x, y, self_pairs=True))
    h = torch.stack([width * math.sqrt(2 * alpha) for alpha in checks.positive_numbers("alphas", alphas)])
    if linear:
        ring = torch.arange(1, 2 * len(x) + 1, device=x.device) // 2 % len(x)
        value = mmd(x[ring], y[ring], bandwidth=h, estimator="linear", **options)
    else:
        value = mmd(x, y, bandwidth=h, estimator="unbiased", **options)
    return value + 2 / (len(x) - 1)


@float64_on_cpu
@_recipe
def pytorch_adapt(
    x: Tensor,
    y: Tensor,
    *,
    kernel_scales: float | Sequence[float] | Tensor = 1.0,
    mmd_type: Literal["linear", "quadratic"] = "linear",
    **options: Unpack[Options],
) -> Tensor:
    """`MMDLoss` of pytorch-adapt.

        U ("quadratic") or the linear-time estimator ("linear", N = M) of the mean over s of exp(−s·d²/m),
        m = median of all N² entries of the matrix of d² of x, its diagonal of zeros included

    `kernel_scales` are the s: a number, several, or the result of its `get_kernel_scales()`, 2 ** torch.linspace(-8, 8, 33). Its quirk: The
    bandwidth comes from x alone, so the loss is not symmetric. Because of the median, even "linear" takes a sweep over x.

    Source: github.com/KevinMusgrave/pytorch-adapt, layers/mmd_loss.py and layers/utils.py.
    """
    checks.option("mmd_type", mmd_type, ("linear", "quadratic"))
    x, y = _samples(x, y, "mmd_type='linear'" if mmd_type == "linear" else None)
    width = _of_data(median_bandwidth(x, self_pairs=True))
    if isinstance(kernel_scales, Tensor) and kernel_scales.device.type != "cpu":
        h = width / kernel_scales.detach().reshape(-1).double().sqrt()
    else:
        h = torch.stack([width / math.sqrt(scale) for scale in checks.positive_numbers("kernel_scales", kernel_scales)])
    weights = [1 / len(h)] * len(h)
    return mmd(x, y, bandwidth=h, bandwidth_weights=weights, estimator="linear" if mmd_type == "linear" else "unbiased", **options)


@float64_on_cpu
@_recipe
def deepda(x: Tensor, y: Tensor, *, kernel_mul: float = 2.0, kernel_num: int = 5, **options: Unpack[Options]) -> Tensor:
    """`MMDLoss` of jindongwang's transferlearning (DeepDA, and DDC, DAN and DSAN in other folders).

        V of k = Σ_i exp(−d²/(b·kernel_mul^{i − kernel_num // 2})), i = 0 … kernel_num − 1,
        b = mean of d² over the n² − n pairs i ≠ j of x and y together, n = N + M

    Its quirk: `fix_sigma` is accepted and ignored.

    Source: github.com/jindongwang/transferlearning, code/DeepDA/loss_funcs/mmd.py.
    """
    x, y = _samples(x, y, biased=True)
    ratio = checks.real("kernel_mul", kernel_mul, above=0)
    count = checks.integer("kernel_num", kernel_num, at_least=1)
    width = _of_data(mean_bandwidth(x, y))
    return mmd(x, y, bandwidth=torch.stack([width * ratio ** (0.5 * (i - count // 2)) for i in range(count)]), **options)


@float64_on_cpu
@_recipe
def trvae(
    z: Tensor,
    groups: Tensor,
    *,
    num_groups: int | None = None,
    boundary: int | None = None,
    beta: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """The MMD between conditions of trVAE, as in scArches, for z (N, D) whose rows belong to the `groups` (N,), integers from 0.

        beta·Σ over pairs of groups of V,   k = Σ_α exp(−d²/(2α)) over 19 α = 1e-6, 1e-5 … 1, 5, 10 … 35, 100, 1e3 … 1e6

    All pairs take one sweep. With `boundary`, only pairs of a group below it with a group at or above it count. Its quirks: It sums over
    pairs, so the weight grows with the number of groups. A group of one row counts without a boundary, but not with one. Without
    `num_groups` the call waits for a GPU.

    Source: github.com/theislab/scarches, models/trvae/losses.py; Lotfollahi et al. 2020, "Conditional out-of-distribution generation".
    """
    checks.points("z", z)
    size = checks.groups(groups, num_groups, z)
    if groups.is_floating_point():
        raise TypeError(f"groups must hold integers, got {groups.dtype}")
    weight = checks.real("beta", beta)
    if boundary is not None:
        first = checks.integer("boundary", boundary, at_least=1)
        if first >= size:
            raise ValueError(f"boundary must be less than the number of groups, {size}, got {first}")
        pairs = [(i, j) for i in range(first) for j in range(first, size)]
    else:
        pairs = [(i, j) for i in range(size) for j in range(i, size)]
        # group_mmd needs groups of two rows, and V stays the same if a row is repeated. Every group gets a second row: finding the groups
        # that need one would wait for a GPU; rows that are not needed go to an additional group without pairs.
        members = torch.nn.functional.one_hot(groups.long(), size)
        twins = torch.where(members.sum(0) == 1, torch.arange(size, device=z.device), size)
        z, groups = torch.cat([z, z[members.argmax(0)]]), torch.cat([groups.long(), twins])
        size += 1
    total = group_mmd(z, groups, num_groups=size, pairs=pairs, bandwidth=[alpha**0.5 for alpha in TRVAE_ALPHAS], **options).values.sum()
    return total * weight


@float64_on_cpu
@_recipe
def mmd_gan(
    x: Tensor, y: Tensor, *, sigmas: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0), biased: bool = True, **options: Unpack[Options]
) -> Tensor:
    """The distance of MMD-GAN, `sqrt(relu(mix_rbf_mmd2(x, y, sigmas)))`.

        √max(V, 0), or √max(U, 0) unless `biased`;   k = Σ_σ exp(−d²/(2σ²))

    Where the estimate is not positive, as U often is for similar samples, value and gradient are 0, not nan. Just above 0 the gradient is
    unbounded.

    Source: github.com/OctoberChang/MMD-GAN, mmd.py; Li et al. 2017, "MMD GAN".
    """
    checks.flag("biased", biased)
    x, y = _samples(x, y, biased=biased)
    value = mmd(x, y, bandwidth=checks.positive_numbers("sigmas", sigmas), estimator="biased" if biased else "unbiased", **options)
    # The derivative of the root at 0 is infinite, but relu's backward pass masks it and does not multiply.
    return value.relu().sqrt()


@float64_on_cpu
@_recipe
def mmd_gan_mix(
    x: Tensor, y: Tensor, *, alphas: Sequence[float] = (0.1, 1.0, 10.0), dot: float = 1.0, biased: bool = False, **options: Unpack[Options]
) -> Tensor:
    """The MMD² of the MMD-GAN of Bińkowski et al., whose kernels are rational quadratic and linear.

        U, or V if `biased`;   k = Σ_α (1 + d²/(2α))^−α + dot·x·y

    Source: github.com/mbinkowski/MMD-GAN, gan/core/mmd.py; Bińkowski et al. 2018, "Demystifying MMD GANs".
    """
    checks.flag("biased", biased)
    x, y = _samples(x, y, biased=biased)
    kernels: list[Kernel] = [RationalQuadratic(alpha) for alpha in checks.positive_numbers("alphas", alphas)]
    if checks.real("dot", dot, at_least=0):
        kernels.append(dot * Linear())
    return mmd(x, y, kernel=kernels, estimator="biased" if biased else "unbiased", **options)


@float64_on_cpu
@_recipe
def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, normalize: bool = True, **options: Unpack[Options]) -> Tensor:
    """CMMD of CLIP embeddings x and y.

        scale·V of exp(−d²/(2·sigma²)), rows divided by their L2 norms first unless `normalize=False`

    At σ = 10, k of unit vectors is above 0.98. The original code loses most digits of float32 there; this one sums k − 1. With float32 rows
    the error of V is still up to 2e-7/sigma² on a CPU and about 4e-6/N on a GPU, which exceeds V for near copies: pass those in float64, as
    `fastvae.metrics.CMMD` does.

    Source: github.com/google-research/google-research, cmmd/distance.py; Jayasumana et al. 2024, "Rethinking FID".
    """
    x, y = _samples(x, y, biased=True)
    checks.flag("normalize", normalize)
    if normalize:
        x, y = (torch.nn.functional.normalize(t.to(accumulation_dtype(t.dtype)), dim=1) for t in (x, y))
    return checks.real("scale", scale) * mmd(x, y, bandwidth=checks.real("sigma", sigma, above=0), **options)


class KID(NamedTuple):
    """The kernel inception distance over subsets.

    Attributes:
        mean: The mean over the subsets, a scalar.
        std: The standard deviation over the subsets, without Bessel's correction, a scalar.
    """

    mean: Tensor
    std: Tensor


@float64_on_cpu
@_recipe
def kid(
    x: Tensor,
    y: Tensor,
    *,
    subsets: int | None = 100,
    subset_size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> KID:
    """The kernel inception distance of features x and y, as in `torchmetrics.image.KernelInceptionDistance`.

        U of (gamma·x·y + coef)^degree, gamma = 1/D by default: mean and standard deviation over subsets of `subset_size` rows of each

    The subsets are drawn as in torchmetrics, by `torch.randperm` on the CPU for x and then for y, from `generator` or the global one, so
    equal seeds give equal subsets. `subsets=None` takes all rows at once: the mean is then the value that subsets only estimate, and the
    standard deviation is nan.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", section 4; github.com/Lightning-AI/torchmetrics, image/kid.py.
    """
    x, y = _samples(x, y)
    h = 1.0 if gamma is None else (x.shape[1] * checks.real("gamma", gamma, above=0)) ** -0.5
    kernel = Polynomial(degree, coef)
    if subsets is None:
        value = mmd(x, y, bandwidth=h, kernel=kernel, estimator="unbiased", **options)
        return KID(value, torch.full_like(value, torch.nan))
    checks.integer("subsets", subsets, at_least=1)
    checks.integer("subset_size", subset_size, at_least=2)
    for name, t in (("x", x), ("y", y)):
        if t.shape[0] < subset_size:
            raise ValueError(f"{name} must have at least subset_size = {subset_size} rows, got {t.shape[0]}: pass subsets=None")
    drawn = torch.stack([torch.randperm(len(t), generator=generator, device="cpu")[:subset_size] for _ in range(subsets) for t in (x, y)])
    rows = _sent(drawn, x.device).reshape(subsets, 2, subset_size)
    stacked = torch.stack([mmd(x[of_x], y[of_y], bandwidth=h, kernel=kernel, estimator="unbiased", **options) for of_x, of_y in rows])
    stacked = stacked + (0 * x).sum() + (0 * y).sum()  # nan if any row is not finite, also one that no subset contains
    return KID(stacked.mean(), stacked.std(unbiased=False))


@_recipe
def irdm(
    x: Tensor | Sequence[Tensor],
    reference: KernelMean | Sequence[KernelMean],
    *,
    weights: float | Sequence[float] | None = None,
    normalize: Literal["stop_gradient", False] | None = "stop_gradient",
    process_group: ProcessGroup | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The loss of iRDM (representation distribution matching), for embeddings x of generated data by one encoder or by each of several.

        Σ over encoders of weight·L/(stop|L| + 1e-7),   L = mean k(x, x') − 2·mean_i Σ_m α_m·k(x_i, z_m) + mean k(r, r')

    stop is without a gradient. The α_m and landmarks z_m of each encoder compress its embeddings r of real data once: a `KernelMean` from
    `KernelMean.fit(r, bandwidth=h)`, whose defaults are those of iRDM but for h = √(median d²) of 2,000 rows, which is
    2**0.5·`median_bandwidth(r[:2000])`. `weights` are 1 by default, and one number is the weight of each. With normalize=None or False each
    term is L itself. The value of a normalised term is its weight up to rounding; the terms themselves are `fastvae.mmd(x, reference)`.
    `process_group` is that of `fastvae.mmd`.

    Source: github.com/vita-epfl/RDM, rdm/compare; arXiv 2607.02375.
    """
    checks.option("normalize", normalize, ("stop_gradient", None, False))
    samples = list(x) if isinstance(x, Sequence) else [x]
    if not samples:
        raise ValueError("x must hold at least one sample, got none")
    means = list(reference) if isinstance(reference, Sequence) else [reference]
    factors = checks.numbers_of("weights", 1.0 if weights is None else weights)
    if weights is None or isinstance(weights, numbers.Real):
        factors *= len(samples)
    for mean in means:
        checks.instance("reference", mean, KernelMean, " or several")
    checks.as_many("reference", "KernelMean", len(means), len(samples))
    checks.as_many("weights", "number", len(factors), len(samples))
    terms = []
    for sample, mean, factor in zip(samples, means, factors, strict=True):
        value = mmd(sample, mean, process_group=process_group, **options)
        terms.append(factor * (value / (value.detach().abs() + 1e-7) if normalize else value))
    return torch.stack(terms).sum()


@float64_on_cpu
@_recipe
def imm(x: Tensor, y: Tensor, kernel_weights: Tensor, *, weights: Tensor | None = None, **options: Unpack[Options]) -> Tensor:
    """The loss of inductive moment matching, for G groups of outputs x (G, N, ...) and targets y (G, M, ...), which get no gradient.

        mean over groups of weight·V,   k = exp(−w·d/D) with the w of the group

    A row has all D numbers of an output, such as its channels, height and width. `kernel_weights` are the w > 0 of each group, (G,), such
    as 1/(0.5·(t − s)); `weights`, (G,), are 1 by default. Neither gets a gradient.

    Source: github.com/rosinality/inductive-moment-matching, src/imm/loss.py; Zhou, Ermon and Song 2025, "Inductive moment matching".
    """
    x, y = (checks.outputs_of_groups(name, t) for name, t in (("x", x), ("y", y)))
    checks.one_for_each_group("kernel_weights", kernel_weights, x, above=0)
    if weights is not None:
        checks.one_for_each_group("weights", weights, x)
    h = x.shape[-1] / kernel_weights.detach().double()
    values = mmd(x, y.detach(), bandwidth=h[:, None], kernel="laplace", **options)
    return values.mean() if weights is None else (values * weights.detach().to(values)).mean()


@float64_on_cpu
@_recipe
def mmdagg(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Literal["gaussian", "imq", "matern_0.5_l2"] = "gaussian",
    bandwidths: Sequence[float] | None = None,
    number_bandwidths: int = 10,
    permutations_same_sample_size: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """The statistic of each single test of MMDAgg, shape (number of bandwidths,), ascending in λ; `bandwidths` are the λ.

        N ≠ M or `permutations_same_sample_size`: U;   else Σ_{i≠j} k(x_i, x_j) + k(y_i, y_j) − 2·k(x_i, y_j), about N(N−1) times U
        k = exp(−d²/λ²) ("gaussian"), (1 + d²/λ²)^−½ ("imq") or exp(−d/λ) ("matern_0.5_l2")

    By default the λ are a geometric series from half the smallest to twice the largest distance between the first 500 rows of each set. Its
    quirks: "gaussian" lacks the 2 of 2λ², so h = λ/√2. The "laplace" part of its default "laplace_gaussian" uses the L1 norm, which is not
    supported here. For the test itself see `fastvae.two_sample_test`.

    Source: github.com/antoninschrab/mmdagg; Schrab et al. 2023, "MMD aggregated two-sample test".
    """
    x, y = _samples(x, y)
    checks.flag("permutations_same_sample_size", permutations_same_sample_size)
    family, factor = _schrab_kernel(kernel, _MMDAGG)
    lambdas: list[Any]
    if bandwidths is None:
        lambdas = _mmdagg_bandwidths(x, y, checks.integer("number_bandwidths", number_bandwidths, at_least=2))
    else:
        lambdas = checks.positive_numbers("bandwidths", bandwidths)
    n = len(x)
    if n != len(y) or permutations_same_sample_size:
        return torch.stack([mmd(x, y, bandwidth=factor * h, kernel=family, estimator="unbiased", **options) for h in lambdas])
    return torch.stack([_without_pairs(x, y, family, factor * h, options) for h in lambdas]) * (n * (n - 1))


@float64_on_cpu
@_recipe
def mmdfuse(
    x: Tensor,
    y: Tensor,
    *,
    kernels: Sequence[Literal["gaussian", "imq", "rq", "matern_0.5_l2"]] = ("gaussian",),
    bandwidths: Sequence[float] | None = None,
    number_bandwidths: int = 10,
    lambda_multiplier: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """The statistic of MMD-FUSE, a scalar; `bandwidths` are the λ of every kernel.

        log mean over kernels and λ of exp(lambda_multiplier·(n(n−1))^{3/2}·U/√(Σ_{i≠j} k(z_i, z_j)²)),   z = [x; y], n = min(N, M)
        k = exp(−d²/(2λ²)) ("gaussian"), (1 + d²/λ²)^−½ ("imq", "rq") or exp(−d/λ) ("matern_0.5_l2")

    By default the λ are evenly spaced from half the 5 % quantile to twice the 95 % quantile of the distances between rows of z, where the
    median replaces the zeros of the diagonal; rows must not repeat. Its quirk: "laplace", one of its two default kernels, is
    exp(−√2·‖x−y‖₁/λ) with the L1 norm, which is not supported here.

    Source: github.com/antoninschrab/mmdfuse-paper; Biggs, Schrab and Gretton 2023, "MMD-FUSE".
    """
    x, y = _samples(x, y)
    families = [_schrab_kernel(kernel, _MMDFUSE) for kernel in ([kernels] if isinstance(kernels, str) else kernels)]
    z, n = torch.cat([x, y]), min(len(x), len(y))
    z_again = z.clone()  # Dynamo does not accept the same tensor twice.
    lambdas: list[Any]
    if bandwidths is None:
        lambdas = _mmdfuse_bandwidths(z, checks.integer("number_bandwidths", number_bandwidths, at_least=2))
    else:
        lambdas = checks.positive_numbers("bandwidths", bandwidths)
    multiplier = checks.real("lambda_multiplier", lambda_multiplier, above=0)
    statistics = []
    for family, factor in families:
        square, shrink = squared(family)
        for h in lambdas:
            value = mmd(x, y, bandwidth=factor * h, kernel=family, estimator="unbiased", **options)
            squares = kernel_matmul(
                z, z_again, torch.ones_like(z[:, 0]), bandwidth=shrink * factor * h, kernel=square, **options
            ).sum() - len(z)
            statistics.append(value * ((n * (n - 1)) ** 1.5 / squares.sqrt()))
    return (multiplier * torch.stack(statistics)).logsumexp(0) - math.log(len(statistics))


# For each name: the kernel, and factor such that h = factor·λ.
_MMDAGG: dict[str, tuple[Kernel, float]] = {
    "gaussian": (RBF(), 0.5**0.5),
    "imq": (RationalQuadratic(0.5), 1.0),
    "matern_0.5_l2": (Laplace(), 1.0),
}
_MMDFUSE: dict[str, tuple[Kernel, float]] = {**_MMDAGG, "gaussian": (RBF(), 1.0), "rq": (RationalQuadratic(0.5), 1.0)}


@_recipe
def lejepa(views: Tensor, *, lamb: float = 0.02, **options: Unpack[SliceOptions]) -> Tensor:
    """The loss of LeJEPA for projected views of each image, (V, N, D): an invariance term and SIGReg of each view.

        (1 − lamb)·mean (z_v − mean_v z_v)² + lamb·SIGReg,   SIGReg with 17 points from 0 to 3 and the factor N

    Options are those of `fastvae.sigreg`: directions, num_slices (1,024; 256 in the minimal example), generator, precision, backend and
    process_group. With a process group SIGReg is that of all ranks' rows; the invariance term is a mean over the rank's own rows, which
    data parallelism averages.

    Source: github.com/rbalestr-lab/lejepa, MINIMAL.md; Balestriero and LeCun 2025, "LeJEPA".
    """
    checks.views("views", views)
    lamb = checks.real("lamb", lamb, at_least=0)
    z = views.to(accumulation_dtype(views.dtype))
    return (1 - lamb) * (z - z.mean(0)).square().mean() + lamb * sigreg(views, **options)


@_recipe
def eb_jepa(z1: Tensor, z2: Tensor, *, lmbd: float = 10.0, **options: Unpack[SliceOptions]) -> Tensor:
    """The loss of eb_jepa's BCS for two views of the same images, (N, D): their mean squared difference and SIGReg of each.

        mean (z1 − z2)² + lmbd·SIGReg,   SIGReg with 10 points from −3 to 3, without the factor N

    Options as in `lejepa`, but num_slices is 256 by default.

    Source: github.com/facebookresearch/eb_jepa, eb_jepa/losses.py.
    """
    checks.points("z1", z1)
    checks.floating_tensor("z2", z2)
    checks.same_shape_and_kind("z1", z1, "z2", z2)
    lmbd = checks.real("lmbd", lmbd, at_least=0)
    options.setdefault("num_slices", 256)
    views = torch.stack([z1, z2])
    a, b = views.to(accumulation_dtype(views.dtype)).unbind()
    invariance: Tensor = (a - b).square().mean()
    return invariance + lmbd * sigreg(views, num_points=10, t_min=-3.0, scale_by_n=False, **options)


def _schrab_kernel(name: str, known: dict[str, tuple[Kernel, float]]) -> tuple[Kernel, float]:
    if isinstance(name, str) and (name in ("laplace", "laplace_gaussian", "gaussian_laplace") or name.endswith("_l1")):
        raise ValueError(f"kernel must use the Euclidean distance, one of {', '.join(map(repr, known))}, got {name!r} of the L1 norm")
    checks.option("kernel", name, known)
    return known[name]


def _mmdagg_bandwidths(x: Tensor, y: Tensor, count: int) -> list[Tensor]:
    x, y = (t[:500].detach().double() for t in (x, y))
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").flatten().sort().values
    low, high = distances[0], distances[-1].clamp(min=0.3)
    low = torch.where(low < 0.1, distances[int(0.05 * len(distances))].clamp(min=0.1), low)
    ratio = (4 * high / low) ** (1 / (count - 1))
    return [_of_data(0.5 * low * ratio**i) for i in range(count)]


def _mmdfuse_bandwidths(z: Tensor, count: int) -> list[Tensor]:
    n, z = len(z), z.detach()[None]
    entries = n * (n + 1) // 2

    def distance(rank: int) -> Tensor:
        return ranked_squared_distance(z, rank).sqrt()

    # The n zeros come first among the sorted entries.
    middle = (entries - 1) // 2 - n
    median = 0.5 * (distance(middle) + distance(entries // 2 - n))

    def quantile(rank: int) -> Tensor:
        """The entry of this rank after the median has replaced the zeros."""
        if rank <= middle:
            return distance(rank)
        return distance(rank - n) if rank > middle + n else median

    low, high = 0.5 * quantile(int(0.05 * entries)), 2 * quantile(int(0.95 * entries))
    return [_of_data(low + (high - low) * i / (count - 1)) for i in range(count)]


def _samples(x: Tensor, y: Tensor, paired_for: str | None = None, *, biased: bool = False) -> tuple[Tensor, Tensor]:
    """Checks the shapes of x and y: equally many rows if `paired_for` is given, and at least two of each unless `biased`."""
    for name, t in (("x", x), ("y", y)):
        checks.points(name, t)
        if not biased:
            checks.two_rows(name, t)
    checks.same_features("x", x, "y", y)
    if paired_for is not None:
        checks.same_rows("x", x, "y", y, paired_for)
    return x, y


def _of_data(bandwidth: Tensor) -> Tensor:
    """The bandwidth, 1 instead of nan: samples with a nan make MMD² nan anyway, but a bandwidth of nan is an error."""
    return bandwidth.nan_to_num(nan=1.0)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, without waiting for a GPU."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def _imq_set(x: Tensor, y: Tensor, c: float, scales: Sequence[float], options: Options) -> Tensor:
    """U of Σ_s sC/(sC + d²)."""
    h = [math.sqrt(c * scale) for scale in checks.positive_numbers("scales", scales)]
    return mmd(x, y, bandwidth=h, kernel="imq", estimator="unbiased", **options)


def _without_pairs(x: Tensor, y: Tensor, kernel: Kernel, bandwidth: float | Tensor, options: Options) -> Tensor:
    """Σ_{i≠j} (k(x_i, x_j) + k(y_i, y_j) − 2·k(x_i, y_j))/(N(N−1)): V without its pairs i = j."""
    n, value = len(x), mmd(x, y, bandwidth=bandwidth, kernel=kernel, **options)
    h = bandwidth if isinstance(bandwidth, Tensor) else torch.tensor(bandwidth, dtype=torch.float64, device="cpu")
    gamma = kernel.gamma(h, x.shape[1])
    t = (x.to(value.dtype) - y.to(value.dtype)).square().sum(1) * gamma
    return (n * value - 2 * (kernel.value_at_zero - kernel.phi(t)).mean()) / (n - 1)
