"""Losses of the global batch on several processes against one process with all rows."""

import copy
import datetime
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import distributed
from fastvae.distributed import gather, gather_rows
from fastvae.radial import RBF, Linear
from tests.processes import context
from tests.ranks import run_on_ranks

# Rows of each rank: ranks differ, and one has a single row.
ROWS = {2: (5, 3), 4: (4, 1, 6, 2)}


def own(rank, world, *tensors):
    first = sum(ROWS[world][:rank])
    return [t[first : first + ROWS[world][rank]].clone().requires_grad_(t.requires_grad) for t in tensors]


def assert_is_global(rank, world, function, *tensors):
    """The value is the same on each rank, and the gradient is that of the whole times the number of ranks."""
    value = function(*tensors, None)
    gradients = torch.autograd.grad(value, tensors)
    parts = own(rank, world, *tensors)
    actual = function(*parts, dist.group.WORLD)
    torch.testing.assert_close(actual, value)
    for gradient, part in zip(torch.autograd.grad(actual, parts, retain_graph=True), own(rank, world, *gradients), strict=True):
        torch.testing.assert_close(gradient / world, part)
    try:
        seconds = second_derivatives(function(*tensors, None), tensors, [t.detach().cos() for t in tensors])
    except NotImplementedError:
        return  # It has none on one process either.
    directions = own(rank, world, *(t.detach().cos() for t in tensors))
    for second, part in zip(second_derivatives(actual, parts, directions), own(rank, world, *seconds), strict=True):
        torch.testing.assert_close(second / world, part)


def second_derivatives(value, tensors, directions):
    """The gradients along a direction, one backward pass after the other, of two functions of the value that are not linear."""
    found = [torch.autograd.grad(function(value), tensors, create_graph=True) for function in (torch.sin, torch.cos)]
    along = [sum((t * direction).sum() for t, direction in zip(gradients, directions, strict=True)) for gradients in found]
    return [second for total in along for second in torch.autograd.grad(total, tensors, retain_graph=True)]


def hvp_is_refused(rank, world):
    """Its derivative to the direction would lack what other ranks need."""
    x, y, v = torch.randn(3, sum(ROWS[world]), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y, v = own(rank, world, x, y, v)
    for kernel in (RBF(), Linear(), RBF() + Linear()):
        with pytest.raises(NotImplementedError, match=r"a Hessian-vector product in a process group .* use vhp"):
            torch.autograd.functional.hvp(lambda x, k=kernel: fastvae.mmd(x, y, kernel=k, process_group=dist.group.WORLD), x, v)


def losses(rank, world):
    torch.manual_seed(0)
    n = sum(ROWS[world])
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(n, dtype=torch.float64)
    weights /= weights.sum()
    labels = torch.arange(n) % 3

    def part(t, group):
        return t if group is None else own(rank, world, t)[0]

    for rule in ("median", "mean"):
        assert_is_global(rank, world, lambda x, y, g, rule=rule: fastvae.mmd(x, y, bandwidth=rule, process_group=g), x, y)
        assert_is_global(
            rank,
            world,
            lambda x, g, rule=rule: fastvae.group_mmd(x, part(labels, g), num_groups=3, bandwidth=rule, process_group=g).values.sum(),
            x,
        )
    for kernel, estimator in itertools.product(("rbf", "imq", "energy", "polynomial"), ("biased", "unbiased")):
        options = {"kernel": kernel, "estimator": estimator, "bandwidth": (0.9, 1.8)}
        assert_is_global(rank, world, lambda x, y, g, o=options: fastvae.mmd(x, y, process_group=g, **o), x, y)
        assert_is_global(
            rank,
            world,
            lambda x, y, g, o=options: fastvae.mmd(
                x, y, x_weights=part(weights, g), y_weights=part(weights.flip(0), g), process_group=g, **o
            ),
            x,
            y,
        )
        assert_is_global(
            rank,
            world,
            lambda x, g, o=options: fastvae.group_mmd(x, part(labels, g), num_groups=4, process_group=g, **o).mean(),
            x,
        )
        if kernel == "rbf":
            assert_is_global(rank, world, lambda x, g, o=options: fastvae.mmd_to_normal(x, process_group=g, **o), x)
        if kernel in ("rbf", "imq"):
            options = {"kernel": kernel, "estimator": estimator, "bandwidth": [1.0, 2.0]}
            assert_is_global(rank, world, lambda x, g, o=options: fastvae.ksd_to_normal(x, process_group=g, **o), x)
    for kernel, estimator in itertools.product((Linear(), RBF() + Linear()), ("biased", "unbiased")):
        options = {"kernel": kernel, "estimator": estimator, "bandwidth": (0.9, 1.8)}
        assert_is_global(rank, world, lambda x, y, g, o=options: fastvae.mmd(x, y, x_weights=part(weights, g), process_group=g, **o), x, y)
    (rows,) = own(rank, world, x)
    (gradient,) = torch.autograd.grad(
        fastvae.mmd(rows, 2 * rows, kernel=Linear(), process_group=dist.group.WORLD).sin(), rows, create_graph=True
    )
    (second,) = torch.autograd.grad((gradient * gradient.cos()).sum(), rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), rows)
    h = torch.tensor([0.9, 1.8, 0.4], dtype=torch.float64, requires_grad=True)
    gradients = []
    for points, group in (((x, y), None), (own(rank, world, x, y), dist.group.WORLD)):
        value = fastvae.mmd(*points, bandwidth=h, process_group=group) + fastvae.mmd_to_normal(points[0], bandwidth=h, process_group=group)
        gradients += torch.autograd.grad(value, h)
    dist.all_reduce(gradients[1])
    torch.testing.assert_close(gradients[1] / world, gradients[0])
    # k near one
    wide = {"num_groups": 3, "bandwidth": 1e3}
    value = fastvae.group_mmd(own(rank, world, x.float())[0], part(labels, True), process_group=dist.group.WORLD, **wide).values
    torch.testing.assert_close(value.double(), fastvae.group_mmd(x, labels, **wide).values, rtol=1e-3, atol=0)
    value = fastvae.mmd_to_normal(own(rank, world, x)[0], bandwidth=8.0, process_group=dist.group.WORLD)
    torch.testing.assert_close(value, fastvae.mmd_to_normal(x, bandwidth=8.0))


