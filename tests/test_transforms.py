"""Every public operation under every transform of PyTorch: as the dense reference has it, or refused in a sentence."""

import copy
import functools

import pytest
import torch
from torch import func

import fastvae
from fastvae import VAE, Gaussian, MMDLoss, VAEObjective, functional, recipes, vae
from fastvae.ops.reparameterize_kl import epsilon
from tests.cases import DEVICE

# Of PyTorch's own, on the first forward-mode call.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

generator = torch.Generator().manual_seed(0)
y, v, eps, logvar = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (5, 2), (6, 3), (6, 3)))
labels, h = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([1.0, 2.0])

mean = fastvae.KernelMean.fit(y.double(), landmarks=y[:3] + 0.1, bandwidth=[1.0, 2.0])

# Each a function of x (6, 3) to a scalar, and of the options of a call.
OPERATIONS = {
    "mmd": lambda x, **options: fastvae.mmd(x, y, bandwidth=[1.0, 2.0], **options),
    "mmd of several": lambda x, **options: fastvae.mmd(torch.stack([x, 2 * x]), y.expand(2, 5, 3), **options).sum(),
    "mmd of a rule": lambda x, **options: fastvae.mmd(x, y, bandwidth="median", **options),
    "mmd of a bandwidth": lambda x, **options: fastvae.mmd(y, y + 1, bandwidth=x.exp()[0], **options),
    "mmd of a mean": lambda x, **options: fastvae.mmd(x, mean, **options),
    "mmd, linear": lambda x, **options: fastvae.mmd(x, logvar, estimator="linear", **options),
    "mmd_to_normal": lambda x, **options: fastvae.mmd_to_normal(x, estimator="unbiased", **options),
    "ksd_to_normal": lambda x, **options: fastvae.ksd_to_normal(x, bandwidth=[1.0, 2.0], **options),
    "ksd_to_normal of several": lambda x, **options: fastvae.ksd_to_normal(torch.stack([x, 2 * x]), **options).sum(),
    "kernel_matmul": lambda x, **options: fastvae.kernel_matmul(x, y, v, **options).square().sum(),
    "kernel_matmul of v": lambda x, **options: fastvae.kernel_matmul(y, 2 * x, x, **options).square().sum(),
    "kernel_matmul of a bandwidth": lambda x, **options: fastvae.kernel_matmul(y, y, v, bandwidth=x.exp()[0], **options).square().sum(),
    "kernel_matmul of constants": lambda x, **options: fastvae.kernel_matmul(x, y, v, bandwidth=h, bandwidth_weights=h, **options).norm(),
    "kernel_matmul, normalised": lambda x, **options: fastvae.kernel_matmul(x, y, v, normalize="both", **options).square().sum(),
    "log_kernel_density": lambda x, **options: fastvae.log_kernel_density(x, y, bandwidth=[1.0, 2.0], **options).square().sum(),
    "log_kernel_density of weights": lambda x, **options: fastvae.log_kernel_density(y, x, y_weights=x[:, 0].exp(), **options).sum(),
    "witness": lambda x, **options: fastvae.witness(y, x, x[:4] + 1, **options).square().sum(),
    "group_mmd": lambda x, **options: fastvae.group_mmd(x, labels, num_groups=2, estimator="unbiased", **options).values[0, 1],
    "group_mmd of weights": lambda x, **options: fastvae.group_mmd(x, logvar.exp(), **options).mean(),
    "reparameterize_kl": lambda x, **options: sum(t.square().sum() for t in fastvae.reparameterize_kl(x, 0.5 * x, eps=eps, **options)),
    "reparameterize_kl, forced": lambda x, backend="cpu": OPERATIONS["reparameterize_kl"](x, backend=backend),
    "sigreg": lambda x, **options: fastvae.sigreg(x, directions=y[:4].T / y[:4].norm(dim=1), **options),
    "total_correlation": lambda x, **options: fastvae.total_correlation(x, 0.9 * x, logvar, dataset_size=9, **options)[1],
}
# Those made of PyTorch's own operations.
PLAIN = {"mmd, linear", "reparameterize_kl"}
# Sums over pairs of rows, with derivatives in forward mode and second ones.
PAIRS = {
    "mmd", "mmd of several", "mmd of a rule", "mmd of a mean", "mmd_to_normal", "kernel_matmul", "kernel_matmul of v",
    "kernel_matmul of constants", "witness", "group_mmd", "group_mmd of weights", "ksd_to_normal", "ksd_to_normal of several",
}  # fmt: skip
OF_BANDWIDTHS = {"mmd of a bandwidth", "kernel_matmul of a bandwidth"}
TWICE = {*PLAIN, *PAIRS, "reparameterize_kl, forced"}
# One call of each operation: the others differ in the gradients that are wanted.
OF_EACH = [name for name in OPERATIONS if " of " not in name and name not in ("mmd_to_normal", "witness")]


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


