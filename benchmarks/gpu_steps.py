"""The steps that `benchmarks.gpu` times: those of `fastvae` and of what its users would write or install instead.

The most important sizes come first. If a step fails, for example because a peer is not installed, its row says why.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastvae
from benchmarks.measure import Time, in_turn, peak_extra_mib, summaries, summary, synchronize
from benchmarks.providers import GeomLoss, eager_reparameterize_kl, keops, matrix
from benchmarks.training import PlainVAE, plain_mmd_vae, plain_vae, training_step
from fastvae import reference

# A dry run chooses the interpreter before Triton is imported.
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
BACKEND = "triton" if DRY else None
DIRECTION = "forward+backward"

Row = dict[str, Any]
Step = Callable[[], Any]
Sizes = tuple[tuple[int, int], ...]


def sizes(*on_gpu: tuple[int, int]) -> Sizes:
    return ((20, 3),) if DRY else on_gpu


def points(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)


def fits(n: int, arrays: int) -> bool:
    """Whether so many arrays of N×N fit the free memory."""
    return DRY or 4 * n * n * arrays < torch.cuda.mem_get_info()[0]


def with_gradient(function: Callable[..., Any], *inputs: Tensor, grads: Tensor | tuple[Tensor, ...] | None = None) -> Step:
    leaves = [t.clone().requires_grad_() for t in inputs]

    def step() -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(function(*leaves), grads)
        return [leaf.grad for leaf in leaves]

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


def timed_rows(steps: dict[str, Step], graphs: bool = True, memory: bool = False, rounds: int = 50, **case: Any) -> list[Row]:
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


def mmd_steps(x: Tensor, y: Tensor, functions: dict[str, Callable[..., Tensor]]) -> dict[str, Step]:
    h = x.shape[1] ** 0.5
    return {name: with_gradient(lambda x, f=f: f(x, y, h), x) for name, f in functions.items()}


def all_mmd_steps(x: Tensor, y: Tensor) -> dict[str, Step]:
    functions = {
        "fastvae": mmd,
        "fastvae, closed-form prior": to_normal,
        "fastvae, tf32": functools.partial(mmd, precision="high"),
        "eager": eager_mmd,
    }
    steps = mmd_steps(x, y, functions)
    return steps | {"eager, tf32": in_tf32(steps["eager"])}


def small_mmd() -> Iterator[list[Row]]:
    """Batch sizes that people train with."""
    for n, d in sizes(*((n, d) for n in (128, 1024, 32, 4096, 256, 2048, 64, 512) for d in (16, 64, 2))):
        x, y = points(n, d)
        steps = all_mmd_steps(x, y)
        if not DRY:
            steps |= mmd_steps(x, y, {"torch.compile": compiled(eager_mmd)})
        yield timed_rows(steps, operation="mmd", direction=DIRECTION, n=n, d=d)


def large_mmd() -> Iterator[list[Row]]:
    for n, d in sizes((65_536, 64), (65_536, 16)):
        x, y = points(n, d)
        steps = all_mmd_steps(x, y) | mmd_steps(x, y, {"eager, checkpointed": checkpointed_mmd})
        if not fits(n, 4):
            steps = {name: step for name, step in steps.items() if name not in ("eager", "eager, tf32")}
        yield timed_rows(steps, memory=True, graphs=False, rounds=20, operation="mmd", direction=DIRECTION, n=n, d=d)
        yield value_of_mmd(x, y)
    for n, d in sizes((1_000_000, 16)):
        x, y = points(n, d)
        yield value_of_mmd(x, y)
        steps = mmd_steps(x, y, {"fastvae": mmd, "fastvae, closed-form prior": to_normal})
        yield timed_rows(steps, memory=True, graphs=False, rounds=3, operation="mmd", direction=DIRECTION, n=n, d=d)


def value_of_mmd(x: Tensor, y: Tensor) -> list[Row]:
    n, d = x.shape
    return timed_rows({"fastvae": lambda: mmd(x, y, d**0.5)}, graphs=False, rounds=20, operation="mmd", direction="forward", n=n, d=d)


def installed_peers() -> Iterator[list[Row]]:
    """Few cases, as KeOps compiles for each number of features."""
    for n, d in sizes((4096, 16), (65_536, 16)):
        x, y = points(n, d)
        peers = {"KeOps": keops, "geomloss": GeomLoss({})}
        functions = {name: lambda x, y, h, compute=compute: compute(x, y, (h,)) for name, compute in peers.items()}
        steps = mmd_steps(x, y, {"fastvae": mmd, **functions}) | {"JAX": jax_mmd(x, y, d**0.5)}
        yield timed_rows(steps, graphs=False, rounds=20, operation="mmd", direction=DIRECTION, n=n, d=d)


def other_mmd() -> Iterator[list[Row]]:
    for n, d in sizes((65_536, 256), (65_536, 2), (65_536, 128), (16_384, 64), (16_384, 16), (262_144, 64)):
        x, y = points(n, d)
        steps = mmd_steps(x, y, {"fastvae": mmd, "eager": eager_mmd} if n <= 16_384 else {"fastvae": mmd})
        yield timed_rows(steps, memory=True, graphs=False, rounds=20, operation="mmd", direction=DIRECTION, n=n, d=d)
    for n, d in sizes((262_144, 16)):
        x, y = points(n, d)
        steps = mmd_steps(x, y, {"fastvae": mmd, "eager, checkpointed": checkpointed_mmd})
        yield timed_rows(steps, memory=True, graphs=False, rounds=1, operation="mmd", direction=DIRECTION, n=n, d=d)


# The other operations


def reparameterize_kl(n: int, d: int) -> tuple[dict[str, Step], int]:
    mu, logvar = points(n, d)
    grads = torch.randn(n, d, device=DEVICE), torch.randn(n, device=DEVICE)
    functions = {"fastvae": lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, backend=BACKEND), "eager": eager_reparameterize_kl}
    if not DRY:
        functions["torch.compile"] = compiled(eager_reparameterize_kl)
    steps = {name: with_gradient(f, mu, logvar, grads=grads) for name, f in functions.items()}
    # Forward reads mu and logvar and writes z; backward reads both and dz, and writes two gradients.
    source = torch.empty(4, n, d, device=DEVICE)
    target = torch.empty_like(source)
    return steps | {"copy of as many bytes": lambda: target.copy_(source)}, 0


def plain_kernel(x: Tensor, y: Tensor, h: float) -> Tensor:
    return torch.exp((x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * x @ y.T) / (-2 * h * h))


def kernel_matmul(n: int, d: int) -> tuple[dict[str, Step], int]:
    x, y = points(n, d)
    v, grad = points(n, 16)
    h = d**0.5

    def keops_product(x: Tensor) -> Tensor:
        from pykeops.torch import LazyTensor

        squared = ((LazyTensor(x[:, None, :]) - LazyTensor(y[None, :, :])) ** 2).sum(-1)
        return (squared * (-0.5 / h**2)).exp() @ v

    functions: dict[str, Callable[..., Any]] = {
        "fastvae": lambda x: fastvae.kernel_matmul(x, y, v, bandwidth=h, backend=BACKEND),
        "eager": lambda x: plain_kernel(x, y, h) @ v,
    }
    if n in (20, 4096):
        functions["KeOps"] = keops_product
    return {name: with_gradient(f, x, grads=grad) for name, f in functions.items()}, 4


def group_mmd(n: int, d: int) -> tuple[dict[str, Step], int]:
    z, _ = points(n, d)
    labels = torch.arange(n, device=DEVICE) % (3 if DRY else 16)
    count, h = int(labels.max()) + 1, d**0.5
    shares = F.one_hot(labels, count).float()
    shares = shares / shares.sum(0)

    def plain(z: Tensor) -> Tensor:
        within = shares.T @ plain_kernel(z, z, h) @ shares
        return (within.diagonal()[:, None] + within.diagonal()[None, :] - 2 * within).mean()

    def fused(z: Tensor) -> Tensor:
        return fastvae.group_mmd(z, labels, num_groups=count, bandwidth=h, backend=BACKEND).values.mean()

    return {"fastvae": with_gradient(fused, z), "eager": with_gradient(plain, z)}, 4


def total_correlation(n: int, d: int) -> tuple[dict[str, Step], int]:
    z, mu = points(n, d)
    logvar = 0.1 * torch.randn_like(mu)

    def fused(*inputs: Tensor) -> Tensor:
        return sum(fastvae.total_correlation(*inputs, dataset_size=2_000_000, backend=BACKEND))  # type: ignore[return-value]

    def plain(*inputs: Tensor) -> Tensor:
        return sum(reference.total_correlation(*inputs, dataset_size=2_000_000))  # type: ignore[return-value]

    return {"fastvae": with_gradient(fused, z, mu, logvar), "eager": with_gradient(plain, z, mu, logvar)}, 6 * d


# Makers of steps, which return also how many N×N arrays eager code holds; and sizes, those of the second tuple timed later.
OPERATIONS: dict[Callable[[int, int], tuple[dict[str, Step], int]], tuple[Sizes, Sizes]] = {
    reparameterize_kl: (((128, 20), (512, 20), (65_536, 64), (262_144, 256)), ((32, 16), (4096, 64), (1_000_000, 64))),
    kernel_matmul: (((128, 16), (4096, 16), (65_536, 16)), ((32, 16), (1024, 16), (1_000_000, 16))),
    total_correlation: (((128, 16), (1024, 16), (65_536, 16)), ((32, 16), (4096, 16), (262_144, 16))),
    group_mmd: (((128, 16), (4096, 16), (65_536, 16)), ((32, 16), (1024, 16), (1_000_000, 16))),
}


def other_operations(part: int) -> Iterator[list[Row]]:
    for make, parts in OPERATIONS.items():
        for n, d in sizes(*parts[part]):
            steps, arrays = make(n, d)
            if not fits(n, arrays):
                del steps["eager"]
            # A small step waits for the host; its graph shows the time that the device takes.
            yield timed_rows(
                steps, graphs=n <= 4096 or make is reparameterize_kl, rounds=20, operation=make.__name__, direction=DIRECTION, n=n, d=d
            )


def speed() -> Iterator[list[Row]]:
    yield from small_mmd()
    yield from large_mmd()
    yield from other_operations(0)
    yield from installed_peers()
    if not DRY:
        yield from other_operations(1)
    yield from other_mmd()


# Training


def training() -> Iterator[list[Row]]:
    """A step of Adam, with the batch on the device."""
    objectives = {"vae": (plain_vae, fastvae.VAEObjective.vae()), "mmd_vae": (plain_mmd_vae, fastvae.VAEObjective.mmd_vae(1000.0))}
    batches = (8,) if DRY else (128, 8192)
    for n in batches:
        x = torch.rand(n, 784, device=DEVICE)
        for name, (plain, objective) in objectives.items():
            model = fastvae.VAE.mlp(784, latent_dim=20, likelihood="bernoulli")
            steps = {
                "fastvae": training_step(model, lambda model, x, objective=objective: objective(model(x), x).loss, x),
                "eager": training_step(PlainVAE(), plain, x),
            }
            yield timed_rows(steps, operation="training step", objective=name, n=n, d=20)
    for name, (plain, _) in () if DRY else objectives.items():
        x = torch.rand(128, 784, device=DEVICE)
        yield timed_rows(
            {"torch.compile": training_step(PlainVAE(), compiled(plain), x)}, operation="training step", objective=name, n=128, d=20
        )


# The host


def host() -> Iterator[list[Row]]:
    """The time for which a small step keeps the host busy, and the kernels that it launches."""
    for n, d in sizes((128, 16)):
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
        yield rows


def launches_of(step: Step) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities + [torch.profiler.ProfilerActivity.CUDA] * (DEVICE == "cuda")) as profile:
        step()
        synchronize(DEVICE)
    return sum("LaunchKernel" in event.name for event in profile.events() or [])
