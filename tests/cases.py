"""One table of MMD problems for every backend, and the tolerances they are held to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae import reference
from fastvae.checks import triton_interpreter
from fastvae.kernel_sums import EXPONENT_ERROR
from fastvae.radial import KERNELS, RBF, Kernel, Polynomial, RationalQuadratic, Riesz

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = DEVICE == "cuda" or triton_interpreter()
# The dtypes of labels.
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
# Functions of the distance, with a slope at zero.
DISTANCE_KERNELS = [name for name, kernel in KERNELS.items() if kernel.takes_distance]
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason='tests backend="cpu" on the tensors of the other backends, which are on a GPU here')
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton: its interpreter, or a CUDA device")


@dataclass(frozen=True)
class Case:
    """n rows x ~ N(offset, I) and m rows y ~ N(offset + 0.3, 1.2²·I), of d features."""

    name: str
    n: int = 70
    m: int = 50
    d: int = 5
    bandwidth: tuple[float, ...] = (2.0,)
    bandwidth_weights: tuple[float, ...] | None = None
    estimator: str = "biased"
    weighted: bool = False
    offset: float = 0.0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    kernel: Kernel = RBF()  # noqa: RUF009, frozen

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that this case applies to: `mmd_to_normal` has the RBF kernel only, and N(0, I) is at the origin."""
        return ("mmd",) if self.offset or self.kernel != RBF() else ("mmd", "mmd_to_normal")

    def points(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.n, self.d, dtype=torch.float64, generator=generator) + self.offset
        y = 1.2 * torch.randn(self.m, self.d, dtype=torch.float64, generator=generator) + self.offset + 0.3
        return tuple(self._lay_out(t.to(self.dtype)).to(DEVICE) for t in (x, y))

    def _lay_out(self, t: Tensor) -> Tensor:
        if self.layout == "transposed":
            return t.T.contiguous().T
        if self.layout == "sliced":
            return torch.stack([t, -t], 2)[:, :, 0]
        if self.layout == "expanded":
            return t[:1].expand_as(t)
        return t

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.weighted:
            return {}
        generator = torch.Generator().manual_seed(2)
        p, q = (torch.rand(rows, dtype=torch.float64, generator=generator) for rows in (self.n, self.m))
        p[0] = 0
        return {"x_weights": (p / p.sum()).to(DEVICE, dtype), "y_weights": (q / q.sum()).to(DEVICE, dtype)}

    @property
    def options(self) -> dict[str, object]:
        return {
            "bandwidth": self.bandwidth,
            "bandwidth_weights": self.bandwidth_weights,
            "estimator": self.estimator,
            "kernel": self.kernel,
        }

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _cases() -> list[Case]:
    ladder = (1.0, 2**0.5, 2.0, 2 * 2**0.5, 4.0)
    base = [
        Case("one bandwidth"),
        Case("unbiased", estimator="unbiased"),
        Case("one row each", n=1, m=1),
        Case("one row against many", n=1, m=70),
        Case("two rows, unbiased", n=2, m=2, estimator="unbiased"),
        Case("whole tiles", n=128, m=64, d=16),
        Case("one past a tile", n=129, m=65, d=17),
        Case("one feature", d=1),
        Case("features past a block", n=20, m=30, d=130, bandwidth=(11.0,)),
        Case("ladder by squaring", bandwidth=ladder),
        Case("ladder by fourth powers", bandwidth=(1.0, 2.0, 4.0)),
        Case("unrelated bandwidths", bandwidth=(0.7, 1.9, 3.1)),
        Case("from narrow to wide", bandwidth=(0.05, 1.0, 30.0)),
        Case("equal bandwidths", bandwidth=(2.0, 2.0)),
        Case("weighted bandwidths", bandwidth=ladder, bandwidth_weights=(0.1, 0.2, 0.3, 0.4, -0.5)),
        Case("one weighted bandwidth", bandwidth_weights=(3.0,)),
        Case("sample weights", weighted=True),
        Case("sample weights, ladder, unbiased", weighted=True, bandwidth=ladder, estimator="unbiased"),
        Case("narrow", bandwidth=(0.01,)),
        Case("wide", bandwidth=(20.0,)),
        Case("far from the origin", offset=1000.0),
        Case("transposed", layout="transposed"),
        Case("sliced", layout="sliced"),
        Case("expanded", layout="expanded"),
    ]
    return base + [replace(case, name=f"{case.name}, float64", dtype=torch.float64) for case in base]


