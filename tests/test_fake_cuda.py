"""What calls ask of a GPU, held on a machine without one: launches, copies, waits, memory, and on which device.

`python -m tests.test_fake_cuda` writes the table of launches and copies anew.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import VAEObjective, recipes
from tests.fake_cuda import Recorder, Waits, fake_cuda, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

TABLE = Path(__file__).with_name("fake_cuda.json")
X = N, D = 4096, 64
LADDER = (1.0, 2**0.5, 2.0, 2 * 2**0.5, 4.0)
f32, f64 = torch.float32, torch.float64


class Call(NamedTuple):
    """A function of tensors of these shapes, differentiated to those whose numbers are in `gradients`."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = (X, X)
    gradients: tuple[int, ...] = ()
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (((), f32),)
    dtype: torch.dtype = f32

    def inputs(self, device: str) -> list[Tensor]:
        return [
            torch.empty(shape, dtype=self.dtype, device=device, requires_grad=n in self.gradients) for n, shape in enumerate(self.shapes)
        ]


def mmd(**options):
    return functools.partial(fastvae.mmd, **{"bandwidth": 8.0, **options})


def mmd_of_tensor(x, y, bandwidth):
    return fastvae.mmd(x, y, bandwidth=bandwidth)


def weighted_mmd(x, y):
    return fastvae.mmd(x, y, bandwidth=8.0, x_weights=x.new_empty(len(x)), y_weights=y.new_empty(len(y)))


def mmd_to_mean(x, y):
    mean = fastvae.KernelMean(y, y.new_empty(len(y), dtype=f64), norm=y.new_empty((), dtype=f64), bandwidth=8.0)
    return fastvae.mmd(x, mean)


mmd_to_normal = functools.partial(fastvae.mmd_to_normal, bandwidth=8.0)
ksd_to_normal = functools.partial(fastvae.ksd_to_normal, bandwidth=8.0)
kernel_matmul = functools.partial(fastvae.kernel_matmul, bandwidth=8.0)


def second_derivative(function, z, direction):
    z = z.detach().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z, torch.ones_like(value), create_graph=True)
    return torch.autograd.grad(gradient, z, direction)[0]


def group_mmd(z, *weights, **options):
    groups = weights[0] if weights else z.new_empty(len(z), dtype=torch.int64)
    return fastvae.group_mmd(z, groups, num_groups=10, bandwidth=8.0, **options).mean()


def sigreg(z, directions):
    return fastvae.sigreg(z, directions=directions)


def total_correlation(*codes, **options):
    return tuple(fastvae.total_correlation(*codes, dataset_size=2 * len(codes[0]), **options))


def objective(loss):
    """The loss of what a VAE returns, from the codes of its encoder on."""

    def step(mu, logvar, reconstruction, x):
        z, kl = fastvae.reparameterize_kl(mu, logvar)
        return loss(fastvae.VAEOutput(reconstruction, z, mu, logvar, kl, fastvae.Gaussian()), x).loss

    return Call(step, (X, X, (N, 784), (N, 784)), (0, 1, 2))


IMAGES = 64, 8, 32, 32


def moments(shape, *, channels_last=False, results=(((64, 4, 32, 32), f32), ((64,), f32)), dtype=f32, **options):
    """A leaf in the channels_last format would be copied: here it is a view of one with the channels last."""

    def function(x):
        return fastvae.reparameterize_kl_moments(x.permute(0, 3, 1, 2) if channels_last else x, **options)

    order = (0, 2, 3, 1) if channels_last else range(len(shape))
    return Call(function, (tuple(shape[dim] for dim in order),), (0,), results, dtype)


