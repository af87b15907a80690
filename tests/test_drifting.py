"""`recipes.drifting` against its published formula, written down once in PyTorch and once in loops of numpy."""

import numpy as np
import pytest
import torch

from fastvae import drifting, recipes
from tests.cases import DEVICE

TEMPERATURES = (0.02, 0.05, 0.2)


def problem(classes=5, own=8, negatives=4, positives=6, features=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = own, positives, negatives
    samples = [torch.randn(classes, n, features, dtype=torch.float64, generator=generator).to(DEVICE, dtype) for n in sizes]
    weights = [torch.rand(classes, n, dtype=torch.float64, generator=generator).to(DEVICE, dtype) + 0.5 for n in sizes]
    samples[1] += 0.3
    return samples, weights


def formula(generated, positives, negatives, w_generated, w_positives, w_negatives, temperatures=TEMPERATURES):
    """As a user ports it: dense, one field after the other."""
    g, features, own = generated.detach(), generated.shape[-1], generated.shape[1]
    t = torch.cat([g, negatives, positives], 1)
    w = torch.cat([w_generated, w_negatives, w_positives], 1)
    first_positive = own + negatives.shape[1]
    d = (g.square().sum(-1)[:, :, None] + t.square().sum(-1)[:, None] - 2 * g @ t.mT).clamp(min=1e-8).sqrt()
    s = (d * w[:, None]).mean() / w.mean()
    factor = (s / features**0.5).clamp(min=1e-3)
    g_hat, t_hat = g / factor, t / factor
    same = torch.nn.functional.pad(torch.eye(own, dtype=g.dtype, device=g.device), (0, t.shape[1] - own))
    field = torch.zeros_like(g)
    for temperature in temperatures:
        logits = -(d / s.clamp(min=1e-3) + 100 * same) / temperature
        a = (logits.softmax(2) * logits.softmax(1)).clamp(min=1e-6).sqrt() * w[:, None]
        others, attracted = a[..., :first_positive], a[..., first_positive:]
        c = torch.cat([-others * attracted.sum(2, keepdim=True), attracted * others.sum(2, keepdim=True)], 2)
        part = c @ t_hat - c.sum(2, keepdim=True) * g_hat
        field = field + part / part.square().mean().clamp(min=1e-8).sqrt()
    return (generated / factor - (g_hat + field)).square().mean((1, 2))


def in_loops(generated, positives, negatives, w_generated, w_positives, w_negatives):
    """The loss in numpy, pair by pair, with softmax of both kinds as quotients of exponentials."""
    t, w = np.concatenate([generated, negatives, positives], 1), np.concatenate([w_generated, w_negatives, w_positives], 1)
    (classes, own, features), rows, first_positive = generated.shape, t.shape[1], own_of(generated) + negatives.shape[1]
    d = np.array([[[np.linalg.norm(g - row) for row in t[b]] for g in generated[b]] for b in range(classes)]).clip(1e-4)
    s = (d * w[:, None]).sum() / (own * w.sum())
    total = np.zeros_like(generated)
    for temperature in TEMPERATURES:
        field = np.zeros_like(generated)
        for b in range(classes):
            exponents = -d[b] / s / temperature - 100 / temperature * np.eye(own, rows)
            k = np.exp(exponents.astype(np.longdouble))
            a = w[b] * np.sqrt(np.maximum(k / k.sum(1, keepdims=True) * (k / k.sum(0)), 1e-6)).astype(float)
            for i in range(own):
                near, far = a[i, first_positive:], a[i, :first_positive]
                for j in range(rows):
                    c = a[i, j] * far.sum() if j >= first_positive else -a[i, j] * near.sum()
                    field[b, i] += c * (t[b, j] - generated[b, i]) * np.sqrt(features) / s
        total += field / np.sqrt((field**2).mean())
    return (total**2).mean((1, 2))


def own_of(generated):
    return generated.shape[1]


def loss_and_gradient(function, samples, weights):
    generated = samples[0].detach().clone().requires_grad_()
    loss = function(generated, *samples[1:], *weights)
    (gradient,) = torch.autograd.grad((loss * torch.arange(1.0, 1 + len(loss)).to(loss)).sum(), generated)
    return loss.detach(), gradient


def recipe(generated, positives, negatives, w_generated, w_positives, w_negatives, **options):
    weights = {"generated_weights": w_generated, "positives_weights": w_positives, "negatives_weights": w_negatives}
    return recipes.drifting(generated, positives, negatives, **weights, **options)


@pytest.mark.parametrize("features", [16, 40])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_loss_and_gradient(at_once, features, monkeypatch):
    """With few features, from the fields, and with many, from products of rows."""
    samples, weights = problem(features=features)
    monkeypatch.setattr(drifting, "_NUMBERS_AT_ONCE", at_once * 18 * features)
    for actual, exact in zip(loss_and_gradient(recipe, samples, weights), loss_and_gradient(formula, samples, weights), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13)


def test_loops_of_numpy():
    samples, weights = problem(2, 4, 2, 3, 5)
    expected = in_loops(*(t.cpu().numpy() for t in (*samples, *weights)))
    np.testing.assert_allclose(recipe(*samples, *weights).cpu().numpy(), expected, rtol=1e-10)


def test_float32_far_from_the_origin():
    """Where the published distances, from squared norms, have lost their digits."""
    samples, weights = problem(dtype=torch.float32)
    moved = [(t.double() + 1000).float() for t in samples]
    exact = loss_and_gradient(formula, [t.double() for t in moved], [t.double() for t in weights])
    for actual, e in zip(loss_and_gradient(recipe, moved, weights), exact, strict=True):
        torch.testing.assert_close(actual.double(), e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


def test_defaults_and_one_class():
    (generated, positives, negatives), _ = problem()
    ones = [t.new_ones(t.shape[:-1]) for t in (generated, positives, negatives)]
    torch.testing.assert_close(recipes.drifting(generated, positives, negatives), formula(generated, positives, negatives, *ones))
    empty = negatives[:, :0]
    expected = formula(generated, positives, empty, *ones[:2], empty[..., 0])
    torch.testing.assert_close(recipes.drifting(generated, positives), expected)
    one = recipes.drifting(generated[0], positives[0])
    assert one.shape == ()
    torch.testing.assert_close(one, recipes.drifting(generated[:1], positives[:1])[0])
    assert recipes.drifting(generated.bfloat16(), positives.bfloat16()).dtype == torch.float32


def test_nan_in_nan_out():
    samples, weights = problem()
    samples[1][0, 0, 0] = torch.nan
    assert recipe(*samples, *weights).isnan().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by forward mode in PyTorch itself
def test_second_derivative_raises():
    samples, weights = problem()
    generated = samples[0].requires_grad_()
    (gradient,) = torch.autograd.grad(recipe(*samples, *weights).sum(), generated, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"drifting has no second derivative$"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match=r"drifting has no derivative in forward mode, .* jacrev$"):  # noqa: SIM117
        with torch.autograd.forward_ad.dual_level():
            recipe(torch.autograd.forward_ad.make_dual(samples[0].detach(), samples[0].detach()), *samples[1:], *weights)


def test_backward_in_autocast():
    samples, weights = problem()
    samples, weights = [t.float() for t in samples], [t.float() for t in weights]
    leaf = samples[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(recipe(leaf, *samples[1:], *weights).sum(), leaf)
    with torch.autocast(leaf.device.type, torch.bfloat16):
        recipe(leaf, *samples[1:], *weights).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 0, None)])
