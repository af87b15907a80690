"""The steps that `benchmarks.gpu` times: those of `fastvae` and of what its users would write or install instead.

If a step fails, for example because a peer is not installed or eager code runs out of memory, its row says why.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastvae
from benchmarks import eager
from benchmarks.measure import Time, in_turn, peak_extra_mib, summaries, summary, synchronize
from benchmarks.providers import GeomLoss, eager_reparameterize_kl, eager_reparameterize_kl_moments, keops, matrix
from benchmarks.small import batched_matrix, kernel_operations
from benchmarks.training import PlainVAE, loss_of, plain_mmd_vae, plain_vae, training_step
from fastvae import reference

# A dry run chooses the interpreter before Triton is imported.
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
BACKEND = "triton" if DRY else None
DIRECTION = "forward+backward"

Row = dict[str, Any]
Step = Callable[[], Any]
Steps = dict[str, Step]
Size = tuple[int, int]
TINY = 20, 4


class Case(NamedTuple):
    """A call that returns rows."""

    function: Callable[..., list[Row]]
    arguments: tuple[Any, ...]

    def rows(self) -> list[Row]:
        return self.function(*self.arguments)

    def failed(self, error: Exception) -> Row:
        return {"case": self.function.__name__, "arguments": self.arguments, "status": f"{type(error).__name__}: {str(error)[:120]}"}


def cases(function: Callable[..., list[Row]], *sizes: Size) -> list[Case]:
    return [Case(function, size) for size in sizes]


def points(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two samples: the same numbers in each dtype."""
    x, y = torch.randn(2, n, d, device=DEVICE).to(dtype)
    return x, y


def with_gradient(function: Callable[..., Any], *inputs: Tensor, grads: Tensor | tuple[Tensor, ...] | None = None) -> Step:
    leaves = [t.clone().requires_grad_() for t in inputs]

    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        results = function(*leaves)
        torch.autograd.backward(results, grads)
        return [t.detach() for t in (results if isinstance(results, tuple) else (results,))] + [leaf.grad for leaf in leaves]  # type: ignore[misc]

    return step


def in_tf32(step: Step) -> Step:
    def with_switch() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return with_switch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Without this, torch.compile falls back to eager at the ninth size of a function.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def graph_of(step: Step) -> Step:
    """A CUDA graph of the step, as a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def warm(step: Step) -> Step:
    start = time.perf_counter()
    step()
    synchronize(DEVICE)
    if time.perf_counter() - start < 0.5:
        step()
    return step


def timed_rows(steps: Steps, graphs: bool = True, memory: bool = False, rounds: int = 50, **case: Any) -> list[Row]:
    """A row for each step and one for its CUDA graph, all timed in turn; `case` holds the fields that all rows share."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    rows: list[Row] = []
    alive: dict[str, Step] = {}
    peaks: dict[str, float | None] = {}
    for name, step in steps.items():
        makers: dict[str, Callable[[Step], Step]] = {name: warm}
        if graphs and DEVICE == "cuda":
            makers[f"{name}, CUDA graph"] = graph_of
        for maker_name, maker in makers.items():
            try:
                alive[maker_name] = maker(step)
                if memory:
                    peaks[maker_name] = peak_extra_mib(step, DEVICE)
            except Exception as error:  # noqa: PERF203
                rows.append({**case, "provider": maker_name, "status": f"{type(error).__name__}: {str(error)[:120]}"})
                break
    for name, found in summaries(alive, DEVICE, 1 if DRY else rounds, 2.0).items():
        peak = {"peak_mib": peaks[name]} if name in peaks else {}
        rows.append({**case, "provider": name, "status": "ok", **found, **peak})
    return rows


# MMD


def mmd(x: Tensor, y: Tensor, h: float, precision: str | None = None) -> Tensor:
    return fastvae.mmd(x, y, bandwidth=h, precision=precision, backend=BACKEND)


def to_normal(x: Tensor, y: Tensor, h: float) -> Tensor:
    return fastvae.mmd_to_normal(x, bandwidth=h, backend=BACKEND)


def eager_mmd(x: Tensor, y: Tensor, h: float) -> Tensor:
    return matrix(x, y, (h,))