def batched(x):
    return torch.stack([x, x + 0.5, -x])


ONCE_DIFFERENTIATED = {
    "grad": lambda f, x: func.grad(f)(x),
    "backward": lambda f, x: torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0],
    "vmap": lambda f, x: torch.vmap(f)(batched(x)),
    "vmap(grad)": lambda f, x: torch.vmap(func.grad(f))(batched(x)),
    "grad(vmap)": lambda f, x: func.grad(lambda x: torch.vmap(f)(batched(x)).sum())(x),
    "jacrev": lambda f, x: func.jacrev(lambda x: torch.stack([f(x), f(2 * x).sin()]))(x),
    "functional_call": lambda f, x: func.functional_call(Applied(f), {"x": x}, ()),
}
COMPILED_DERIVATIVES = {
    "compile(grad)": lambda f, x, **options: compiled(func.grad(f), **options)(x),
    "compile(vmap(grad))": lambda f, x, **options: compiled(torch.vmap(func.grad(f)), **options)(batched(x)),
    "compile(jacrev)": lambda f, x, **options: compiled(func.jacrev(f), **options)(x),
}
FORWARD_MODE = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "vmap(jvp)": lambda f, x: torch.vmap(lambda x: func.jvp(f, (x,), (x.cos(),))[1])(batched(x)),
}
MIXED = {
    "hessian": lambda f, x: func.hessian(f)(x),
    "jacrev(jacfwd)": lambda f, x: func.jacrev(func.jacfwd(f))(x),
    "vmap(hessian)": lambda f, x: torch.vmap(func.hessian(f))(batched(x)),
    "jvp(grad)": lambda f, x: func.jvp(func.grad(f), (x,), (x.cos(),))[1],
}
TWICE_DIFFERENTIATED = {
    "grad(grad)": lambda f, x: func.grad(lambda x: func.grad(f)(x).square().sum())(x),
    "jacrev(grad)": lambda f, x: func.jacrev(func.grad(f))(x),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, x.cos())[1],
    "create_graph": lambda f, x: penalty(f, x.clone().requires_grad_()),
    "vectorize": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "vmap(grad(grad))": lambda f, x: torch.vmap(func.grad(lambda x: func.grad(f)(x).square().sum()))(batched(x)),
}


def penalty(f, x):
    """The gradient of a loss with a penalty on a gradient."""
    value = f(x.sin())
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(value.square() + (gradient.norm() - 1).square(), x)[0]


class Applied(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(6, 3))
        self.function = function

    def forward(self):
        return self.function(self.x)


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64)