CALLS = {
    "mmd": Call(mmd()),
    "mmd, gradient to x": Call(mmd(), gradients=(0,)),
    "mmd, gradients to x and y": Call(mmd(), gradients=(0, 1)),
    "mmd, five bandwidths": Call(mmd(bandwidth=LADDER)),
    "mmd, five bandwidths, gradient to x": Call(mmd(bandwidth=LADDER), gradients=(0,)),
    "mmd, forty bandwidths": Call(mmd(bandwidth=[1.0 + n for n in range(40)])),
    "mmd, unbiased": Call(mmd(estimator="unbiased"), gradients=(0,)),
    "mmd, weights": Call(weighted_mmd, gradients=(0,)),
    "mmd, batch": Call(mmd(), ((8, N, D), (8, N, D)), (0,), (((8,), f32),)),
    "mmd, batch of few rows": Call(mmd(), ((1024, 4, D), (1024, 4, D)), (0,), (((1024,), f32),)),
    "mmd, batch with a bandwidth each": Call(mmd_of_tensor, ((1024, 4, D), (1024, 4, D), (1024, 1)), (0,), (((1024,), f32),)),
    "mmd, bfloat16": Call(mmd(), gradients=(0,), dtype=torch.bfloat16),
    "mmd, float64": Call(mmd(), gradients=(0,), results=(((), f64),), dtype=f64),
    "mmd, linear": Call(mmd(estimator="linear"), gradients=(0,)),
    "mmd, bandwidth='median'": Call(mmd(bandwidth="median"), gradients=(0,)),
    "mmd, bandwidth='mean'": Call(mmd(bandwidth="mean"), gradients=(0,)),
    "mmd, bandwidth on the device": Call(mmd_of_tensor, (X, X, (1,)), (0,)),
    "mmd, gradient to the bandwidth": Call(mmd_of_tensor, (X, X, (1,)), (0, 2)),
    "mmd, gradients to three bandwidths": Call(mmd_of_tensor, (X, X, (3,)), (2,)),
    "mmd, imq": Call(mmd(kernel="imq"), gradients=(0,)),
    "mmd, laplace": Call(mmd(kernel="laplace"), gradients=(0,)),
    "mmd, energy": Call(mmd(kernel="energy"), gradients=(0,)),
    "mmd, polynomial": Call(mmd(kernel="polynomial"), gradients=(0,)),
    "mmd, second derivative": Call(lambda x, y, v: second_derivative(lambda x: mmd()(x, y), x, v), (X, X, X), results=((X, f32),)),
    "mmd, second derivative, batch": Call(
        lambda x, y, v: second_derivative(lambda x: mmd()(x, y), x, v), ((1024, 4, D),) * 3, results=(((1024, 4, D), f32),)
    ),
    "kernel_matmul, second derivative": Call(
        lambda x, y, v: second_derivative(lambda x: kernel_matmul(x, y, y), x, v), (X, X, X), results=((X, f32),)
    ),
    "group_mmd, second derivative": Call(lambda z, v: second_derivative(group_mmd, z, v), (X, X), results=((X, f32),)),
    "mmd of a mean": Call(mmd_to_mean),
    "mmd of a mean, gradient": Call(mmd_to_mean, gradients=(0,)),
    "mmd_to_normal": Call(mmd_to_normal, (X,)),
    "mmd_to_normal, gradient": Call(mmd_to_normal, (X,), (0,)),
    "mmd_to_normal, gradient to the bandwidth": Call(lambda x, h: fastvae.mmd_to_normal(x, bandwidth=h), (X, (1,)), (0, 1)),
    "ksd_to_normal": Call(ksd_to_normal, (X,)),
    "ksd_to_normal, gradient": Call(ksd_to_normal, (X,), (0,)),
    "ksd_to_normal, batch": Call(ksd_to_normal, ((8, N, D),), (0,), (((8,), f32),)),
    "ksd_to_normal, bandwidths on the device": Call(lambda z, h: fastvae.ksd_to_normal(z, bandwidth=h), (X, (3,)), (0,)),
    "ksd_to_normal, second derivative": Call(functools.partial(second_derivative, ksd_to_normal), results=((X, f32),)),
    "ksd_to_normal, batch, second derivative": Call(
        functools.partial(second_derivative, ksd_to_normal), ((8, N, D), (8, N, D)), results=(((8, N, D), f32),)
    ),
    "MMDLoss": Call(fastvae.MMDLoss(bandwidth=8.0), gradients=(0,)),
    "kernel_matmul": Call(kernel_matmul, (X, X, (N, 8)), (), (((N, 8), f32),)),
    "kernel_matmul, gradient to x": Call(kernel_matmul, (X, X, (N, 8)), (0,), (((N, 8), f32),)),
    "kernel_matmul, gradients": Call(kernel_matmul, (X, X, (N, 8)), (0, 1, 2), (((N, 8), f32),)),
    "kernel_matmul, few rows, gradients": Call(kernel_matmul, ((512, D), (512, D), (512, 8)), (0, 1, 2), (((512, 8), f32),)),
    "kernel_matmul, laplace": Call(functools.partial(kernel_matmul, kernel="laplace"), (X, X, (N,)), (0, 1, 2), (((N,), f32),)),
    "kernel_matmul, rows normalised": Call(functools.partial(kernel_matmul, normalize="rows"), (X, X, (N, 8)), (), (((N, 8), f32),)),
    "kernel_matmul, both normalised, gradients": Call(
        functools.partial(kernel_matmul, normalize="both"), (X, X, (N, 8)), (0, 1, 2), (((N, 8), f32),)
    ),
    "log_kernel_density": Call(functools.partial(fastvae.log_kernel_density, bandwidth=8.0), (X, X), (), (((N,), f32),)),
    "log_kernel_density, gradients": Call(functools.partial(fastvae.log_kernel_density, bandwidth=8.0), (X, X), (0, 1), (((N,), f32),)),
    "kernel_matmul, gradient to the bandwidth": Call(
        lambda x, y, v, h: fastvae.kernel_matmul(x, y, v, bandwidth=h), (X, X, (N, 8), (1,)), (0, 3), (((N, 8), f32),)
    ),
    "witness": Call(functools.partial(fastvae.witness, bandwidth=8.0), ((500, D), X, X), (0,), (((500,), f32),)),
    "group_mmd, labels": Call(group_mmd, (X,), (0,)),
    "group_mmd, labels of few rows": Call(group_mmd, ((512, D),), (0,)),
    "group_mmd, soft weights": Call(group_mmd, (X, (N, 10)), (0,)),
    "group_mmd, given pairs": Call(functools.partial(group_mmd, pairs=[(0, 1), (2, 3)]), (X,), (0,)),
    "total_correlation": Call(total_correlation, (X, X, X), results=(((), f32),) * 3),
    "total_correlation, gradients": Call(total_correlation, (X, X, X), (0, 1, 2), (((), f32),) * 3),
    "total_correlation, stratified": Call(
        functools.partial(total_correlation, estimator="minibatch_stratified"), (X, X, X), (0, 1, 2), (((), f32),) * 3
    ),
    "sigreg": Call(sigreg, (X, (D, 1024))),
    "sigreg, gradient": Call(fastvae.sigreg, (X,), (0,)),
    "sigreg, views of few rows, gradient": Call(functools.partial(fastvae.sigreg, num_slices=256), ((8, 32, D),), (0,)),
    "reparameterize_kl": Call(fastvae.reparameterize_kl, (X, X), (0, 1), ((X, f32), ((N,), f32))),
    "reparameterize_kl, eps": Call(
        lambda mu, logvar, eps: fastvae.reparameterize_kl(mu, logvar, eps=eps), (X, X, X), (0, 1), ((X, f32), ((N,), f32))
    ),
    "reparameterize_kl_moments": moments(IMAGES),
    "reparameterize_kl_moments, large images": moments((8, 8, 128, 128), results=(((8, 4, 128, 128), f32), ((8,), f32))),
    "reparameterize_kl_moments, channels_last": moments(IMAGES, channels_last=True),
    "reparameterize_kl_moments, bfloat16": moments(
        IMAGES, channels_last=True, results=(((64, 4, 32, 32), torch.bfloat16), ((64,), f32)), dtype=torch.bfloat16
    ),
    "reparameterize_kl_moments, audio": moments(
        (16, 128, 1024), results=(((16, 64, 1024), f32), ((16, 1024), f32)), kl_dims=1, scale="softplus", scale_offset=1e-4
    ),
    "gaussian_kl, gradients": Call(fastvae.gaussian_kl, (X, X, X, X), (0, 1, 2, 3), (((N,), f32),)),
    "median_bandwidth": Call(fastvae.median_bandwidth, results=(((), f64),)),
    "mean_bandwidth": Call(fastvae.mean_bandwidth, results=(((), f64),)),
    "VAEObjective.vae": objective(VAEObjective.vae()),
    "VAEObjective.mmd_vae": objective(VAEObjective.mmd_vae(10.0)),
    "VAEObjective.wae_mmd, imq": objective(VAEObjective.wae_mmd(10.0, kernel="imq")),
    "VAEObjective.beta_tc_vae": objective(VAEObjective.beta_tc_vae(4.0, 60000)),
    "recipes.pythae": Call(recipes.pythae, gradients=(0,)),
    "recipes.pytorch_vae": Call(recipes.pytorch_vae, gradients=(0,)),
    "recipes.geomloss": Call(recipes.geomloss, gradients=(0,)),
    "recipes.dan": Call(recipes.dan, gradients=(0,)),
    "recipes.dan, linear": Call(functools.partial(recipes.dan, linear=True), gradients=(0,)),
    "recipes.deepda": Call(recipes.deepda, gradients=(0,)),
    "recipes.mmd_gan": Call(recipes.mmd_gan, gradients=(0,)),
    "recipes.cmmd": Call(recipes.cmmd),
    "recipes.kid": Call(functools.partial(recipes.kid, subsets=None), results=(((), f32),) * 2),
    "recipes.kid, subsets": Call(functools.partial(recipes.kid, subsets=3), results=(((), f32),) * 2),
}