OBJECTIVES = {
    "MMD-VAE": lambda: fastvae.VAEObjective.mmd_vae(50.0),
    "WAE, IMQ": lambda: fastvae.VAEObjective.wae_mmd(20.0, kernel="imq"),
    "β-TC-VAE": lambda: fastvae.VAEObjective.beta_tc_vae(4.0, 100),
    "free bits": lambda: fastvae.VAEObjective.vae(free_bits=0.3),
    "DIP-VAE": lambda: fastvae.VAEObjective.dip_vae(2.0, kind="ii"),
}


def gradients_that_average_to_the_whole(rank, world):
    """Eight steps under DistributedDataParallel against one process: the same losses and the same parameters."""
    for make_objective in OBJECTIVES.values():
        torch.manual_seed(0)
        n = sum(ROWS[world])
        batches = [(torch.rand(n, 1, 2, 4), torch.randn(n, 2), torch.randn(n, 2)) for _ in range(8)]
        alone, shared = (fastvae.VAE.mlp((1, 2, 4), latent_dim=2, hidden=[8]) for _ in range(2))
        shared.load_state_dict(alone.state_dict())
        parallel = torch.nn.parallel.DistributedDataParallel(shared)
        optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (alone, shared)]
        objectives = [make_objective() for _ in range(2)]
        objectives[1].process_group = dist.group.WORLD
        for batch in batches:
            values = []
            for model, optimizer, objective, (x, eps, prior) in zip(
                (alone, parallel), optimizers, objectives, (batch, own(rank, world, *batch)), strict=True
            ):
                optimizer.zero_grad()
                terms = objective(model(x, eps=eps), x, prior=prior)
                terms.loss.backward()
                optimizer.step()
                values.append(terms.loss.detach())
            # Ranks walk over tiles, one process has one array: each rounds MMD² in float32, which the objective multiplies by 50.
            torch.testing.assert_close(*values, rtol=1e-6, atol=50 * torch.finfo(torch.float32).eps)
        for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def matching_a_fixed_sample(rank, world):
    """Eight steps of a generator under DistributedDataParallel against one process: the same losses and the same parameters."""
    torch.manual_seed(0)
    n = sum(ROWS[world])
    pool = torch.randn(60, 3, dtype=torch.float64) + 0.5
    weights = torch.rand(n, dtype=torch.float64)
    weights /= weights.sum()
    for options in ({"landmarks": pool[:9]}, {"method": "all"}):
        for kernel, h in (("rbf", [0.9, 1.8]), ("rbf", [300.0]), ("laplace", [2.0])):
            mean = fastvae.KernelMean.fit(pool, bandwidth=h, kernel=kernel, **options)
            x = torch.randn(n, 3, dtype=torch.float64, requires_grad=True)
            for estimator in ("biased", "unbiased"):
                more = {"estimator": estimator}
                assert_is_global(rank, world, lambda x, g, m=mean, o=more: fastvae.mmd(x, m, process_group=g, **o), x)
                assert_is_global(
                    rank,
                    world,
                    lambda x, g, m=mean, o=more: fastvae.mmd(
                        x, m, x_weights=weights if g is None else own(rank, world, weights)[0], process_group=g, **o
                    ),
                    x,
                )
        mean = fastvae.KernelMean.fit(pool.float(), bandwidth=1.5, **options)
        alone = torch.nn.Linear(2, 3)
        models = alone, torch.nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        for noise in torch.randn(8, n, 2):
            values = []
            for model, optimizer, part, group in zip(
                models, optimizers, (noise, own(rank, world, noise)[0]), (None, dist.group.WORLD), strict=True
            ):
                optimizer.zero_grad()
                rows = model(part)
                fastvae.recipes.irdm(rows, mean, process_group=group).backward()
                optimizer.step()
                values.append(fastvae.mmd(rows.detach(), mean, process_group=group))
            torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def latents_with_locations(rank, world):
    """Each term of the whole batch, and gradients that average to its own, for latents (N, C, H, W)."""
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(sum(ROWS[world]), 2, 3, 2, dtype=torch.float64, generator=g) for _ in range(4)]
    makes = [lambda kernel=kernel: fastvae.VAEObjective(mmd_weight=9.0, kernel=kernel, mmd_rows="location") for kernel in ("rbf", "imq")]
    for make_objective in [*OBJECTIVES.values(), *makes]:
        results = []
        for group, tensors in ((None, whole), (dist.group.WORLD, own(rank, world, *whole))):
            mu, logvar = (t.clone().requires_grad_() for t in tensors[:2])
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
            z = mu + (0.5 * logvar).exp() * tensors[2]
            objective = make_objective()
            objective.process_group = group
            loss = objective(fastvae.VAEOutput(z, z, mu, logvar, kl, fastvae.Gaussian()), tensors[3], prior=tensors[2]).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, [mu, logvar])])
        (loss, *gradients), (shared, *parts) = results
        torch.testing.assert_close(loss, shared)
        for gradient, part in zip(gradients, parts, strict=True):
            torch.testing.assert_close(own(rank, world, gradient)[0], part / world)