def is_as_reference(transform, name, x, **options):
    operation = OPERATIONS[name]
    actual = transform(lambda x: operation(x, **options), x)
    expected = transform(lambda x: operation(x, backend="reference"), x)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert actual.abs().max() > 1e-4


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("transform", ONCE_DIFFERENTIATED)
def test_first_derivatives_and_batches(transform, name, x):
    is_as_reference(ONCE_DIFFERENTIATED[transform], name, x)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton(name, x, interpreter_warnings, monkeypatch):
    for constant in ("y", "v", "eps", "logvar", "labels", "h", "mean"):
        monkeypatch.setitem(globals(), constant, copy.deepcopy(globals()[constant]).to(DEVICE))
    is_as_reference(ONCE_DIFFERENTIATED["vmap(grad)"], name, x.to(DEVICE), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled(name, x):
    x.requires_grad_()
    results = []
    for function in (compiled(OPERATIONS[name], fullgraph=True), OPERATIONS[name]):
        value = function(x)
        results.append((value, *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OF_EACH, "mmd of several"])
def test_compiled_batches(name, x):
    actual = compiled(torch.vmap(OPERATIONS[name]), fullgraph=True)(batched(x))
    torch.testing.assert_close(actual, torch.stack([OPERATIONS[name](x) for x in batched(x)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmd", "mmd, linear"])
def test_gradient_of_what_is_compiled(name, x):
    """PyTorch calls the function uncompiled."""
    is_as_reference(lambda f, x: func.grad(compiled(f))(x), name, x)


# Each operation in one of them, and one of each kind in all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "name"),
    [(transform, name) for transform in COMPILED_DERIVATIVES for name in (OF_EACH if transform == "compile(grad)" else OF_EACH[:2])],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of PyTorch's own, where it leaves the graph within jacrev
def test_compiled_derivatives_run_uncompiled_or_say_so(transform, name, x):
    actual = COMPILED_DERIVATIVES[transform](OPERATIONS[name], x)
    expected = torch.stack([func.grad(OPERATIONS[name])(x) for x in batched(x)]) if "vmap" in transform else func.grad(OPERATIONS[name])(x)
    torch.testing.assert_close(actual, expected)
    if name in PLAIN:
        COMPILED_DERIVATIVES[transform](OPERATIONS[name], x, fullgraph=True)
        return
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"must not be compiled with fullgraph=True: without it"):
        COMPILED_DERIVATIVES[transform](OPERATIONS[name], x, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in OF_EACH if name != "mmd, linear"), "drifting"])
def test_second_derivative_of_what_is_compiled_is_refused(name, x):
    """Where the operation takes an input of the graph. PyTorch takes derivatives to what a compiled backward pass lacks for zero."""
    rows, operation = (x[None], lambda x: recipes.drifting(x, y[None]).sum()) if name == "drifting" else (x, OPERATIONS[name])
    leaf = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(operation)(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(gradient.norm(), leaf)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmd", "group_mmd"])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # of PyTorch's own, where it leaves the graph
def test_dual_numbers_of_what_is_compiled(name, x):
    f, dual = OPERATIONS[name], torch.autograd.forward_ad
    function = compiled(f)
    torch.testing.assert_close(function(x), f(x))
    with dual.dual_level():
        tangent = dual.unpack_dual(function(dual.make_dual(x, x.cos()))).tangent
    torch.testing.assert_close(tangent, FORWARD_MODE["jvp"](f, x))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("transform", {**FORWARD_MODE, **MIXED})
def test_forward_mode_is_right_or_refused(transform, name, x):
    transform = {**FORWARD_MODE, **MIXED}[transform]
    if name in PLAIN | PAIRS:
        is_as_reference(transform, name, x)
        return
    message = r"has no derivative in forward mode, which torch.func.jvp, jacfwd and hessian take: use"
    if name in OF_BANDWIDTHS:
        message = (
            r"has no (derivative in forward mode|second derivative) with respect to bandwidths and their weights: .* divide the samples"
        )
    with pytest.raises(NotImplementedError, match=message):
        transform(OPERATIONS[name], x)
    # The way out that the sentence names.
    transform(lambda x: OPERATIONS[name](x, backend="reference"), x)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_forward_mode_within_forward_mode_is_refused(name, x):
    """PyTorch would take the first derivative for a constant."""
    with pytest.raises(NotImplementedError, match="no derivative in forward mode of one in forward mode: take one of the two in reverse"):
        func.jacfwd(func.jacfwd(OPERATIONS[name]))(x)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("transform", TWICE_DIFFERENTIATED)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's own, with vectorize
def test_second_derivative_is_right_or_refused(transform, name, x):
    if name in TWICE:
        is_as_reference(TWICE_DIFFERENTIATED[transform], name, x)
        return
    message = r"has no second derivative(:| with respect to bandwidths).* call it with backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        TWICE_DIFFERENTIATED[transform](OPERATIONS[name], x)
    TWICE_DIFFERENTIATED[transform](lambda x: OPERATIONS[name](x, backend="reference"), x)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_third_derivative_is_refused(name, x):
    with pytest.raises(NotImplementedError, match=r"has no third derivative: call it with backend='reference', which is dense and has one"):
        func.grad(lambda x: func.grad(lambda x: func.grad(OPERATIONS[name])(x).square().sum())(x).square().sum())(x)


CONSTANTS = {
    "x_weights": lambda x, t: fastvae.mmd(x, y, x_weights=t[:, 0].softmax(0)),
    "y_weights": lambda x, t: fastvae.mmd(y, x, y_weights=t[:, 0].softmax(0)),
    "groups": lambda x, t: fastvae.group_mmd(x, t.exp()).values.norm(),
    "bandwidth": lambda x, t: fastvae.ksd_to_normal(x, bandwidth=t.exp()[0]),
    "bandwidth_weights": lambda x, t: fastvae.group_mmd(x, labels, bandwidth=[1.0, 2.0, 3.0], bandwidth_weights=t.exp()[0]).values.norm(),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("transform", [*FORWARD_MODE, "jvp(grad)"])
def test_tangents_of_constants_are_refused(transform, name, x):
    f = CONSTANTS[name]
    for function in (lambda t: f(t, t), lambda t: f(x, t)):
        with pytest.raises((NotImplementedError, ValueError), match=f"{name}.* must be constant"):
            (FORWARD_MODE | MIXED)[transform](function, x)


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
def test_second_derivative_within_autocast(kernel, x):
    z, t, w = x.float(), y.float(), v.float()
    options = {"bandwidth": [1.0, 2.0], "kernel": kernel}
    functions = {
        "mmd": lambda x: fastvae.mmd(x, t, **options),
        "kernel_matmul": lambda x: fastvae.kernel_matmul(x, t, w, **options).norm(),
        "group_mmd": lambda x: fastvae.group_mmd(x, logvar.exp(), **options).values.norm(),
        "ksd_to_normal": fastvae.ksd_to_normal,
    }
    for function in functions.values():
        found = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(penalty(function, z.clone().requires_grad_()))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6 * float(found[0].abs().max()))


@pytest.mark.parametrize("rows", [6, 6_000])
def test_dual_numbers_outside_of_functorch(rows):
    mu = torch.randn(rows, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(mu, torch.ones_like(mu))
        kl = fastvae.reparameterize_kl(dual, mu, eps=mu)[1]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(kl).tangent, mu.sum(1))
        with pytest.raises(NotImplementedError, match="reparameterize_kl has no derivative in forward mode"):
            fastvae.reparameterize_kl(dual, mu, eps=mu, backend="cpu")
        value = fastvae.mmd(dual, mu[:5] + 1)
        tangent = torch.func.grad(fastvae.mmd)(mu, mu[:5] + 1).sum()
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(value).tangent, tangent)


@pytest.mark.parametrize(
    ("posterior", "objective"),
    [
        ("gaussian", VAEObjective(kl_weight=2)),
        ("gaussian", VAEObjective(free_bits=0.5)),
        ("gaussian", VAEObjective(mmd_weight=3.0, estimator="biased")),
        ("deterministic", VAEObjective(kl_weight=0.0, mmd_weight=3.0, estimator="biased")),
        ("gaussian", VAEObjective.iwae(4, gradient="doubly")),
    ],
)
def test_gradients_of_each_sample_of_a_vae(posterior, objective):
    x, noise = torch.rand(5, 7), torch.randn(5, objective.samples, 3)
    noise = noise[:, 0] if objective.samples == 1 else noise
    model = VAE.mlp(7, latent_dim=3, hidden=(8,), posterior=posterior, likelihood=Gaussian(0.7))
    options = {"samples": objective.samples}

    def loss(parameters, x, noise):
        output = func.functional_call(model, parameters, (x[None],), {"eps": noise[None], **options})
        return objective(output, x[None]).loss

    parameters = dict(model.named_parameters())
    actual = torch.vmap(func.grad(loss), (None, 0, 0))(parameters, x, noise)
    for n in range(5):
        expected = objective(model(x[n : n + 1], eps=noise[n : n + 1], **options), x[n : n + 1]).loss
        for name, gradient in zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True):
            torch.testing.assert_close(actual[name][n], gradient, rtol=1e-4, atol=1e-5)


