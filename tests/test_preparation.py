import copy
import math

import numpy as np
import pytest
import torch

from fastvae import VAE, Standardise, VAEObjective


def table(n=50, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([2459000.5 + rng.random(n), rng.normal(3, 1e-6, n), rng.normal(0, 1e6, n), np.full(n, 0.1)], axis=1))


def test_it_is_numpys_mean_and_standard_deviation_in_float64():
    x = table(10_000)
    prepare = Standardise.of(x)
    mean, std = np.array([math.fsum(column) / len(x) for column in x.T.tolist()]), x.numpy().std(0)
    std[3] = 1
    np.testing.assert_allclose((prepare.mean.numpy() - mean) / std, 0, atol=1e-8)
    np.testing.assert_allclose(prepare.scale, std, rtol=1e-7)
    assert prepare(x).dtype == torch.float32
    np.testing.assert_allclose(prepare(x)[:, :3], ((x.numpy() - mean) / std)[:, :3], atol=1e-6)
    assert not prepare(x)[:, 3].any()
    torch.testing.assert_close(prepare.inverse(prepare(x)), x, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_prepared_as_its_numbers_in_float64(dtype):
    x = torch.arange(20).reshape(10, 2).to(dtype)
    prepare = Standardise.of(x)
    torch.testing.assert_close(prepare(x, torch.float64), Standardise.of(x.double())(x.double(), torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("meta"), copy.deepcopy, lambda m: m.float()])
def test_no_cast_and_no_move_costs_it_a_digit(move):
    prepare = Standardise.of(table())
    moved = move(torch.nn.Sequential(copy.deepcopy(prepare)))[0]
    assert torch.equal(moved.mean, prepare.mean)
    assert torch.equal(moved.scale, prepare.scale)
    fresh = Standardise(torch.zeros(4), torch.ones(4))
    fresh.load_state_dict(moved.state_dict())
    assert torch.equal(fresh.mean, prepare.mean)
    assert torch.equal(fresh.scale, prepare.scale)


def test_a_vae_takes_and_returns_the_units_of_the_data():
    torch.manual_seed(0)
    x = table()
    bare = VAE.mlp(4, latent_dim=2, hidden=(8,))
    prepared = copy.deepcopy(bare)
    prepare = prepared.preparation = Standardise.of(x)
    y = prepare(x)
    for ours, theirs in zip(prepared.encode(x), bare.encode(y), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(prepared.reconstruct(x), bare.reconstruct(y).double() * prepare.scale + prepare.mean, rtol=1e-15, atol=0)
    g = [torch.Generator().manual_seed(1) for _ in range(4)]
    torch.testing.assert_close(prepared.sample(5, generator=g[0]), prepare.inverse(bare.sample(5, generator=g[1])), rtol=0, atol=0)
    # A density of x: that of y times |dy/dx|.
    expected = bare.log_likelihood(y, samples=3, generator=g[2]) - prepare.scale.log().sum()
    torch.testing.assert_close(prepared.log_likelihood(x, samples=3, generator=g[3]), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", [VAEObjective.vae(), VAEObjective.iwae(3, gradient="doubly"), VAEObjective.info_vae(0.5, 10.0)])
def test_an_objective_gets_the_x_that_the_vae_got(objective):
    x = table()
    samples = getattr(objective, "samples", 1)
    bare = VAE.mlp(4, latent_dim=2, hidden=(8,))
    prepared = copy.deepcopy(bare)
    prepared.preparation = Standardise.of(x)
    y = prepared.preparation(x)
    eps = torch.randn(50, *([samples] if samples > 1 else []), 2)
    terms = [
        objective(bare(y, eps=eps, samples=samples), y),
        objective(prepared(x, eps=eps, samples=samples), x),
        objective(prepared(y, eps=eps, samples=samples, prepared=True), y),
    ]
    losses = [term.loss.item() for term in terms]
    assert math.isfinite(losses[0])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Standardise([0.0], [1.0, 2.0]), r"mean and scale must have the same shape, got \(1,\) and \(2,\)"),
        (lambda: Standardise([0.0], [0.0]), "mean and scale must be finite and scale greater than 0, got other numbers"),
        (lambda: Standardise([math.nan], [1.0]), "mean and scale must be finite and scale greater than 0, got other numbers"),
        (lambda: Standardise.of(torch.zeros(0, 3)), "x must have at least one sample, got none"),
        (lambda: Standardise.of(torch.rand(5, 3))(torch.rand(5, 1)), r"x must have samples of shape \(3,\), got shape \(5, 1\)"),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
