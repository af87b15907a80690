"""SIGReg on every backend against the dense reference in float64, and the reference against the formulas of its authors."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

import fastvae
from fastvae import SIGReg, reference, sigreg
from fastvae.cpu import sigreg as cpu
from tests.cases import DEVICE, gradcheck, needs_cpu, needs_triton, peak_bytes
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("interpreter_warnings")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=[needs_triton, pytest.mark.interpreter])]
SHAPES = [(1, 3), (2, 5), (70, 3), (33, 20), (3, 40, 6), (2, 2, 5, 70)]
# The points of LeJEPA, of eb_jepa, with t = 0 in their middle, one of two chains longer than the other, and no point between the ends.
VARIANTS = [
    {},
    {"t_min": -3.0, "num_points": 10, "scale_by_n": False},
    {"t_min": -3.0, "num_points": 9},
    {"num_points": 6, "t_max": 2.0},
    {"num_points": 2},
    {"t_min": -2.5, "t_max": 2.5, "num_points": 2},
]
# Errors relative to the value and to the norm of the gradient.
TOLERANCES = {"float64": (1e-12, 1e-11), "float32": (6e-7, 1e-6), "highest": (2e-6, 1e-4), "high": (2e-3, 5e-3), "medium": (5e-2, 2e-1)}


def sample(*shape, dtype=torch.float64, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(1)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=g) + shift).to(DEVICE, dtype)


def unit_columns(features, slices):
    a = torch.randn(features, slices, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return a / a.norm(dim=0)


def evaluate(function, z, *args, **options):
    z = z.detach().clone().requires_grad_()
    value = function(z, *args, **options)
    return value.detach(), torch.autograd.grad(value, z)[0]


def exactly(z, directions, **options):
    return evaluate(reference.sigreg, z.double(), directions.double(), **options)


def assert_close(actual, exact, tolerances):
    (value, grad), (exact_value, exact_grad) = actual, exact
    assert value.shape == ()
    assert abs(value.double() - exact_value).item() <= tolerances[0] * exact_value.item()
    error, norm = (grad.double() - exact_grad).norm().item(), exact_grad.norm().item()
    assert error <= tolerances[1] * norm, f"gradient off by {error:.1e} of {norm:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, variant):
    if backend == "triton" and not torch.cuda.is_available() and variant and shape not in SHAPES[1:3]:
        pytest.skip("the interpreter is slow")
    z, directions = sample(*shape), unit_columns(shape[-1], 70)
    actual = evaluate(sigreg, z, directions=directions, backend=backend, **variant)
    assert actual[0].dtype == torch.float64
    assert_close(actual, exactly(z, directions, **variant), TOLERANCES["float64"])


@needs_cpu
@pytest.mark.parametrize(("rows", "slices"), [(300, 5), (40, 130), (130, 70)])
def test_several_tiles(monkeypatch, rows, slices):
    monkeypatch.setattr(cpu, "BLOCK", 1 << 11)
    monkeypatch.setattr(cpu, "SLICES", 64)
    for z in (sample(rows, 6), sample(5, rows // 5, 6)):
        directions = unit_columns(6, slices)
        assert_close(evaluate(sigreg, z, directions=directions), exactly(z, directions), TOLERANCES["float64"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 0.0), (0.0, 1.0), (10.0, 0.0), (1.0, 1000.0)])
def test_float32_is_as_exact_as_the_direct_formula(backend, scale, shift):
    """Also for a sample that has collapsed, and far from N(0, I), where the rounding of p is an error of the angle: t·p·eps."""
    z, directions = sample(65, 8, dtype=torch.float32, scale=scale, shift=shift), unit_columns(8, 33).float()
    exact = exactly(z, directions)
    direct = evaluate(reference.sigreg, z, directions)
    actual = evaluate(sigreg, z, directions=directions, backend=backend, precision="ieee")
    value, grad = TOLERANCES["float32"]
    own = [abs(direct[0].double() - exact[0]).item() / exact[0].item(), ((direct[1] - exact[1]).norm() / exact[1].norm()).item()]
    assert_close(actual, exact, (max(value, 3 * own[0]), max(grad, 3 * own[1])))


@needs_cpu
def test_errors_of_rows_far_from_the_origin_average():
    """Those of the direct formula fall with the number of rows: the largest of a few samples, to a factor of two."""
    ours, direct = [], []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        z, a = torch.randn(2048, 16, generator=g) + 1000, torch.randn(16, 4, generator=g)
        z, a = z.to(DEVICE), (a / a.norm(dim=0)).to(DEVICE)
        exact = reference.sigreg(z.double(), a.double())
        for errors, value in ((ours, sigreg(z, directions=a)), (direct, reference.sigreg(z, a))):
            errors.append(abs(value.double() / exact - 1).item())
    assert max(ours) < 2 * max(direct)


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("shape", [(40, 20), (5, 70)])
def test_precisions(precision, shape):
    z, directions = sample(*shape, dtype=torch.float32), unit_columns(shape[1], 10).float()
    actual = evaluate(sigreg, z, directions=directions, backend="triton", precision=precision)
    assert_close(actual, exactly(z, directions), TOLERANCES[precision])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    z, directions = sample(20, 6, dtype=dtype), unit_columns(6, 9)
    value, grad = evaluate(sigreg, z, directions=directions, backend=backend)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert_close((value, grad), exactly(z, directions), (1e-5, torch.finfo(dtype).eps))


def test_autocast_leaves_float32():
    z, directions = sample(20, 6, dtype=torch.float32), unit_columns(6, 9).float()
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = evaluate(sigreg, z, directions=directions)
        drawn = sigreg(z, num_slices=5, generator=torch.Generator().manual_seed(0))
        half = torch.nn.functional.linear(z, torch.eye(6, device=DEVICE))
        assert sigreg(half, directions=directions).dtype == torch.float32
    assert_close(actual, exactly(z, directions), TOLERANCES["float32"])
    torch.testing.assert_close(drawn, sigreg(z, num_slices=5, generator=torch.Generator().manual_seed(0)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(backend, bad):
    z = sample(5, 3, dtype=torch.float32)
    z[2, 1] = bad
    value, grad = evaluate(sigreg, z, directions=unit_columns(3, 4), backend=backend)
    assert value.isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    z, directions = sample(2, 4, 3).requires_grad_(), unit_columns(3, 5)
    for variant in VARIANTS[:2] if backend == "cpu" else VARIANTS[:1]:
        assert gradcheck(lambda z, variant=variant: sigreg(z, directions=directions, backend=backend, **variant), z, backend)


def test_a_second_derivative_is_refused_or_that_of_the_reference():
    z, directions = sample(4, 3).requires_grad_(), unit_columns(3, 5)
    (grad,) = torch.autograd.grad(sigreg(z, directions=directions), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="sigreg has no second derivative"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(lambda z: sigreg(z, directions=directions, backend="reference"), z)


@pytest.mark.parametrize("odd", [False, True])
def test_opcheck(odd):
    z, directions = sample(2, 4, 3).requires_grad_(), unit_columns(3, 5)
    args = (z, directions, 0.4, 3, odd, "", "")
    torch.library.opcheck(torch.ops.fastvae.sigreg.default, args)
    grad = torch.randn(3, 1 if odd else 2, 2, 2, 5, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(torch.ops.fastvae.sigreg_backward.default, (grad, z.detach(), *args[1:]))


@pytest.mark.slow
def test_compiles_whole_and_once_for_all_sizes():
    compilations = []

    def backend(module, inputs):
        compilations.append(module)
        return module.forward

    torch._dynamo.reset()
    loss = SIGReg(20)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 9, 20):
        z, directions = sample(n, 4), unit_columns(4, 20)
        for a, b in zip(evaluate(compiled, z, directions=directions), evaluate(loss, z, directions=directions), strict=True):
            torch.testing.assert_close(a, b)
    assert len(compilations) == 1
    assert compiled(z).isfinite()


@needs_cpu
def test_memory():
    """A hundredth of the direct formula's, of which six arrays of all angles are alive at one time."""
    n, d, slices = 2048, 64, 1024
    z, directions = sample(n, d, dtype=torch.float32), unit_columns(d, slices).float()
    assert peak_bytes(lambda z: sigreg(z, directions=directions), [z]) < 6 * (4 * n * slices * 17) / 100