WEIGHTS = {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in ("mu", "logvar")}
ROWS = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
NOISE = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)


def noise_loss(weights, x, eps=None, moments=False, **options):
    """A loss of one item, some rows x; its value and the noise that it had."""
    mu, logvar = x @ weights["mu"], x @ weights["logvar"]
    if moments:
        z, kl = fastvae.reparameterize_kl_moments(torch.cat([mu, logvar], 1), eps=eps, **options)
    else:
        z, kl = fastvae.reparameterize_kl(mu, logvar, eps=eps, **options)
    loss = kl.mean() + z.sin().sum()
    return loss, (loss, (z - mu) / (0.5 * logvar).exp())


def gradients_of_each_item_are_those_of_a_loop(gradient, loop, weights, x, noise, randomness="different", tolerance=1e-7, device="cpu"):
    """`gradient` and `loop` are functions of the weights, one item and its noise, which is drawn if it is None; the second takes noise."""
    weights, x = {name: weight.to(device) for name, weight in weights.items()}, x.to(device)
    noise = None if noise is None else noise.to(device)
    if noise is None:
        found, (values, noise) = torch.vmap(gradient, (None, 0), randomness=randomness)(weights, x)
        assert ((noise[0] - noise[1]).abs().max() > 0.1) == (randomness == "different")
        assert noise.abs().max() > 0.5
    else:
        found, (values, _) = torch.vmap(gradient, (None, 0, 0))(weights, x, noise)
    for n, (item, eps) in enumerate(zip(x, noise, strict=True)):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        value, _ = loop(leaves, item, eps)
        torch.testing.assert_close(values[n], value.detach(), rtol=tolerance, atol=tolerance)
        for name, expected in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            torch.testing.assert_close(found[name][n], expected, rtol=10 * tolerance, atol=tolerance)