def checkpointed_mmd(x: Tensor, y: Tensor, h: float) -> Tensor:
    """What users write where an N×N array does not fit: blocks of rows whose kernels are computed again in backward."""

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        squared = rows.square().sum(1)[:, None] + columns.square().sum(1)[None, :] - 2 * rows @ columns.T
        return torch.exp(squared / (-2 * h * h)).sum()

    def mean(a: Tensor, b: Tensor) -> Tensor:
        blocks = a.split(max(1, 2**28 // len(b)))
        return torch.stack([checkpoint(block, rows, b, use_reentrant=False) for rows in blocks]).sum() / (len(a) * len(b))  # type: ignore[misc]

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def jax_mmd(x: Tensor, y: Tensor, h: float) -> Step:
    """A step under `jax.jit`, with products in float32."""

    @functools.cache
    def ready() -> tuple[Any, Any, Any]:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if DEVICE == "cuda" and jax.default_backend() != "gpu":
            raise RuntimeError("jax is installed without a GPU")

        def mean_kernel(a: Any, b: Any) -> Any:
            squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * jax.numpy.matmul(a, b.T, precision="highest")
            return jax.numpy.exp(squared / (-2 * h * h)).mean()

        function = jax.jit(jax.value_and_grad(lambda x, y: mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)))
        return function, jax.numpy.asarray(x.cpu().numpy()), jax.numpy.asarray(y.cpu().numpy())

    def step() -> None:
        function, *samples = ready()
        for result in function(*samples):
            result.block_until_ready()

    return step


def mmd_steps(x: Tensor, y: Tensor, functions: dict[str, Callable[..., Tensor]]) -> Steps:
    h = x.shape[1] ** 0.5
    return {name: with_gradient(lambda x, f=f: f(x, y, h), x) for name, f in functions.items()}


def all_mmd_steps(x: Tensor, y: Tensor) -> Steps:
    functions = {
        "fastvae": mmd,
        "fastvae, closed-form prior": to_normal,
        "fastvae, tf32": functools.partial(mmd, precision="high"),
        "eager": eager_mmd,
    }
    steps = mmd_steps(x, y, functions)
    return steps | {"eager, tf32": in_tf32(steps["eager"])}


def small_mmd(n: int, d: int) -> list[Row]:
    """Batch sizes that people train with."""
    x, y = points(n, d)
    steps = all_mmd_steps(x, y)
    if not DRY:
        steps |= mmd_steps(x, y, {"torch.compile": compiled(eager_mmd)})
    return timed_rows(steps, operation="mmd", direction=DIRECTION, n=n, d=d)


def large_mmd(n: int, d: int) -> list[Row]:
    x, y = points(n, d)
    steps = all_mmd_steps(x, y) | mmd_steps(x, y, {"eager, checkpointed": checkpointed_mmd})
    if n > 65_536:
        steps = {name: steps[name] for name in ("fastvae", "fastvae, closed-form prior")}
    case = {"graphs": False, "rounds": 20 if n <= 65_536 else 3, "operation": "mmd", "n": n, "d": d}
    value = timed_rows({"fastvae": lambda: mmd(x, y, d**0.5)}, direction="forward", **case)
    return value + timed_rows(steps, memory=True, direction=DIRECTION, **case)


def installed_peers(n: int, d: int) -> list[Row]:
    """Few cases, as KeOps compiles for each number of features."""
    x, y = points(n, d)
    peers = {"KeOps": keops, "geomloss": GeomLoss({})}
    functions = {name: lambda x, y, h, compute=compute: compute(x, y, (h,)) for name, compute in peers.items()}
    steps = mmd_steps(x, y, {"fastvae": mmd, **functions}) | {"JAX": jax_mmd(x, y, d**0.5)}
    return timed_rows(steps, graphs=False, rounds=20, operation="mmd", direction=DIRECTION, n=n, d=d)


# The other operations


def kernel_operation(name: str, n: int, d: int, dtype: torch.dtype) -> Steps:
    """An operation of `benchmarks.small`."""
    found = kernel_operations()[name]
    x, *others = (t.to(DEVICE, dtype) for t in found.make_inputs(n, d))

    def step(provider: str, **options: Any) -> Step:
        def total(x: Tensor) -> Tensor:
            result = found.functions[provider](x, *others, **options)
            return result.sum() if result.ndim else result

        return with_gradient(total, x)

    return {"fastvae": step("fastvae", backend=BACKEND), "eager": step("eager")}


def mmd_of_four_rows(n: int, d: int, dtype: torch.dtype) -> Steps:
    """A batch of problems of 4 + 4 rows, n in each of the two samples."""
    x, y = (t.view(-1, 4, d) for t in points(n, d, dtype))
    return {
        "fastvae": with_gradient(lambda x: mmd(x, y, d**0.5).sum(), x),
        "eager": with_gradient(lambda x: batched_matrix(x, y, (d**0.5,)).sum(), x),
    }


def hessian_product(functions: dict[str, Callable[[Tensor, Tensor, float], Tensor]], n: int, d: int, dtype: torch.dtype) -> Steps:
    """The value, and the Hessian with respect to x times a direction."""
    (x, y), (direction, _) = points(n, d, dtype), points(n, d, dtype)

    def step(function: Callable[[Tensor, Tensor, float], Tensor]) -> Step:
        return lambda: torch.autograd.functional.vhp(lambda x: function(x, y, d**0.5), x, direction)

    return {name: step(function) for name, function in functions.items()}


def reparameterize_kl_moments(n: int, d: int, dtype: torch.dtype) -> Steps:
    """n images of 32×32 with d channels, in the channels_last format."""
    side = 4 if DRY else 32
    moments, eps = (t.view(n, side, side, -1).permute(0, 3, 1, 2) for t in points(n * side * side, 2 * d, dtype))
    eps = eps[:, :d].contiguous(memory_format=torch.channels_last)
    grads = torch.ones_like(eps), eps.new_ones(n)
    functions = {
        "fastvae": lambda moments: fastvae.reparameterize_kl_moments(moments, eps=eps, backend=BACKEND),
        "eager": lambda moments: eager_reparameterize_kl_moments(moments, eps),
    }
    return {name: with_gradient(f, moments, grads=grads) for name, f in functions.items()}


def reparameterize_kl(n: int, d: int, dtype: torch.dtype) -> Steps:
    mu, logvar = points(n, d, dtype)
    grads = torch.ones_like(mu), mu.new_ones(n)
    functions = {"fastvae": lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, backend=BACKEND), "eager": eager_reparameterize_kl}
    if not DRY:
        functions["torch.compile"] = compiled(eager_reparameterize_kl)
    steps = {name: with_gradient(f, mu, logvar, grads=grads) for name, f in functions.items()}
    # Forward reads mu and logvar and writes z; backward reads both and dz, and writes two gradients.
    source = torch.empty(4, n, d, device=DEVICE)
    target = torch.empty_like(source)
    return steps | {"copy of as many bytes": lambda: target.copy_(source)}