# Rows drawn on the host, as the docstring has it.
DRAWN_ON_THE_HOST = {"recipes.kid, subsets"}


class Part(NamedTuple):
    """What the recorder has counted."""

    triton: Counter
    pytorch: Counter
    copies: Counter


class Measured(NamedTuple):
    """Of a call made twice: copies of the first time, all else of the second."""

    first_copies: Counter
    forward: Part
    backward: Part
    peak: int  # bytes beyond the inputs
    results: list[Tensor]
    gradients: list[tuple[Tensor, Tensor]]  # inputs, and the gradients to them

    @property
    def copies(self) -> Counter:
        return self.forward.copies + self.backward.copies

    def row(self) -> dict[str, Any]:
        """Of the table: launches forward and backward."""
        row = {kind: [getattr(part, kind).total() for part in (self.forward, self.backward)] for kind in ("triton", "pytorch")}
        return row | ({"first copies": self.first_copies, "copies": self.copies} if self.first_copies else {})


def run(call: Call, recorder: Recorder, device: str) -> tuple[Part, Part, int, list[Tensor], list[tuple[Tensor, Tensor]]]:
    def part() -> Part:
        counted = Part(recorder.triton, recorder.pytorch, recorder.copies)
        peaks.append(recorder.peak - before)
        recorder.reset()
        return counted

    inputs, peaks = call.inputs(device), []
    before = recorder.live
    recorder.reset()
    results = call.function(*inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    forward = part()
    if not call.gradients:
        return forward, part(), max(peaks), results, []
    leaves = [inputs[n] for n in call.gradients]
    upstream = [torch.empty_like(t) for t in results]
    recorder.reset()
    gradients = torch.autograd.grad(results, leaves, upstream)
    return forward, part(), max(peaks), results, list(zip(leaves, gradients, strict=True))


def measure(call: Call, device: str = "cuda:0") -> Measured:
    with fake_cuda() as recorder:
        forward, backward, *_ = run(call, recorder, device)
        return Measured(forward.copies + backward.copies, *run(call, recorder, device))


def measured(name: str) -> Measured:
    """On another device than the current one: the recorder holds each launch to that of the tensors."""
    return measure(CALLS[name], "cuda:1")


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """Launches are those of the table, nothing is copied from the host twice, and results are what they should be, where they should be."""
    found, call = measured(name), CALLS[name]
    assert found.row() == table()[name], f"python -m tests.test_fake_cuda writes the table anew\n{found.forward}\n{found.backward}"
    assert name in DRAWN_ON_THE_HOST or not found.copies
    assert [(tuple(t.shape), t.dtype) for t in found.results] == list(call.results)
    for leaf, gradient in found.gradients:
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
    assert {t.device for t in (*found.results, *(gradient for _, gradient in found.gradients))} == {torch.device("cuda", 1)}


def test_the_table_has_no_other_calls():
    assert list(table()) == list(CALLS)


# Copies of a million rows that a call needs beyond its inputs.
MEMORY = {
    "mmd": 6,
    "mmd, gradient to x": 9,
    "mmd, gradients to x and y": 12,
    "mmd, five bandwidths, gradient to x": 9,
    "mmd, polynomial": 9,
    "mmd of a mean, gradient": 12,
    "mmd_to_normal, gradient": 5,
    "ksd_to_normal, gradient": 5,
    "ksd_to_normal, second derivative": 11,
    "mmd, second derivative": 24,
    "kernel_matmul, second derivative": 24,
    "kernel_matmul": 10,
    "kernel_matmul, gradients": 15,
    "log_kernel_density, gradients": 15,
    "group_mmd, labels": 12,
    "sigreg, gradient": 3,
    "total_correlation, gradients": 17,
    "reparameterize_kl": 5,
}


@pytest.mark.parametrize("name", [name for name in CALLS if "moments" in name])
def test_moments_are_not_copied(name):
    """A call needs memory for z and one gradient of the moments, and a thousandth for the KL."""
    call = CALLS[name]
    (shape,) = call.shapes
    large = measure(call._replace(shapes=((64 * shape[0], *shape[1:]),)))
    needed = large.results[0].nbytes + large.gradients[0][1].nbytes
    upstream, kl = large.results[0].nbytes, 4 * large.results[1].nbytes
    assert large.peak <= 1.001 * (needed + upstream + kl)


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name):
    rows, call = 10**6, CALLS[name]
    large = measure(call._replace(shapes=tuple((rows, *shape[1:]) for shape in call.shapes)))
    assert large.peak <= MEMORY[name] * rows * D * 4