def make_noise_from_seeds(monkeypatch):
    """As on a GPU, where each item of a batch has its own seed."""
    monkeypatch.setattr(functional, "_noise", lambda *_: torch.randint(2**63 - 1, (1,)))
    monkeypatch.setattr(functional, "epsilon", lambda tensors, options: epsilon(tensors, options._replace(backend="triton")))


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


NOISES = {"given": (NOISE, "error"), "drawn": (None, "different"), "drawn once": (None, "same")}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("backend", [None, "cpu", pytest.param("triton", marks=pytest.mark.interpreter), "seeds"])
def test_gradients_of_each_item_of_reparameterize_kl(backend, moments, noise, monkeypatch, interpreter_warnings):
    if backend == "seeds":
        make_noise_from_seeds(monkeypatch)
        backend = None
    gradient = func.grad(lambda *args: noise_loss(*args, moments=moments, backend=backend), has_aux=True)
    gradients_of_each_item_are_those_of_a_loop(
        gradient, lambda *args: noise_loss(*args, backend="reference"), WEIGHTS, ROWS, *NOISES[noise], device=device_of(backend)
    )


def vae_of_rows():
    model = VAE.mlp(3, latent_dim=4, hidden=(8,), likelihood=Gaussian(0.7)).double()
    objective = VAEObjective(kl_weight=2)

    def loss(parameters, x, eps=None):
        output = func.functional_call(model, parameters, (x,), {"eps": eps})
        value = objective(output, x).loss
        return value, (value, (output.z - output.mu) / (0.5 * output.logvar).exp())

    return loss, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.interpreter), "seeds"])
def test_gradients_of_each_small_batch_of_a_vae(backend, noise, monkeypatch, interpreter_warnings):
    loss, parameters = vae_of_rows()
    if backend == "seeds":
        make_noise_from_seeds(monkeypatch)
    elif backend:
        monkeypatch.setattr(vae, "reparameterize_kl", functools.partial(fastvae.reparameterize_kl, backend=backend))
    gradients_of_each_item_are_those_of_a_loop(
        func.grad(loss, has_aux=True), loss, parameters, ROWS, *NOISES[noise], device=device_of(backend)
    )


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_compiled_gradients_of_each_small_batch_of_a_vae(noise):
    """On a CPU the noise and the plain formulas are a part of the graph."""
    loss, parameters = vae_of_rows()
    eps, randomness = NOISES[noise]
    gradient = torch.vmap(func.grad(loss, has_aux=True), (None, 0, None if eps is None else 0), randomness=randomness)
    found, (_, drawn) = compiled(gradient, fullgraph=True)(parameters, ROWS, eps)
    expected, _ = torch.vmap(func.grad(loss, has_aux=True), (None, 0, 0))(parameters, ROWS, drawn)
    torch.testing.assert_close(found, expected)


