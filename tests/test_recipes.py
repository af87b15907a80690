"""Each recipe against its library's formula, written down densely in float64 as that library computes it."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from fastvae import recipes
from tests.cases import DEVICE, INTEGERS, Copies

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def samples(n=9, m=9, d=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    y = 1.3 * torch.randn(m, d, dtype=torch.float64, generator=generator) + 0.4
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def d2(x, y):
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def biased(k, x, y):
    return k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()


def unbiased(k, x, y):
    n, m = len(x), len(y)
    xx, yy = k(x, x), k(y, y)
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * k(x, y).mean()


def pythae(x, y, kernel_choice="imq", kernel_bandwidth=1.0, scales=SCALES):
    n, c = len(x), 2.0 * x.shape[1] * kernel_bandwidth**2

    def k(a, b):
        return torch.exp(-d2(a, b) / c) if kernel_choice == "rbf" else sum(s * c / (s * c + d2(a, b)) for s in scales)

    z, prior = k(x, x), k(y, y)
    loss = (z - z.diag()).sum() / (n - 1) + (prior - prior.diag()).sum() / (n - 1) - 2 * k(x, y).sum() / n
    return loss / n


def wae(x, y, pz_scale=1.0):
    n, stat = len(x), 0.0
    for scale in SCALES:
        c = 2 * x.shape[1] * pz_scale**2 * scale
        within = (c / (c + d2(x, x)) + c / (c + d2(y, y))) * (1 - torch.eye(n, dtype=x.dtype, device=x.device))
        stat = stat + within.sum() / (n * n - n) - (c / (c + d2(x, y))).sum() * 2 / (n * n)
    return stat


def info_vae(x, y):
    return biased(lambda a, b: torch.exp(-((a[:, None] - b[None]) ** 2).mean(2) / a.shape[1]), x, y)


def mmd_gan_mix(x, y, alphas=(0.1, 1.0, 10.0), dot=1.0, biased=False):
    def k(a, b):
        return sum((1 + d2(a, b) / (2 * alpha)) ** -alpha for alpha in alphas) + dot * a @ b.T

    return globals()["biased" if biased else "unbiased"](k, x, y)


def stable_audio(x, y, kernel="gaussian"):
    def k(a, b):
        if kernel == "gaussian":
            return torch.exp(-((a[:, None] - b[None]).pow(2).mean(2) / a.shape[-1]))
        mean = a.pow(2).mean(1)[:, None] + b.pow(2).mean(1)[None] - 2 * a @ b.T / a.shape[1]
        return sum(1 / (1 + mean / (2 * width)) for width in (1e-4, 1e-3, 1e-2, 1e-1, 1)) / 5

    return biased(k, x, y)


def pytorch_vae(x, y, model="info_vae", kernel_type="imq", latent_var=2.0):
    b, d = x.shape

    def k(a, b):
        mean = ((a[:, None] - b[None]) ** 2).mean(-1)
        if kernel_type == "rbf":
            return torch.exp(-mean / (d if model == "wae_mmd" else 2.0 * d * latent_var))
        c = 2 * d * latent_var
        matrix = c / (1e-7 + c + d2(a, b))
        return matrix.sum() - matrix.diag().sum()

    return biased(k, x, y) / (b * (b - 1))


def geomloss(x, y, loss="gaussian", blur=0.05, x_weights=None, y_weights=None):
    def distance(a, b):
        square = d2(a, b)
        return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)

    kernels = {
        "gaussian": lambda a, b: torch.exp(-d2(a / blur, b / blur) / 2),
        "laplacian": lambda a, b: torch.exp(-distance(a / blur, b / blur)),
        "energy": lambda a, b: -distance(a, b),
    }
    k = kernels[loss]
    p = torch.full_like(x[:, 0], 1 / len(x)) if x_weights is None else x_weights
    q = torch.full_like(y[:, 0], 1 / len(y)) if y_weights is None else y_weights
    return 0.5 * p @ k(x, x) @ p + 0.5 * q @ k(y, y) @ q - p @ k(x, y) @ q


def alibi_detect(x, y, sigma="median"):
    square = d2(x, x).detach()
    n = len(x)
    if sigma == "median":
        rank = n + (n * n - n) // 2 - 1
        sigma = [math.sqrt(0.5 * square.flatten().sort().values[rank].item())]
    elif sigma == "mean":
        sigma = [math.sqrt(0.5 * square.sum().item() / (n * (n - 1)))]
    return unbiased(lambda a, b: torch.stack([torch.exp(-d2(a, b) / (2 * s**2)) for s in sigma]).mean(0), x, y)


def dan(x, y, alphas=(0.125, 0.25, 0.5, 1.0, 2.0), linear=False):
    z, b = torch.cat([x, y]), len(x)
    square = d2(z, z)
    k = sum(torch.exp(-square / (2 * a * square.detach().mean())) for a in alphas)
    index = torch.zeros_like(k)
    if linear:
        for i in range(b):
            j = (i + 1) % b
            index[i, j] = index[b + i, b + j] = 1 / b
            index[i, b + j] = index[j, b + i] = -1 / b
    else:
        index[:b, :b] = index[b:, b:] = 1 / (b * (b - 1))
        index[:b, b:] = index[b:, :b] = -1 / b**2
        index.fill_diagonal_(0)
    return (k * index).sum() + 2 / (b - 1)


def pytorch_adapt(x, y, kernel_scales=1.0, mmd_type="linear"):
    scales = torch.as_tensor(kernel_scales, dtype=x.dtype, device=x.device).reshape(-1)
    scale = -scales / d2(x, x).detach().median()

    def k(a, b):
        return torch.exp(d2(a, b)[..., None] * scale).mean(-1)

    if mmd_type == "quadratic":
        return unbiased(k, x, y)
    first = torch.arange(len(x) // 2) * 2
    second = first + 1
    terms = k(x, x)[first, second] + k(y, y)[first, second] - k(x, y)[first, second] - k(x, y)[second, first]
    return terms.sum() / (len(x) // 2)


def deepda(x, y, kernel_mul=2.0, kernel_num=5):
    z, n = torch.cat([x, y]), len(x)
    square = d2(z, z)
    bandwidth = square.detach().sum() / (len(z) ** 2 - len(z)) / kernel_mul ** (kernel_num // 2)
    k = sum(torch.exp(-square / (bandwidth * kernel_mul**i)) for i in range(kernel_num))
    return k[:n, :n].mean() + k[n:, n:].mean() - k[:n, n:].mean() - k[n:, :n].mean()


def trvae_pair(x, y):
    alphas = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6]
    return biased(lambda a, b: sum(torch.exp(-d2(a, b) / (2 * alpha)) for alpha in alphas), x, y)


def trvae(z, labels, n, boundary=None, beta=1.0):
    parts, loss = [z[labels == g] for g in range(n)], 0.0
    if boundary is None:
        for i in range(n):
            for j in range(i):
                if len(parts[i]) and len(parts[j]):
                    loss = loss + trvae_pair(parts[i], parts[j])
    else:
        for i in range(boundary):
            for j in range(boundary, n):
                if len(parts[i]) > 1 and len(parts[j]) > 1:
                    loss = loss + trvae_pair(parts[i], parts[j])
    return beta * loss


def mmd_gan(x, y, sigmas=(1.0, 2.0, 4.0, 8.0, 16.0), biased=True):
    estimator = globals()["biased"] if biased else unbiased
    return estimator(lambda a, b: sum(torch.exp(-d2(a, b) / (2 * s**2)) for s in sigmas), x, y).relu().sqrt()


def cmmd(x, y, sigma=10.0, scale=1000.0):
    x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
    return scale * biased(lambda a, b: torch.exp(-d2(a, b) / (2 * sigma**2)), x, y)


def kid(x, y, degree=3, gamma=None, coef=1.0):
    gamma = 1 / x.shape[1] if gamma is None else gamma
    return unbiased(lambda a, b: (a @ b.T * gamma + coef) ** degree, x, y)


def distances(x, y):
    square = d2(x, y)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


SCHRAB = {
    "gaussian": lambda d: torch.exp(-(d**2)),
    "imq": lambda d: (1 + d**2) ** -0.5,
    "matern_0.5_l2": lambda d: torch.exp(-d),
    "fuse gaussian": lambda d: torch.exp(-(d**2) / 2),
    "rq": lambda d: (1 + d**2 / (2 * 0.5)) ** -0.5,
}


def mmdagg(x, y, kernel="gaussian", bandwidths=None, number_bandwidths=10, permutations_same_sample_size=False):
    m, n = len(x), len(y)
    if bandwidths is None:
        apart = np.sort(distances(x, y).detach().cpu().numpy().ravel())
        low = apart[0] if apart[0] >= 0.1 else max(apart[math.floor(len(apart) * 0.05)], 0.1)
        low, high = low / 2, max(apart[-1], 0.3) * 2
        bandwidths = [(high / low) ** (i / (number_bandwidths - 1)) * low for i in range(number_bandwidths)]
    z, values = torch.cat([x, y]), []
    one = torch.cat([torch.ones_like(x[:, 0]), -torch.ones_like(y[:, 0])])
    for h in bandwidths:
        k = SCHRAB[kernel](distances(z, z) / h)
        k = k * (1 - torch.eye(m + n, dtype=k.dtype, device=k.device))
        if m == n and not permutations_same_sample_size:
            cross = torch.cat([torch.cat([torch.ones(n, n), 1 - torch.eye(n)]), torch.cat([1 - torch.eye(n), torch.ones(n, n)])], 1)
            values.append(one @ (k * cross.to(k)) @ one)
        else:
            a, b = one.clamp(min=0), one.clamp(max=0)
            value = a @ k @ a * (n - m + 1) / (m * n * (m - 1)) + b @ k @ b * (m - n + 1) / (m * n * (n - 1))
            values.append(value + one @ k @ one / (m * n))
    return torch.stack(values)


def mmdfuse(x, y, kernels=("gaussian",), bandwidths=None, number_bandwidths=10, lambda_multiplier=1.0):
    x, y = (y, x) if len(y) > len(x) else (x, y)
    m, n = len(x), len(y)
    z, values = torch.cat([x, y]), []
    if bandwidths is None:
        apart = distances(z, z).detach().cpu().numpy()[np.triu_indices(m + n)]
        apart = np.sort(apart + (apart == 0) * np.median(apart))
        low, high = apart[math.floor(len(apart) * 0.05)] / 2, apart[math.floor(len(apart) * 0.95)] * 2
        bandwidths = np.linspace(low, high, number_bandwidths)
    one = torch.cat([torch.ones_like(x[:, 0]), -torch.ones_like(y[:, 0])])
    a, b = one.clamp(min=0), one.clamp(max=0)
    for kernel in kernels:
        for h in bandwidths:
            k = SCHRAB["fuse gaussian" if kernel == "gaussian" else kernel](distances(z, z) / h)
            k = k * (1 - torch.eye(m + n, dtype=k.dtype, device=k.device))
            value = a @ k @ a * (n - m + 1) * (n - 1) / (m * (m - 1)) + b @ k @ b * (m - n + 1) / m + one @ k @ one * (n - 1) / m
            values.append(value / (k**2).sum().sqrt() * math.sqrt(n * (n - 1)))
    return torch.log(torch.exp(lambda_multiplier * torch.stack(values)).mean())


# (recipe, formula, options, shape of the samples)
CASES = [
    (recipes.pythae, pythae, {}, {}),
    (recipes.pythae, pythae, {"kernel_choice": "rbf", "kernel_bandwidth": 0.7}, {}),
    (recipes.pythae, pythae, {"scales": (1.0,), "kernel_bandwidth": 1.4}, {}),
    (recipes.wae, wae, {"pz_scale": 1.2}, {}),
    (recipes.info_vae, info_vae, {}, {"m": 5}),
    *((recipes.stable_audio, stable_audio, {"kernel": k}, {"m": 5}) for k in ("gaussian", "rational_quadratic")),
    *((recipes.pytorch_vae, pytorch_vae, {"model": m, "kernel_type": k}, {}) for m in ("info_vae", "wae_mmd") for k in ("imq", "rbf")),
    (recipes.pytorch_vae, pytorch_vae, {"latent_var": 0.6}, {}),
    *((recipes.geomloss, geomloss, {"loss": name, "blur": 0.8}, {"m": 5}) for name in ("gaussian", "laplacian", "energy")),
    *((recipes.alibi_detect, alibi_detect, {"sigma": s}, {"n": n, "m": 5}) for s in ("median", "mean", (0.5, 2.0)) for n in (8, 9)),
    *((recipes.dan, dan, {"linear": linear}, {"n": n, "m": n}) for linear in (False, True) for n in (6, 7)),
    (recipes.dan, dan, {"alphas": (0.5, 3.0)}, {}),
    *((recipes.pytorch_adapt, pytorch_adapt, {"mmd_type": t}, {"n": n, "m": n}) for t in ("linear", "quadratic") for n in (6, 7, 9)),
    (recipes.pytorch_adapt, pytorch_adapt, {"kernel_scales": 2 ** torch.linspace(-8, 8, 33), "mmd_type": "quadratic"}, {"m": 5}),
    (recipes.deepda, deepda, {}, {"m": 5}),
    (recipes.deepda, deepda, {"kernel_mul": 3.0, "kernel_num": 4}, {}),
    (recipes.mmd_gan, mmd_gan, {}, {"m": 5}),
    (recipes.mmd_gan, mmd_gan, {"sigmas": (0.4,), "biased": False}, {}),
    *((recipes.mmd_gan_mix, mmd_gan_mix, o, {"m": 5}) for o in ({}, {"dot": 0.0, "biased": True}, {"alphas": (0.3,), "dot": 0.1})),
    (recipes.cmmd, cmmd, {}, {"m": 5}),
    *((recipes.mmdagg, mmdagg, {"kernel": k, "bandwidths": (0.7, 2.0)}, {"m": m}) for k in recipes._MMDAGG for m in (5, 9)),
    (recipes.mmdagg, mmdagg, {"permutations_same_sample_size": True}, {}),
    (recipes.mmdagg, mmdagg, {}, {"n": 20, "m": 30}),
    (recipes.mmdagg, mmdagg, {}, {"n": 20, "m": 20, "d": 1}),
    *((recipes.mmdfuse, mmdfuse, {"kernels": (k,), "bandwidths": (0.7, 2.0)}, {"m": m}) for k in recipes._MMDFUSE for m in (5, 12)),
    (recipes.mmdfuse, mmdfuse, {"kernels": ("imq", "gaussian"), "lambda_multiplier": 2.0}, {"m": 14}),
    (recipes.mmdfuse, mmdfuse, {"number_bandwidths": 4}, {"n": 2, "m": 2}),
]


def value_and_gradients(function, *points, **options):
    points = [t.detach().clone().requires_grad_() for t in points]
    value = function(*points, **options)
    return value.detach(), *torch.autograd.grad((value * torch.arange(1.0, 1 + value.numel()).to(value).reshape(value.shape)).sum(), points)


@pytest.mark.parametrize(("recipe", "formula", "options", "shape"), CASES)
def test_value_and_gradient(recipe, formula, options, shape):
    x, y = samples(**shape)
    actual, exact = value_and_gradients(recipe, x, y, **options), value_and_gradients(formula, x, y, **options)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("recipe", "formula", "options", "shape"), CASES)
def test_float32(recipe, formula, options, shape):
    x, y = samples(**shape, dtype=torch.float32)
    value = recipe(x, y, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), formula(x.double(), y.double(), **options), rtol=2e-5, atol=2e-6)


def test_formulas_are_no_function_of_the_library():
    """One of the transcriptions once more, in loops of plain Python, as they share helpers."""
    x, y = samples(4, 4)
    a, b = x.tolist(), y.tolist()

    def k(u, v):
        return math.exp(-sum((s - t) ** 2 for s, t in zip(u, v, strict=True)) / 8)

    total = sum(k(u, v) for u in a for v in a) / 16 + sum(k(u, v) for u in b for v in b) / 16 - 2 * sum(k(u, v) for u in a for v in b) / 16
    assert recipes.mmd_gan(x, y, sigmas=(2.0,)).item() == pytest.approx(math.sqrt(total), rel=1e-12)


def test_frames_of_stable_audio_are_rows():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE), torch.randn(3, 3, 5, dtype=torch.float64, device=DEVICE)
    for kernel in ("gaussian", "rational_quadratic"):
        value = recipes.stable_audio(x, y, kernel=kernel)
        rows = [t.permute(0, 2, 1).reshape(-1, 3) for t in (x, y)]
        torch.testing.assert_close(value, stable_audio(*rows, kernel=kernel))


def test_sample_weights_of_geomloss():
    x, y = samples(m=5)
    p, q = (torch.rand(n, dtype=torch.float64, device=DEVICE) for n in (9, 5))
    weights = {"x_weights": p / p.sum(), "y_weights": q / q.sum()}
    torch.testing.assert_close(recipes.geomloss(x, y, blur=0.8, **weights), geomloss(x, y, blur=0.8, **weights))
    batch = recipes.geomloss(torch.stack([x, x + 1]), torch.stack([y, y]), blur=0.8)
    torch.testing.assert_close(batch, torch.stack([geomloss(x, y, blur=0.8), geomloss(x + 1, y, blur=0.8)]))


LABELS = torch.tensor([0, 2, 2, 0, 3, 5, 5, 5, 0])


@pytest.mark.parametrize(("boundary", "beta"), [(None, 1.0), (None, 2.5), (2, 1.0), (3, 2.0)])
def test_trvae_with_an_empty_group_and_one_of_one_row(boundary, beta):
    z, labels = samples()[0], LABELS.to(DEVICE)
    actual = value_and_gradients(lambda z: recipes.trvae(z, labels, num_groups=6, boundary=boundary, beta=beta), z)
    exact = value_and_gradients(lambda z: trvae(z, labels, 6, boundary, beta), z)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("boundary", [None, 2])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_trvae_takes_labels_of_every_integer_dtype(dtype, boundary):
    z, labels = samples()[0], LABELS.to(DEVICE)
    assert recipes.trvae(z, labels.to(dtype), boundary=boundary) == recipes.trvae(z, labels, boundary=boundary)
    with pytest.raises(TypeError, match=r"groups must hold integers or floating-point weights, got torch\.bool"):
        recipes.trvae(z, labels > 2, boundary=boundary)


def test_kid_over_all_rows():
    x, y = samples(m=5)
    for options in ({}, {"degree": 2, "gamma": 0.5, "coef": 0.3}):
        exact = value_and_gradients(kid, x, y, **options)
        actual = value_and_gradients(lambda *t, o=options: recipes.kid(*t, subsets=None, **o).mean, x, y)
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a, e)
    assert recipes.kid(x, y, subsets=None).std.isnan()


def test_kid_over_subsets():
    x, y = samples(30, 40)
    result = recipes.kid(x, y, subsets=7, subset_size=11, generator=torch.Generator().manual_seed(5))
    generator, values = torch.Generator().manual_seed(5), []
    for _ in range(7):
        rows = [torch.randperm(n, generator=generator)[:11] for n in (30, 40)]
        values.append(kid(x[rows[0]], y[rows[1]]).item())
    np.testing.assert_allclose([result.mean.item(), result.std.item()], [np.mean(values), np.std(values)], rtol=1e-10)


def test_kid_of_all_rows_is_what_its_subsets_estimate():
    x, y = samples(60, 60)
    many = recipes.kid(x, y, subsets=300, subset_size=30, generator=torch.Generator().manual_seed(0))
    assert abs(many.mean - recipes.kid(x, y, subsets=None).mean) < 5 * many.std / math.sqrt(300)


def test_mmd_gan_has_a_gradient_where_there_is_no_distance():
    x, _ = samples()
    assert (fastvae.mmd(x, x.clone() + 1e-9, estimator="unbiased") < 0).item()
    for a, b in ((x, x.clone()), (x, x.clone() + 1e-9)):
        value, *gradients = value_and_gradients(lambda *t: recipes.mmd_gan(*t, biased=False), a, b)
        assert value == 0
        assert all((g == 0).all() for g in gradients)
    # V of equal samples is 0 but for rounding, of which the gradient of the root makes a large number, never nan.
    assert all(t.isfinite().all() for t in value_and_gradients(recipes.mmd_gan, x, x.clone()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_nan_out(bad):
    x, y = samples()
    x[0, 0] = bad
    for recipe in (recipes.mmd_gan, recipes.pythae, recipes.pytorch_vae, recipes.cmmd, recipes.deepda, recipes.dan):
        assert recipe(x, y).isnan()
    assert recipes.alibi_detect(x, y).isnan()
    assert recipes.pytorch_adapt(x, y).isnan()
    assert recipes.kid(x, y, subsets=1, subset_size=2, generator=torch.Generator().manual_seed(0)).mean.isnan()


def test_a_loss_of_half_precision_is_float32():
    x, y = samples(dtype=torch.bfloat16)
    for recipe in (recipes.pythae, recipes.pytorch_vae, recipes.cmmd, recipes.dan, recipes.mmd_gan):
        value, *gradients = value_and_gradients(recipe, x, y)
        assert value.dtype == torch.float32
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_options_reach_mmd():
    x, y = samples()
    for recipe, formula, options, _ in CASES[:9]:
        torch.testing.assert_close(recipe(x, y, backend="reference", **options), formula(x, y, **options))
    with pytest.raises(ValueError, match="precision must be one of"):
        recipes.deepda(x, y, precision="low")


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


# Recipes with what depends on the data, or on numbers of the caller.
ON_A_GPU = {
    "pythae": recipes.pythae,
    "pytorch_vae": recipes.pytorch_vae,
    "alibi_detect": recipes.alibi_detect,
    "dan": lambda x, y: recipes.dan(x, y),
    "deepda": recipes.deepda,
    "pytorch_adapt": lambda x, y: recipes.pytorch_adapt(x, y, kernel_scales=on_meta(3), mmd_type="quadratic"),
    "trvae": lambda x, y: recipes.trvae(x, on_meta(9, dtype=torch.int64), num_groups=4),
    "trvae with a boundary": lambda x, y: recipes.trvae(x, on_meta(9, dtype=torch.int64), num_groups=4, boundary=2),
    "mmdagg": recipes.mmdagg,
    "mmdagg, U": lambda x, y: recipes.mmdagg(x, y, permutations_same_sample_size=True),
    "mmdfuse": recipes.mmdfuse,
}


@pytest.mark.parametrize("recipe", ON_A_GPU)
def test_nothing_is_read_of_a_gpu_or_copied_to_it(recipe):
    """Tensors on "meta" have no values, and an operation that reads them raises."""
    for _ in range(2):
        with Copies() as copies:
            ON_A_GPU[recipe](on_meta(9, 3), on_meta(9, 3))
    assert not copies.found


def test_kid_copies_its_subsets_to_a_gpu_at_once():
    with Copies() as copies:
        recipes.kid(on_meta(9, 3), on_meta(9, 3), subsets=5, subset_size=4)
    assert copies.found == ["aten::_to_copy"]


@pytest.mark.slow
def test_compile():
    x, y = samples(dtype=torch.float32)
    labels = LABELS.to(DEVICE)
    losses = [case[0] for case in CASES if not case[2]] + [
        lambda x, y: recipes.dan(x, y, linear=True),
        lambda x, y: recipes.trvae(torch.cat([x, y])[:9], labels, num_groups=6),
        lambda x, y: recipes.trvae(x + 0 * y, labels, num_groups=6, boundary=2),
        lambda x, y: recipes.kid(x, y, subsets=None).mean,
        lambda x, y: recipes.mmdagg(x, y, bandwidths=(1.0, 2.0)),
        lambda x, y: recipes.mmdfuse(x, y, bandwidths=(1.0, 2.0)),
        recipes.mmdfuse,
    ]
    for loss in losses:
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, e in zip(value_and_gradients(compiled, x, y), value_and_gradients(loss, x, y), strict=True):
            # Both are rounded relative to the largest of the gradient.
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6 * max(1, float(e.abs().max())))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, y: recipes.pythae(x, y[:5]), "same number of rows for this recipe, got 9 and 5"),
        (lambda x, y: recipes.pythae(x, y, kernel_choice="linear"), "kernel_choice must be one of 'imq', 'rbf', got 'linear'"),
        (lambda x, y: recipes.pythae(x, y, scales=()), "scales must hold at least one value"),
        (lambda x, y: recipes.wae(x, y, pz_scale=0), "pz_scale must be greater than 0, got 0"),
        (lambda x, y: recipes.pytorch_vae(x[:1], y[:1]), "x must have at least two rows"),
        (lambda x, y: recipes.pytorch_vae(x, y, model="vae"), "model must be one of 'info_vae', 'wae_mmd', got 'vae'"),
        (lambda x, y: recipes.geomloss(x, y, loss="sinkhorn"), "loss must be one of 'gaussian', 'laplacian', 'energy', got 'sinkhorn'"),
        (lambda x, y: recipes.alibi_detect(x, y, sigma="max"), "sigma must be one of 'median', 'mean', got 'max'"),
        (lambda x, y: recipes.alibi_detect(x, y, sigma=-1), "^sigma must be greater than 0, got -1"),
        (lambda x, y: recipes.pytorch_adapt(x, y, mmd_type="cubic"), "mmd_type must be one of 'linear', 'quadratic', got 'cubic'"),
        (
            lambda x, y: recipes.trvae(x, torch.tensor([0, 1] * 4 + [0]), boundary=2),
            "boundary must be less than the number of groups, 2, got 2",
        ),
        (lambda x, y: recipes.kid(x, y), "x must have at least subset_size = 1000 rows, got 9: pass subsets=None"),
        (lambda x, y: recipes.mmdagg(x, y, kernel="laplace"), "kernel must use the Euclidean distance, .* got 'laplace' of the L1 norm"),
        (lambda x, y: recipes.mmdfuse(x, y, kernels="matern_1.5_l2"), "kernel must be one of .* got 'matern_1.5_l2'"),
    ],
)
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(*(t.cpu() for t in samples()))


@pytest.mark.parametrize("rows", [(1, 9), (9, 1), (1, 1), (9, 8)])
@pytest.mark.parametrize("name", sorted({*recipes.__all__} - {"KID", "imm", "irdm", "lejepa", "trvae"}))
def test_a_sentence_names_no_argument_that_is_not_there(name, rows):
    recipe = getattr(recipes, name)
    arguments = inspect.signature(recipe).parameters
    options = {key: value for key, value in {"biased": False, "mmd_type": "linear", "subsets": None}.items() if key in arguments}
    x, y = (t.cpu()[:n] for t, n in zip(samples(), rows, strict=True))
    try:
        recipe(x, y, **options)
    except ValueError as error:
        assert set(re.findall(r"(\w+)\s?=", str(error))) <= arguments.keys(), error  # noqa: PT017


@pytest.mark.parametrize("normalize", ["stop_gradient", None])
def test_irdm(normalize):
    """Two encoders. The fit in numpy, as rdm/compare writes it, and the gradient of a generator through both."""
    h, ridge = 1.4, 1e-6
    embeddings = [samples(n=12, m=60, d=d) for d in (3, 5)]
    means, bundles = [], []

    def k(a, b):
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2.0 * a @ b.T
        return np.exp(-np.maximum(squares, 0.0) / (2.0 * h * h))

    for _, pool in embeddings:
        landmarks = pool[:7] + 0.1
        means.append(fastvae.KernelMean.fit(pool, landmarks=landmarks, bandwidth=h))
        z, r = landmarks.cpu().numpy(), pool.cpu().numpy()
        alpha = np.linalg.solve(k(z, z) + ridge * np.eye(len(z)), k(z, r).mean(1))
        bundles.append((z, alpha, k(r, r).mean()))
    weights = (1.0, 2.5)
    value, gradient, scales = 0.0, [], []
    for (x, _), (z, alpha, k_rr), weight in zip(embeddings, bundles, weights, strict=True):
        g = x.cpu().numpy()
        raw = k(g, g).mean() - 2.0 * (k(g, z) @ alpha).mean() + k_rr
        scales.append(weight / (abs(raw) + 1e-7) if normalize else weight)
        value += scales[-1] * raw
        own, other = k(g, g)[:, :, None] * (g[:, None] - g), k(g, z)[:, :, None] * (g[:, None] - z) * alpha[:, None]
        gradient.append(scales[-1] * 2.0 / h**2 * (other.sum(1) / len(g) - own.sum(1) / len(g) ** 2))
    xs = [x.requires_grad_() for x, _ in embeddings]
    actual = recipes.irdm(xs, means, weights=weights, normalize=normalize)
    torch.testing.assert_close(actual.detach().cpu(), torch.tensor(value), rtol=1e-9, atol=0)
    for found, exact in zip(torch.autograd.grad(actual, xs), gradient, strict=True):
        torch.testing.assert_close(found.cpu(), torch.from_numpy(exact), rtol=1e-8, atol=1e-12)
    one = recipes.irdm(xs[0].detach(), means[0], normalize=None)
    assert one == fastvae.mmd(xs[0].detach(), means[0])


@pytest.mark.parametrize(
    ("name", "option"), [("mmd_gan", "sigma_list"), ("stable_audio", "bandwidth"), ("eb_jepa", "slices"), ("kid", "h")]
)
def test_an_unknown_option_is_named_with_the_recipe(name, option):
    x, y = samples()
    with pytest.raises(TypeError, match=rf"recipes.{name} has no argument '{option}': it takes .*precision, backend"):
        getattr(recipes, name)(x, y, **{option: 1.0})


def test_errors_of_irdm():
    x, y = samples()
    mean = fastvae.KernelMean.fit(y, landmarks=y[:3], bandwidth=1.0)
    with pytest.raises(ValueError, match="reference must hold one KernelMean for each x, 2, got 1"):
        recipes.irdm([x, x], mean)
    with pytest.raises(ValueError, match="weights must hold one number for each x, 1, got 2"):
        recipes.irdm(x, mean, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="normalize must be one of 'stop_gradient', None, False, got True"):
        recipes.irdm(x, mean, normalize=True)
    assert recipes.irdm(x, mean, normalize=False) == recipes.irdm(x, mean, normalize=None)
    assert recipes.irdm([x, x], [mean, mean], weights=2.0) == recipes.irdm([x, x], [mean, mean], weights=[2.0, 2.0])
    with pytest.raises(TypeError, match="reference must be a KernelMean or several, got Tensor"):
        recipes.irdm(x, y)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got float"):
        recipes.irdm(1.0, mean)
    with pytest.raises(ValueError, match="x must hold at least one sample, got none"):
        recipes.irdm([], [])
    with pytest.raises(ValueError, match="weights must hold at least one value, got none"):
        recipes.irdm(x, mean, weights=[])
    assert recipes.irdm(x, mean, weights=2.0) == recipes.irdm(x, mean, weights=[2.0])


@pytest.mark.parametrize("weights", [None, (0.3, 1.7, 0.0)])
def test_imm(weights):
    """In numpy as IMMLoss writes it, on latents (groups, rows, channels, height, width), and the gradient to the outputs."""
    f = np.random.default_rng(2).normal(size=(2, 3, 4, 2, 3, 2)) + 50.0
    running, stop = f.reshape(2, 3, 4, 12)
    w = np.array([2.0, 9.0, 40.0])
    d = np.shape(running)[-1]

    def distance(a, b):
        return np.sqrt(((a[:, :, None] - b[:, None]) ** 2).sum(-1)).clip(1e-8)

    def k(a, b):
        return np.exp(-w[:, None, None] * distance(a, b) / d)

    c = np.ones(3) if weights is None else np.array(weights)
    value = ((k(running, running) + k(stop, stop) - 2 * k(running, stop)).mean((1, 2)) * c).mean()
    gradient = np.zeros_like(running)
    for other, sign in ((running, 1), (stop, -1)):
        slope = -(w / d * c)[:, None, None] * k(running, other) / distance(running, other)
        gradient += sign * 2 / 16 / 3 * (slope[..., None] * (running[:, :, None] - other[:, None])).sum(2)
    x, y = (torch.from_numpy(t).to(DEVICE).requires_grad_() for t in f)
    c = None if weights is None else torch.tensor(weights, device=DEVICE)
    actual = recipes.imm(x, y, torch.from_numpy(w).to(DEVICE), weights=c)
    actual.backward()
    # Their lower bound of 1e-8 on a distance is not reproduced.
    assert actual.item() == pytest.approx(value, rel=1e-12, abs=1e-8 * w.max() / d)
    torch.testing.assert_close(x.grad.flatten(2).cpu(), torch.from_numpy(gradient), rtol=1e-6, atol=1e-9)
    assert y.grad is None


def test_errors_of_imm():
    x, w = torch.randn(3, 4, 2), torch.ones(3)
    for arguments, options, sentence in (
        ((x[0], x[0], w), {}, r"x must have shape \(groups, rows, \.\.\.\), got \(4, 2\)"),
        ((x, x, w[:2]), {}, r"kernel_weights must have one value for each group of x, shape \(3,\), got \(2,\)"),
        ((x, x, 0 * w), {}, "kernel_weights must be greater than 0, got 0"),
        ((x, x, w), {"weights": w * torch.nan}, "weights must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            recipes.imm(*arguments, **options)


def test_errors_of_types():
    x, y = samples()
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        recipes.info_vae(x.tolist(), y)
    with pytest.raises(TypeError, match="groups must hold integers"):
        recipes.trvae(x, torch.ones(9, 2, dtype=torch.float64, device=DEVICE))


def test_every_recipe_is_public_and_has_its_place_in_the_docs():
    page = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
    for name in set(recipes.__all__) - {"KID"}:
        assert f"recipes.{name}(" in page, name
        assert "Source: " in getattr(recipes, name).__doc__, name