def test_slices_against_mmd_to_normal():
    """√(2π)·N·MMD² of each slice, up to the truncation of the integral at 3."""
    z, directions = sample(200, 5, scale=1.3, shift=0.2), unit_columns(5, 30)
    slices = (z @ directions).T[:, :, None]
    expected = math.sqrt(2 * math.pi) * len(z) * fastvae.mmd_to_normal(slices, bandwidth=1.0).mean()
    torch.testing.assert_close(sigreg(z, directions=directions), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(sigreg(z, directions=directions, t_max=8.0, num_points=60), expected, rtol=1e-9, atol=0)


def test_equals_lejepa():
    """github.com/rbalestr-lab/lejepa: EppsPulley(t_max=3, n_points=17) in SlicingUnivariateTest, on views (V, N, D)."""
    z, directions = sample(3, 50, 6, scale=1.2), unit_columns(6, 40)
    projected = np.einsum("vnd,dk->vnk", z.cpu().numpy(), directions.cpu().numpy())
    t = np.linspace(0, 3, 17)
    weights = np.full(17, 2 * 3 / 16)
    weights[[0, -1]] = 3 / 16
    gaussian = np.exp(-(t**2) / 2)
    angles = projected[..., None] * t
    error = (np.cos(angles).mean(1) - gaussian) ** 2 + np.sin(angles).mean(1) ** 2
    statistic = (error @ (weights * gaussian)) * 50
    assert sigreg(z, directions=directions).item() == pytest.approx(statistic.mean(), rel=1e-12)
    views = z.cpu().numpy()
    loss = 0.3 * statistic.mean() + 0.7 * ((views.mean(0) - views) ** 2).mean()
    assert fastvae.recipes.lejepa(z, lamb=0.3, directions=directions).item() == pytest.approx(loss, rel=1e-12)


def test_eb_jepa_draws_256_slices():
    z = torch.randn(2, 8, 3)
    torch.manual_seed(0)
    default = fastvae.recipes.eb_jepa(*z)
    torch.manual_seed(0)
    assert default == fastvae.recipes.eb_jepa(*z, num_slices=256)


def test_equals_eb_jepa():
    """github.com/facebookresearch/eb_jepa: epps_pulley in BCS, of two views, with complex exponentials."""
    z, directions = sample(2, 50, 6, scale=0.7), unit_columns(6, 40)
    statistics = []
    for view in z.cpu().numpy():
        t = np.linspace(-3, 3, 10)
        gaussian = np.exp(-0.5 * t**2)
        ecf = np.exp(1j * (view @ directions.cpu().numpy())[:, :, None] * t).mean(0)
        error = gaussian * np.abs(ecf - gaussian) ** 2
        statistics.append(((error[:, 1:] + error[:, :-1]) / 2 * np.diff(t)).sum(1).mean())
    actual = sigreg(z, directions=directions, t_min=-3.0, num_points=10, scale_by_n=False)
    assert actual.item() == pytest.approx(np.mean(statistics), rel=1e-12)
    loss = ((z[0] - z[1]) ** 2).mean().item() + 4 * np.mean(statistics)
    assert fastvae.recipes.eb_jepa(*z, lmbd=4.0, directions=directions).item() == pytest.approx(loss, rel=1e-12)


def test_seventeen_points_from_zero_are_thirty_three_from_minus_t_max():
    z, directions = sample(20, 3), unit_columns(3, 7)
    torch.testing.assert_close(sigreg(z, directions=directions), sigreg(z, directions=directions, t_min=-3.0, num_points=33))


def test_directions_are_drawn_anew_or_by_a_generator():
    z = sample(20, 3)
    assert sigreg(z, num_slices=8) != sigreg(z, num_slices=8)
    a, b = (SIGReg(8)(z, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    directions = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(a, sigreg(z, directions=(directions / directions.norm(dim=0)).to(DEVICE)))


def test_module():
    options = {"num_points": 10, "t_min": -3.0, "scale_by_n": False}
    loss, z, directions = SIGReg(7, **options), sample(20, 3), unit_columns(3, 7)
    assert torch.equal(copy.deepcopy(loss)(z, directions=directions), sigreg(z, directions=directions, **options))
    assert str(loss) == "SIGReg(7, num_points=10, t_max=3.0, t_min=-3.0, scale_by_n=False)"
    assert not loss.state_dict()


def global_loss_and_parameters(rank, world):
    """Twenty steps of an encoder under DistributedDataParallel against one process with all rows: the same losses and parameters."""
    rows = {1: (9,), 2: (5, 4), 4: (4, 1, 2, 2)}[world]
    first = sum(rows[:rank])
    torch.manual_seed(0)
    alone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
    batches = [torch.randn(2, 9, 4) for _ in range(20)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (alone, parallel)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, rank)]
    losses = [SIGReg(16), SIGReg(16, process_group=dist.group.WORLD)]
    for batch in batches:
        own = batch[:, first : first + rows[rank]]
        values = []
        for model, x, optimizer, loss, generator in zip((alone, parallel), (batch, own), optimizers, losses, generators, strict=True):
            optimizer.zero_grad()
            value = loss(model(x), generator=generator)
            value.backward()
            optimizer.step()
            values.append(value.detach())
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)
    for a, b in zip(alone.parameters(), parallel.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def ranks_that_differ(rank, world):
    """All ranks have an error, and the group goes on."""
    z, group = torch.randn(4, 3), dist.group.WORLD
    differ = "z must have the same batch dimensions, features, slices, points and dtype on all ranks, got 1 samples, 3 features, 8 slices"
    for options in ({"z": z[:, 1:]}, {"z": z[None].expand(2, 4, 3)}, {"z": z.double()}, {"num_slices": 9}, {"num_points": 5}):
        with pytest.raises(ValueError, match=differ):
            sigreg(**{"z": z, "num_slices": 8, "process_group": group, **(options if rank == world - 1 else {})})
    with pytest.raises(ValueError, match=("the arguments must be valid on all ranks", "t_min must be 0 or -t_max")[rank == world - 1]):
        sigreg(z, num_slices=8, t_min=-1.0 * (rank == world - 1), process_group=group)
    with pytest.raises(ValueError, match="process_group must be None for backend='reference', got a process group"):
        sigreg(z, backend="reference", process_group=group)
    value = sigreg(z, num_slices=8, process_group=group)
    compiled = torch.compile(lambda z: sigreg(z, num_slices=8, process_group=group), fullgraph=True, backend="aot_eager")(z)
    values = [torch.empty(2) for _ in range(world)]
    dist.all_gather(values, torch.stack([value, compiled]))
    assert all(torch.equal(v, values[0]) for v in values)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_on_ranks(world, tmp_path):
    run_on_ranks([global_loss_and_parameters, *[ranks_that_differ] * (world == 2)], world, tmp_path)