def _kernel_cases() -> list[Case]:
    others = RationalQuadratic(0.5), RationalQuadratic(2.3), Riesz(0.5), Polynomial(degree=1), Polynomial(2, coef0=0.5)
    kernels = [*list(KERNELS.values())[1:], *others]
    cases, seen = [], set()
    for kernel in kernels:
        base = [
            Case(""),
            Case("unbiased", estimator="unbiased"),
            Case("set, weights", bandwidth=(0.7, 1.9, 3.1), bandwidth_weights=(0.5, 2.0, 1.0), weighted=True, estimator="unbiased"),
            Case("set, biased", bandwidth=(1.0, 2.0), weighted=True),
            Case("wide", bandwidth=(20.0,)),
            Case("one row each", n=1, m=1),
            Case("past a tile", n=129, m=65, d=17, bandwidth=(4.0,)),
            Case("duplicates", layout="expanded"),
        ]
        if kernel.radial:
            base += [Case("far from the origin", offset=1000.0), Case("narrow", bandwidth=(0.05,))]
        # The sweeps tell kernels apart by these alone: of others that share them, what depends on φ itself.
        properties = kernel.radial, kernel.takes_distance
        if properties in seen:
            base = [case for case in base if case.name in ("", "set, weights", "wide", "narrow", "duplicates")]
        seen.add(properties)
        cases += [replace(case, name=f"{kernel} {case.name}", kernel=kernel) for case in base]
    # In float64 not what the RBF kernel shows for all.
    exact = [case for case in cases if not case.name.endswith((" unbiased", " set, biased", " wide", " one row each", " duplicates"))]
    return cases + [replace(case, name=f"{case.name}, float64", dtype=torch.float64) for case in exact]


CASES = _cases()
KERNEL_CASES = _kernel_cases()
STREAMING_CASES = [
    *CASES,
    *KERNEL_CASES,
    Case("several tiles", n=1100, m=700, d=3),
    # With one thread, the only products of oneDNN.
    Case("tiles of 512 rows", n=1024, m=1024, d=3),
    Case("several tiles, unbiased ladder", n=1100, m=700, d=3, bandwidth=(1.0, 2**0.5, 2.0), estimator="unbiased", weighted=True),
    Case("several tiles, wide", n=600, m=1100, d=3, bandwidth=(20.0,)),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
]


def without_few_pairs(monkeypatch) -> None:
    """Makes the Triton sweeps take problems of any size, which they otherwise leave to the kernel for few pairs."""
    from fastvae.kernels import few_pairs

    monkeypatch.setattr(few_pairs, "_MOST_WORK", 0)
    monkeypatch.setattr(few_pairs, "_MOST_WORK_OF_A_GRAPH", 0)


def problems(cases: list[Case]) -> list:
    """(case, function) for every function that a case applies to."""
    return [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in case.functions]


# Relative errors of the value and of the gradient, and the absolute error of one k, which is that of its exponent: some tens of rounding
# errors of the dtype, or of the products (2⁻¹⁷ for split bfloat16, 2⁻¹¹ for TF32, 2⁻⁸ for bfloat16). In a mean over the pairs of n rows the
# errors of k average out as 1/n.
TOLERANCE = {
    torch.float64: (1e-9, 1e-8, 1e-13),
    torch.float32: (1e-5, 2e-5, 2e-6),
}
TRITON_TOLERANCE = {
    "highest": (1e-5, 1e-4, 2e-5),
    "ieee": (1e-5, 2e-5, 4e-6),
    "high": (1e-3, 5e-3, 1e-3),
    "medium": (1e-2, 5e-2, 1e-2),
}