def test_what_waits_is_seen():
    with fake_cuda():
        x, numbers = torch.empty(4, device="cuda"), torch.zeros(4)
        for wait in (x.sum().item, x.cpu, x.tolist, x.nonzero, lambda: bool(x[0] > 0), lambda: x[x > 0], lambda: numbers.copy_(x)):
            with pytest.raises(Waits):
                wait()
        with pytest.raises(Waits, match=r"fastvae/.*\.py"):
            fastvae.group_mmd(x[:, None], torch.zeros(4, dtype=torch.long, device="cuda"))


def test_what_launches_is_counted():
    with fake_cuda() as recorder:
        x = torch.empty(4, 4, device="cuda").T[1:].view(-1, 1, 4)
        assert not recorder.pytorch
        x.expand(3, 3, 4).contiguous()
        torch.nn.functional.softplus(x).add_(1)
        assert recorder.pytorch == {"clone": 1, "softplus": 1, "add_": 1}
        torch.tensor([1.0], device="cuda")
        x.copy_(torch.zeros(4))
        assert recorder.copies.total() == 2
        assert torch.zeros(3).add(1).tolist() == [1, 1, 1]
        assert sum(recorder.pytorch.values()) == 3


def test_memory_is_that_of_what_is_alive():
    with fake_cuda() as recorder:
        x = torch.empty(1000, device="cuda")
        y = x[10:].view(-1, 2)
        assert recorder.live == 4000
        (x + 1).sum()
        assert (recorder.live, recorder.peak) == (4000, 8004)
        del x
        assert recorder.live == 4000
        del y
        assert recorder.live == 0


def test_a_launch_on_another_device_is_seen():
    from fastvae.kernels import reparameterize_kl as kernels

    with fake_cuda() as recorder:
        mu, kl = torch.empty(8, 4, device="cuda:1"), torch.empty(8, device="cuda:1")
        arguments = dict.fromkeys(kernels.forward_kernel.arg_names, 1) | {"inputs": (mu, mu), "kl": (kl, 1, 1)}
        with pytest.raises(AssertionError, match="forward_kernel is launched on cuda:0 with a tensor on cuda:1"):
            kernels.forward_kernel[(1, 1, 1)](**arguments)
        with torch.cuda.device(1):
            kernels.forward_kernel[(1, 1, 1)](**arguments, num_warps=4)
            del arguments["sizes"]
            with pytest.raises(TypeError, match="missing a required argument: 'sizes'"):
                kernels.forward_kernel[(1, 1, 1)](**arguments)
        assert recorder.triton == {"forward_kernel": 1}


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    rows = [f"  {json.dumps(name)}: {json.dumps(measured(name).row())}" for name in CALLS]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