def fully_sharded(rank, world):
    """Five steps with the parameters sharded over the ranks against one process."""
    torch.manual_seed(0)
    n = sum(ROWS[world])
    alone, shared = (fastvae.VAE.mlp((1, 2, 4), latent_dim=2, hidden=[8]) for _ in range(2))
    shared.load_state_dict(alone.state_dict())
    fully_shard(shared, mesh=init_device_mesh("cpu", (world,)))
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (alone, shared)]
    objectives = [fastvae.VAEObjective.mmd_vae(50.0) for _ in range(2)]
    objectives[1].process_group = dist.group.WORLD
    for _ in range(5):
        batch = torch.rand(n, 1, 2, 4), torch.randn(n, 2)
        for model, optimizer, objective, (x, eps) in zip(
            (alone, shared), optimizers, objectives, (batch, own(rank, world, *batch)), strict=True
        ):
            optimizer.zero_grad()
            objective(model(x, eps=eps), x).loss.backward()
            optimizer.step()
    for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(a, b.full_tensor(), rtol=1e-4, atol=1e-5)


def compiled_whole(rank, world):
    """One graph, also for other numbers of rows on this rank and on the other."""
    group = dist.group.WORLD
    torch.manual_seed(0)
    x, eps, weights = torch.randn(ROWS[world][rank] + 4, 3), torch.randn(ROWS[world][rank] + 4, 2), torch.rand(ROWS[world][rank] + 4)
    vae = fastvae.VAE.mlp(3, latent_dim=2, hidden=[4])
    objective = fastvae.VAEObjective(kl_weight=0.5, mmd_weight=50.0, tc_weight=3.0, dataset_size=100, dip=(2.0, 2.0, "ii"))
    objective.process_group = group
    options = {"process_group": group, "estimator": "unbiased"}

    def loss(x, eps, weights):
        y = 2 * x.detach()
        weighted = fastvae.mmd(x, y, x_weights=weights, **options) + fastvae.mmd(x, y, bandwidth="median", **options)
        groups = fastvae.group_mmd(x, (weights > 0.5).long(), num_groups=2, **options)
        return objective(vae(x, eps=eps), x).loss + weighted + groups.mean()

    assert_compiles(loss, x, eps, weights)