def assert_close(actual, expected, tolerance: tuple[float, float, float], n: int, size: float = 1.0) -> None:
    """Compares (value, gradients …) with those in float64, for samples of at least n rows; `size` is Σ_b |a_b|."""
    value_rtol, grad_rtol, pair_error = tolerance
    error, absolute = abs(actual[0].double() - expected[0]).item(), pair_error * size / n
    assert error <= value_rtol * abs(expected[0].item()) + absolute, f"value off by {error:.1e} of {expected[0].item():.6g}"
    for a, e in zip(actual[1:], expected[1:], strict=True):
        error, norm = (a.double() - e).norm().item(), e.norm().item()
        assert error <= grad_rtol * norm + absolute, f"gradient off by {error:.1e} of {norm:.1e}"


def gradcheck(function, points, backend: str | None) -> bool:
    """PyTorch's, of the whole Jacobian; in Triton's interpreter, which is slow, along random directions."""
    return torch.autograd.gradcheck(function, points, fast_mode=backend == "triton" and DEVICE == "cpu")


def evaluate(function, *points: Tensor, **options):
    """Value and gradients to the points."""
    points = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in points)
    value = function(*points, **options)
    return value.detach(), *torch.autograd.grad(value, points)


class Copies(TorchDispatchMode):
    """Records the names of operations that copy between devices. "meta" stands for a GPU; a scalar is an argument of its kernels."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if func.namespace == "aten" and len({t.device for t in tensors if t.ndim}) > 1:
            self.found.append(func._schema.name)
        return result


@contextlib.contextmanager
def one_thread():
    """Runs with one thread, as the size of tiles on a CPU depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(function, inputs) -> int:
    """The most bytes of tensors that are alive at one time, with one thread, from the allocator's calls in PyTorch's profiler."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    with one_thread(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(function(*leaves), leaves)
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def expected(case: Case, name: str, *points: Tensor):
    """The dense reference in float64, for the numbers as rounded to the case's dtype."""
    weights = {k: w.double() for k, w in case.weights(case.accumulation_dtype).items() if name == "mmd" or k == "x_weights"}
    return evaluate(getattr(reference, name), *(t.double() for t in points), **case.options, **weights)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# How many rounding errors of the worst kind a sum over the pairs of a few rows may have in total, and how many each feature adds.
ROUNDINGS, ROUNDINGS_PER_FEATURE = 32, 2