def kernel_matmul(n: int, d: int, dtype: torch.dtype) -> Steps:
    x, y = points(n, d, dtype)
    v, grad = points(n, 16, dtype)
    h = d**0.5
    functions = {
        "fastvae": lambda x: fastvae.kernel_matmul(x, y, v, bandwidth=h, backend=BACKEND),
        "eager": lambda x: eager.product("rbf", x, y, v, h, None),
    }
    return {name: with_gradient(f, x, grads=grad) for name, f in functions.items()}


def group_mmd(n: int, d: int, dtype: torch.dtype) -> Steps:
    z, _ = points(n, d, dtype)
    count, h = 3 if DRY else 16, d**0.5
    labels = torch.arange(n, device=DEVICE) % count
    shares = F.one_hot(labels, count).to(z)
    shares = shares / shares.sum(0)

    def plain(z: Tensor) -> Tensor:
        within = shares.T @ eager.kernel("rbf", z, z, h, eager.by_products) @ shares
        return (within.diagonal()[:, None] + within.diagonal()[None, :] - 2 * within).mean()

    def fused(z: Tensor) -> Tensor:
        return fastvae.group_mmd(z, labels, num_groups=count, bandwidth=h, backend=BACKEND).values.mean()

    return {"fastvae": with_gradient(fused, z), "eager": with_gradient(plain, z)}