def test_transforms(in_dims):
    """Each item of torch.vmap has scales of its own."""
    samples, weights = problem()
    items = [t if dim is None else torch.stack([t, 2 * t, t.sin()], dim) for t, dim in zip(samples, in_dims, strict=True)]

    def loss(*samples):
        return recipe(*samples, *weights).sum()

    for function in (loss, torch.func.grad(loss)):
        actual = torch.vmap(function, in_dims)(*items)
        for n, item in enumerate(actual):
            torch.testing.assert_close(
                item, function(*(t if dim is None else t.select(dim, n) for t, dim in zip(items, in_dims, strict=True)))
            )
    plain = torch.autograd.grad(loss(samples[0].requires_grad_(), *samples[1:]), samples[0])[0]
    torch.testing.assert_close(torch.func.grad(loss)(*(t.detach() for t in samples)), plain)


def test_one_temperature():
    (generated, positives, _), _ = problem()
    one = recipes.drifting(generated, positives, temperatures=0.1)
    torch.testing.assert_close(one, recipes.drifting(generated, positives, temperatures=(0.1,)))


def test_a_number_is_the_weight_of_each_row():
    (generated, positives, negatives), _ = problem()
    weights = torch.full_like(negatives[..., 0], 1.5)
    expected = recipes.drifting(generated, positives, negatives, negatives_weights=weights)
    torch.testing.assert_close(recipes.drifting(generated, positives, negatives, negatives_weights=1.5), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_compile():
    samples, weights = problem()
    compiled = torch.compile(recipe, fullgraph=True, backend="aot_eager")
    for a, e in zip(loss_and_gradient(compiled, samples, weights), loss_and_gradient(recipe, samples, weights), strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*samples, *weights), recipe(*samples, *weights))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperatures": ()}, "temperatures must hold at least one value, got none"),
        ({"temperatures": -1.0}, "every one of temperatures must be greater than 0, got -1"),
        ({"temperatures": (0.1, -1.0)}, "every one of temperatures must be greater than 0, got -1"),
        ({"negatives_weights": torch.ones(5, 4)}, "negatives_weights needs negatives"),
        ({"generated_weights": torch.ones(5, 4)}, r"generated_weights must have one value for each row of generated, shape \(5, 8\)"),
        ({"negatives": torch.ones(4, 16)}, r"negatives must have the batch dimensions of generated, \(5,\), got \(4, 16\)"),
        ({"generated_weights": 0.0, "positives_weights": 0.0}, "the weights of all rows must have a sum other than 0, got 0"),
        ({"generated_weights": torch.zeros(5, 8), "positives_weights": 0}, "the weights of all rows must have a sum other than 0, got 0"),
    ],
)
def test_errors(options, sentence):
    (generated, positives, _), _ = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=sentence):
        recipes.drifting(generated.cpu(), positives.cpu(), **options)