@dataclass(frozen=True)
class PairErrors:
    """Bounds on the rounding error of one pair's Σ_b a_b·k_b, and of each feature of its gradient to one of the two rows.

    R is the radius of the data about their centre, s_b = γ_b·R², and e the eps of the arithmetic: that of float64 where float32 would leave
    more than `EXPONENT_ERROR` in an exponent.

        exponent   e·s_b by products, at most `EXPONENT_ERROR`; e·√s_b by differences, as rows are accurate to e·R
        value      the error of the exponent, and e·k, or e·(k − 1), so e·min(1, s_b), where all k are near one
        gradient   γ_b·d·φ' ≤ √γ_b·min(1, √s_b) has the relative error of the exponent; its sum has an error of e·R for each row
        distance   a function of u = d/h has the error of u: e·R/h, or e·R²/(d·h) by products, which are used where d > 2⁷·√e·R;
                   the direction has e·R/d, or e·R²/d² by products
        x·y        φ is a polynomial of |t| ≤ T = γ_b·max‖x‖²: e·T·φ'(T), and e·φ(T) for its constant
        reference  float64's rounding of k
        denormal   numbers have the absolute error of the least one

    Attributes:
        value: scalar.
        gradient: (N, N) over all rows of all samples.
        least: the share of denormal numbers in each.
    """

    value: float
    gradient: Tensor
    least: float

    @staticmethod
    def of(
        kernel: Kernel,
        bandwidth,
        weights,
        samples: list[Tensor],
        *,
        shifted: bool,
        prior: bool = False,
        rounded_weights: bool = False,
        repeated: list[Tensor] | None = None,
    ) -> PairErrors:
        """Bounds for an operation on these samples.

        Args:
            shifted: it sums k − φ(0) where k is near φ(0).
            prior: one of the samples is N(0, I).
            rounded_weights: the samples have weights, rounded to the accumulation dtype.
            repeated: the samples as the operation is given them, with some rows twice.
        """
        dtype = accumulation(samples[0].dtype)
        eps, exact = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
        least = torch.finfo(dtype).smallest_normal * eps
        samples = [t.detach().cpu().double() for t in samples]
        rows = torch.cat(samples)
        dim = rows.shape[1]
        roundings = ROUNDINGS + ROUNDINGS_PER_FEATURE * dim
        h = torch.tensor(bandwidth, dtype=torch.float64)
        a = torch.ones_like(h) if weights is None else torch.tensor(weights, dtype=torch.float64).abs()
        gamma = kernel.gamma(h, dim)
        underflow = roundings * least * (1 + float(a @ gamma))
        from_origin = rows.square().sum(1).max() + (dim if prior else 0)
        gradient = rows.new_zeros(len(rows), len(rows))
        if not kernel.radial:
            t = gamma * from_origin
            dphi = kernel.derivatives(t)[0]
            value = eps * t * dphi + (exact if shifted else eps) * kernel.phi(t)
            gradient_error = eps * gamma * from_origin.sqrt() * dphi * kernel.degree + gamma * least
            return PairErrors(roundings * float(a @ value), gradient + roundings * float(a @ gradient_error), underflow)

        # Few rows are seen from their mean, others from the mean of the samples' means.
        given = samples if repeated is None else [t.detach().cpu().double() for t in repeated]
        centres = torch.cat(given).mean(0), torch.stack([t.mean(0) for t in given]).mean(0)
        radii2 = [(rows - centre).square().sum(1).max() for centre in centres]
        radius2 = max(radii2)
        if kernel.takes_distance:
            radius, distance = radius2.sqrt(), torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
            by_products = distance > 2**7 * exact**0.5 * radius
            u = radius / h
            # In the dtype of the samples, down to this share of the radius; nearer rows in float64.
            share = torch.clamp(distance / radius, min=2**-3)
            value = eps * (8 * u + 1) + exact**0.5 * 2**-10 * u
            direction = exact * radius / distance + torch.where(by_products, exact * radius2 / distance.square(), 0)
            direction = (roundings * (direction + eps / share.square())).clamp(max=2).where(distance > 0, 0) + 4 * eps
            # Unless it is unbounded, the slope at distance zero times the rounding of a difference of rows.
            at_zero = 0.0 if kernel.takes_distance else 4 * exact * float(a @ (u / h))
            # A Riesz kernel is a power of u.
            steep = kernel.r * u ** (kernel.r - 1) if isinstance(kernel, Riesz) else torch.ones_like(u)
            return PairErrors(roundings * float(a @ (steep * value)), direction * float(a @ (steep / h)) + at_zero, underflow)

        limit = EXPONENT_ERROR[dtype]
        within = [r2 for r2 in radii2 if gamma.max() * r2 * eps <= 1.01 * limit]
        eps_of_pairs, radius2 = (eps, max(within)) if within else (exact, 4 * radius2)
        s = gamma * radius2
        coarse = eps if prior or rounded_weights else eps_of_pairs
        near_one = torch.minimum(torch.ones_like(s), gamma * from_origin if prior else s) if shifted else torch.ones_like(s)
        exponent = (eps_of_pairs * s).clamp(max=limit) + eps_of_pairs * s.sqrt()
        value = exponent + coarse * near_one + exact
        root = s.sqrt() if not prior else (gamma * from_origin).sqrt()
        gradient_error = gamma.sqrt() * (root.clamp(max=1) * (exponent + coarse) + eps_of_pairs * s.sqrt())
        gradient_error = gradient_error + gamma * least
        return PairErrors(roundings * float(a @ value), gradient + roundings * float(a @ gradient_error), underflow)


def output_rounding(dtype: torch.dtype, expected: Tensor) -> Tensor:
    """The rounding error of a result in `dtype`, a product of a few factors, which may be infinite if it exceeds the largest number."""
    info, size = torch.finfo(dtype), expected.abs()
    rounding = (info.eps + 8 * torch.finfo(accumulation(dtype)).eps) * size + 8 * info.smallest_normal * info.eps
    return torch.where(size >= info.max, torch.inf, rounding)