def total_correlation(n: int, d: int, dtype: torch.dtype) -> Steps:
    z, mu = points(n, d, dtype)
    logvar = 0.1 * points(n, d, dtype)[0]

    def fused(*inputs: Tensor) -> Tensor:
        return sum(fastvae.total_correlation(*inputs, dataset_size=2_000_000, backend=BACKEND))  # type: ignore[return-value]

    def plain(*inputs: Tensor) -> Tensor:
        return sum(reference.total_correlation(*inputs, dataset_size=2_000_000))  # type: ignore[return-value]

    return {"fastvae": with_gradient(fused, z, mu, logvar), "eager": with_gradient(plain, z, mu, logvar)}


SIZES = (4096, 16), (128, 16), (65_536, 16), (4096, 64), (32, 16), (65_536, 64)
# Those of `benchmarks.small` that are timed here too.
KERNEL_OPERATIONS = (
    "ksd_to_normal, imq",
    "sigreg, 1024 slices",
    "log_kernel_density, rbf",
    "kernel_matmul, rbf, normalize=rows",
    "mmd, matern32",
    "mmd, energy",
    "mmd, riesz",
    "mmd, rbf + laplace",
    "mmd, to a KernelMean",
    "kernel_matmul, rbf, normalize=both",
)
# Makers of steps, and sizes, the most important first.
OPERATIONS: dict[str, tuple[Callable[[int, int, torch.dtype], Steps], tuple[Size, ...]]] = {
    **{name: (functools.partial(kernel_operation, name), SIZES) for name in KERNEL_OPERATIONS},
    "mmd of four rows": (mmd_of_four_rows, ((4096, 16), (4096, 4096), (65_536, 16))),
    "mmd, Hessian product": (functools.partial(hessian_product, {"fastvae": mmd, "eager": eager_mmd}), SIZES),
    "ksd_to_normal, Hessian product": (
        functools.partial(
            hessian_product,
            {
                "fastvae": lambda x, y, h: fastvae.ksd_to_normal(x, bandwidth=h, backend=BACKEND),
                "eager": lambda x, y, h: eager.ksd_to_normal("imq", x, [h]),
            },
        ),
        SIZES,
    ),
    "reparameterize_kl_moments": (reparameterize_kl_moments, ((64, 4), (512, 4))),
    "reparameterize_kl": (
        reparameterize_kl,
        ((128, 20), (262_144, 256), (4096, 64), (65_536, 64), (512, 20), (32, 16), (1_000_000, 64)),
    ),
    "kernel_matmul": (kernel_matmul, ((4096, 16), (128, 16), (65_536, 16), (1024, 16), (32, 16), (1_000_000, 16))),
    "total_correlation": (total_correlation, ((4096, 16), (128, 16), (65_536, 16), (1024, 16), (32, 16), (262_144, 16))),
    "group_mmd": (group_mmd, ((4096, 16), (128, 16), (65_536, 16), (1024, 16), (32, 16), (1_000_000, 16))),
}


def operation(name: str, n: int, d: int) -> list[Row]:
    # A small step waits for the host; its graph shows the time that the device takes.
    graphs = n <= 4096 or name == "reparameterize_kl"
    steps = OPERATIONS[name][0](n, d, torch.float32)
    return timed_rows(steps, graphs=graphs, memory=n > 4096, operation=name, direction=DIRECTION, n=n, d=d)


def operations(*places: int) -> list[Case]:
    """The sizes in these places."""
    found = [(name, sizes[place]) for place in places for name, (_, sizes) in OPERATIONS.items() if place < len(sizes)]
    return [Case(operation, (name, *size)) for name, size in found]