def test_noise_drawn_within_vmap():
    mu = torch.zeros(4, 500, 3)
    z, _ = torch.vmap(fastvae.reparameterize_kl, randomness="different")(mu, mu)
    assert (z[0] != z[1]).all()
    torch.testing.assert_close(z.std((1, 2)), torch.ones(4), rtol=0.1, atol=0)
    z, _ = torch.vmap(lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, backend="triton"), randomness="different")(mu[:2], mu[:2])
    assert (z[0] != z[1]).all()


def test_noise_from_a_seed(monkeypatch, interpreter_warnings):
    """As on a GPU, where the kernels make the noise."""
    mu, logvar = torch.randn(2, 6, 3).unbind()
    seed = torch.tensor([1234])
    monkeypatch.setattr(functional, "_noise", lambda *_: seed)
    monkeypatch.setattr(functional, "epsilon", lambda tensors, options: epsilon(tensors, options._replace(backend="triton")))
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    expected = fastvae.reparameterize_kl(*leaves, backend="triton")
    actual, pull = func.vjp(fastvae.reparameterize_kl, mu, logvar)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(pull(actual), torch.autograd.grad(expected, leaves, [t.detach() for t in expected]))
    torch.testing.assert_close(torch.vmap(fastvae.reparameterize_kl)(mu[None], logvar[None])[0][0], actual[0])


def test_vmap_over_bandwidths_and_weights(x):
    h, weights = torch.tensor([0.5, 1.0, 2.0]), torch.rand(3, 6, dtype=x.dtype).softmax(1)
    expected = torch.stack([fastvae.mmd(x, y, bandwidth=one) for one in h])
    torch.testing.assert_close(torch.vmap(lambda h: fastvae.mmd(x, y, bandwidth=h))(h), expected)
    slopes = torch.vmap(func.grad(lambda h: fastvae.mmd(x, y, bandwidth=h)))(h)
    torch.testing.assert_close(slopes, torch.stack([func.grad(lambda h: fastvae.mmd(x, y, bandwidth=h))(one) for one in h]))
    unbiased = torch.vmap(lambda w: fastvae.mmd(x, y, x_weights=w, estimator="unbiased"))(weights)
    torch.testing.assert_close(unbiased, torch.stack([fastvae.mmd(x, y, x_weights=w, estimator="unbiased") for w in weights]))


def test_vmap_over_groups(x):
    groups = torch.stack([labels, 1 - labels, labels.flip(0)])
    actual = torch.vmap(lambda groups: fastvae.group_mmd(x, groups, num_groups=2).mean())(groups)
    torch.testing.assert_close(actual, torch.stack([fastvae.group_mmd(x, one).mean() for one in groups]))
    with pytest.raises(ValueError, match=r"num_groups must be given inside torch.compile and torch.vmap, got None"):
        torch.vmap(lambda groups: fastvae.group_mmd(x, groups).mean())(groups)


def test_constants_that_require_grad_outside_of_vmap(x):
    h, weights = torch.ones(2, dtype=x.dtype), torch.full((2, 6), 1 / 6, dtype=x.dtype)
    with pytest.raises(ValueError, match="bandwidth must be constant"):
        func.grad(lambda h: torch.vmap(lambda h: fastvae.group_mmd(x, labels, bandwidth=h).mean())(h).sum())(h)
    with pytest.raises(ValueError, match="x_weights must be constant"):
        func.grad(lambda w: torch.vmap(lambda w: fastvae.mmd(x, y, x_weights=w))(w).sum())(weights)


def test_modules(x):
    loss = MMDLoss(bandwidth=2.0)
    torch.testing.assert_close(func.grad(lambda x: func.functional_call(loss, {}, (x, y)))(x), func.grad(lambda x: loss(x, y))(x))