@torch._dynamo.config.patch(error_on_recompile=True)
def assert_compiles(function, x, eps, weights):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for fewer in (0, 1 + dist.get_rank()):
        part, noise, share = (t[: len(x) - fewer].clone() for t in (x, eps, weights))
        total = share.sum()
        dist.all_reduce(total)
        part.requires_grad_()
        for actual, expected in zip(
            *(
                (value.detach(), *torch.autograd.grad(value, part))
                for value in (f(part, noise, share / total) for f in (compiled, function))
            ),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)


def one_rank_with_bad_input(rank, world):
    """Each rank has an error at once, and the group goes on."""
    group = dist.group.WORLD
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    quarters, labels = torch.full((4,), 1 / 8), torch.zeros(4, dtype=torch.int64)
    differ = r"x must have the same features and dtype, and weights or none, on all ranks of the group, got \(rows, 3\) of torch.float32"
    cases = [
        (lambda: fastvae.mmd(x, y, process_group=group), lambda: fastvae.mmd(x[:, 1:], y[:, 1:], process_group=group), differ, differ),
        (lambda: fastvae.mmd(x, y, process_group=group), lambda: fastvae.mmd(x.double(), y.double(), process_group=group), differ, differ),
        (
            lambda: fastvae.mmd(x, y, process_group=group),
            lambda: fastvae.mmd(x, y, x_weights=quarters, process_group=group),
            differ,
            r"got \(rows, 3\) of torch.float32 on rank 0, \(rows, 3\) of torch.float32 and \(rows\) of torch.float32 on rank 1",
        ),
        (
            lambda: fastvae.mmd(x, y, x_weights=quarters, process_group=group),
            lambda: fastvae.mmd(x, y, x_weights=quarters * torch.nan, process_group=group),
            "x_weights must sum to one",
            "x_weights must sum to one",
        ),
        (
            lambda: fastvae.mmd(x, y, process_group=group),
            lambda: fastvae.mmd(x, y[:, 1:], process_group=group),
            REFUSED,
            "x and y must have the same number of features",
        ),
        (
            lambda: fastvae.mmd(x, y, x_weights=quarters, process_group=group),
            lambda: fastvae.mmd(x, y, x_weights=quarters[1:], process_group=group),
            REFUSED,
            "x_weights must have one value for each row of x",
        ),
        (
            lambda: fastvae.mmd_to_normal(x, process_group=group),
            lambda: fastvae.mmd_to_normal(x[:0], process_group=group),
            REFUSED,
            "x must have at least one row",
        ),
        (
            lambda: fastvae.group_mmd(x, labels, num_groups=2, process_group=group),
            lambda: fastvae.group_mmd(x, labels + 5, num_groups=2, process_group=group),
            REFUSED,
            "groups must hold integers from 0 to 1",
        ),
        (
            lambda: fastvae.group_mmd(x, labels, num_groups=2, pairs=[(0, 1)], process_group=group),
            lambda: fastvae.group_mmd(x, labels, num_groups=2, pairs=[(0, 7)], process_group=group),
            REFUSED,
            "pairs must hold groups from 0 to 1",
        ),
    ]
    for *calls, sentence_0, sentence_1 in cases:
        with pytest.raises(ValueError, match=(sentence_0, sentence_1)[rank]):
            calls[rank]()
        torch.testing.assert_close(fastvae.mmd(x, x, process_group=group), torch.tensor(0.0))