def speed() -> list[Case]:
    """The most important cases first."""
    if DRY:
        return [case for function in (small_mmd, large_mmd, installed_peers) for case in cases(function, TINY)] + [
            Case(operation, (name, *TINY)) for name in OPERATIONS
        ]
    return [
        *operations(0),
        *cases(small_mmd, (128, 16), (4096, 16)),
        *cases(large_mmd, (65_536, 16)),
        *operations(1, 2),
        *cases(small_mmd, (512, 16), (4096, 64), (32, 16), (1024, 16), (512, 64)),
        *cases(large_mmd, (65_536, 64), (1_000_000, 16)),
        *cases(installed_peers, (4096, 16), (65_536, 16)),
        *operations(3, 4, 5, 6),
        *cases(small_mmd, *((n, d) for n in (128, 1024, 32, 4096, 256, 2048, 64, 512) for d in (64, 2))),
        *cases(large_mmd, (65_536, 256), (65_536, 2), (65_536, 128), (262_144, 16), (262_144, 64)),
    ]


# Accuracy


def accuracy_of(name: str, n: int, d: int) -> list[Row]:
    """Relative errors of the value and of the gradients to eager code in float64."""
    results = []
    for provider, dtype in (("fastvae", torch.float32), ("eager", torch.float64)):
        torch.manual_seed(0)
        results.append(OPERATIONS[name][0](n, d, dtype)[provider]())
    value, *gradients = (((a.double() - e).norm() / e.norm()).item() for a, e in zip(*results, strict=True))
    return [{"operation": name, "n": n, "d": d, "precision": "highest", "value": value, "gradient": max(gradients)}]


def accuracy_of_operations() -> list[Case]:
    # Noise that a step draws differs from dtype to dtype.
    names = [name for name in OPERATIONS if name != "reparameterize_kl"]
    return [Case(accuracy_of, (name, *(TINY if DRY else OPERATIONS[name][1][0]))) for name in names]


# Training


def training_steps(name: str, n: int, compile: bool = False) -> list[Row]:
    """A step of Adam, with the batch on the device."""
    plain, objective = OBJECTIVES[name]
    x = torch.rand(n, 784, device=DEVICE)
    model = fastvae.VAE.mlp(784, latent_dim=20, likelihood="bernoulli")
    losses = {"fastvae": (model, loss_of(objective())), "eager": (PlainVAE(), plain)}
    steps = {provider: training_step(model, loss, x) for provider, (model, loss) in losses.items()}
    if compile:
        names = {"fastvae": "fastvae, torch.compile", "eager": "torch.compile"}
        steps = {names[provider]: training_step(model, compiled(loss), x) for provider, (model, loss) in losses.items()}
    return timed_rows(steps, operation="training step", objective=name, n=n, d=20)


OBJECTIVES = {"vae": (plain_vae, fastvae.VAEObjective.vae), "mmd_vae": (plain_mmd_vae, lambda: fastvae.VAEObjective.mmd_vae(1000.0))}


def training() -> list[Case]:
    if DRY:
        return [Case(training_steps, (name, 8)) for name in OBJECTIVES]
    found = [Case(training_steps, (name, n)) for n in (128, 8192) for name in OBJECTIVES]
    return found + [Case(training_steps, (name, 128, True)) for name in OBJECTIVES]


# The host


def host_times(n: int, d: int) -> list[Row]:
    """The time for which a small step keeps the host busy, and the kernels that it launches."""
    x, y = points(n, d)
    steps = mmd_steps(x, y, {"fastvae": mmd, "eager": eager_mmd})
    times: dict[str, list[Time]] = {name: [] for name in steps}
    for step in steps.values():
        warm(step)
    for name in in_turn(steps, 3 if DRY else 300, 60.0):
        synchronize(DEVICE)
        start = time.perf_counter(), time.process_time()
        steps[name]()
        times[name].append(Time(time.perf_counter() - start[0], time.process_time() - start[1]))
    rows = []
    for name, step in steps.items():
        found = summary(times[name], "cuda")
        case = {"operation": "mmd", "direction": DIRECTION, "n": n, "d": d, "provider": name}
        rows.append(case | {"host_ms": found.pop("median_ms"), **found, "launches": launches_of(step)})
    return rows


def host() -> list[Case]:
    return cases(host_times, TINY if DRY else (128, 16))


def launches_of(step: Step) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities + [torch.profiler.ProfilerActivity.CUDA] * (DEVICE == "cuda")) as profile:
        step()
        synchronize(DEVICE)
    return sum("LaunchKernel" in event.name for event in profile.events() or [])