REFUSED = "the arguments must be valid on all ranks of process_group, got an error on rank 1: see the message there"


def lose_a_rank(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timeout)
    x = torch.randn(5, 2)
    fastvae.mmd_to_normal(x, process_group=dist.group.WORLD)
    if rank == 1:
        os._exit(9)
    try:
        fastvae.mmd_to_normal(x, process_group=dist.group.WORLD)
    except RuntimeError:
        os._exit(7)
    os._exit(0)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def gathering_is_one_write(rank, world):
    whole = torch.arange(6.0 * world).reshape(-1, 3)
    with Operations() as operations:
        rows = distributed._gathered(whole[2 * rank : 2 * rank + 2], [2] * world, dist.group.WORLD)
    assert torch.equal(rows, whole)
    assert not operations.names & {"aten::cat", "aten::stack", "aten::copy_", "aten::clone"}


def gathering(rank, world):
    whole = torch.arange(3.0 * sum(ROWS[world])).reshape(-1, 3)
    (rows,), first = gather_rows("x", own(rank, world, whole), dist.group.WORLD)
    assert torch.equal(rows, whole)
    assert first == sum(ROWS[world][:rank])
    part = own(rank, world, whole)[0].requires_grad_()
    (grad,) = torch.autograd.grad((gather("x", part, dist.group.WORLD) * whole).sum(), part)
    assert torch.equal(grad, world * own(rank, world, whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("world", ROWS)
def test_on_ranks(world, tmp_path):
    # Together, as the processes take longer to start than to run.
    checks = gathering, gathering_is_one_write, losses, gradients_that_average_to_the_whole, latents_with_locations, fully_sharded
    checks += (matching_a_fixed_sample, hvp_is_refused)
    run_on_ranks(checks, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", [compiled_whole, one_rank_with_bad_input])
def test_on_two_ranks(check, tmp_path):
    run_on_ranks([check], 2, tmp_path)


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_others_with_an_error(tmp_path):
    ranks = [context.Process(target=lose_a_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [7, 9]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of PyTorch's own, on the first forward-mode call
def test_one_process_is_a_group_too(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        x, y = torch.randn(5, 2), torch.randn(4, 2)
        torch.testing.assert_close(fastvae.mmd(x, y, process_group=dist.group.WORLD), fastvae.mmd(x, y))
        with pytest.raises(ValueError, match="x must have shape \\(rows, features\\) with a process_group"):
            fastvae.mmd(x[None], y[None], process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="process_group must be None for estimator='linear', got a process group"):
            fastvae.mmd(x[:4], y, estimator="linear", process_group=dist.group.WORLD)
        for module in (fastvae.MMDLoss(process_group=dist.group.WORLD), fastvae.VAEObjective.vae()):
            module.process_group, module.weight = dist.group.WORLD, torch.nn.Parameter(torch.ones(2))
            _, twin = copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(1, 1), module))
            assert twin.process_group is dist.group.WORLD
            assert twin.weight is not module.weight
            assert torch.equal(twin.weight, module.weight)
        for loss in (
            lambda x: fastvae.mmd(x, y, process_group=dist.group.WORLD),
            lambda x: fastvae.mmd_to_normal(x, process_group=dist.group.WORLD),
            lambda x: fastvae.ksd_to_normal(x, process_group=dist.group.WORLD),
            lambda x: fastvae.group_mmd(x, torch.arange(5) % 2, num_groups=2, process_group=dist.group.WORLD).mean(),
            lambda x: fastvae.sigreg(x, directions=torch.eye(2), process_group=dist.group.WORLD),
            lambda x: distributed.gather("x", x, dist.group.WORLD).sum(),
        ):
            with pytest.raises(NotImplementedError, match=r"process group must not be called within a transform of torch\.func"):
                torch.func.grad(loss)(x)
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="or in forward mode: call"),
        ):
            fastvae.mmd(torch.autograd.forward_ad.make_dual(x, x), y, process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="num_groups must be given with a process_group"):
            fastvae.group_mmd(x, torch.zeros(5, dtype=torch.int64), process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
