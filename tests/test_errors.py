"""Every bad call gives one clear sentence: the argument, the rule, what was received."""

import functools
import inspect
import re
import types
from typing import get_args

import pytest
import torch

import fastvae
from fastvae import checks, recipes, schedules
from fastvae.radial import KERNEL_NAMES

X, Y = torch.zeros(4, 3), torch.zeros(5, 3)
HALF = torch.full((4,), 0.25)
MEAN = fastvae.KernelMean(Y, norm=1.0, bandwidth=1.0)

BAD_MMD = [
    ((None, Y), {}, TypeError, "x must be a torch.Tensor, got NoneType"),
    (([[1.0]], Y), {}, TypeError, "x must be a torch.Tensor, got list"),
    ((X.long(), Y), {}, TypeError, "x must have dtype float64, float32, bfloat16 or float16, got torch.int64"),
    ((X, Y.to(torch.complex64)), {}, TypeError, "y must have dtype float64, float32, bfloat16 or float16, got torch.complex64"),
    ((X[0], Y), {}, ValueError, "x must have shape (..., rows, features), got (3,)"),
    ((X[None], Y), {}, ValueError, "x and y must have the same batch dimensions, got shapes (1, 4, 3) and (5, 3)"),
    ((X[:0], Y), {}, ValueError, "x must have at least one row and one feature, got shape (0, 3)"),
    ((X, Y[:, :0]), {}, ValueError, "y must have at least one row and one feature, got shape (5, 0)"),
    ((X, Y[:, :2]), {}, ValueError, "x and y must have the same number of features, got shapes (4, 3) and (5, 2)"),
    ((X, Y.double()), {}, TypeError, "x and y must have the same dtype, got torch.float32 and torch.float64"),
    ((X, Y.to("meta")), {}, ValueError, "x and y must be on the same device, got cpu and meta"),
    ((X, Y), {"bandwidth": 0.0}, ValueError, "bandwidth must be greater than 0, got 0"),
    ((X, Y), {"bandwidth": [1.0, -2.0]}, ValueError, "bandwidth must be greater than 0, got -2"),
    ((X, Y), {"bandwidth": float("nan")}, ValueError, "bandwidth must be finite, got nan"),
    ((X, Y), {"bandwidth": float("inf")}, ValueError, "bandwidth must be finite, got inf"),
    ((X, Y), {"bandwidth": []}, ValueError, "bandwidth must hold at least one value, got none"),
    ((X, Y), {"bandwidth": "medain"}, ValueError, "bandwidth must be a number, several, or one of 'median', 'mean', got 'medain'"),
    ((X, Y), {"bandwidth": ["median"]}, TypeError, "bandwidth must be a number, got str"),
    ((X, 0 * Y), {"bandwidth": "median"}, ValueError, "the median distance between rows must be greater than 0 to be a bandwidth"),
    ((X, 0 * Y), {"bandwidth": "mean"}, ValueError, "the mean distance between rows must be greater than 0 to be a bandwidth, got 0"),
    ((X, Y), {"bandwidth": True}, TypeError, "bandwidth must be a number, got bool"),
    ((X, Y), {"bandwidth": torch.tensor([1.0, 0.0])}, ValueError, "bandwidth must be greater than 0, got 0"),
    (
        (X, Y),
        {"bandwidth": torch.ones(2, 2)},
        ValueError,
        "bandwidth must be a scalar, a vector of bandwidths for all problems, or one bandwidth for each problem, shape (1,) here, "
        "got shape (2, 2)",
    ),
    (
        (X[None], Y[None]),
        {"bandwidth": torch.ones(1, 2)},
        ValueError,
        "bandwidth must be a scalar, a vector of bandwidths for all problems, or one bandwidth for each problem, shape (1, 1) here, "
        "got shape (1, 2)",
    ),
    ((X[None], Y[None]), {"bandwidth": torch.zeros(1, 1)}, ValueError, "bandwidth must be greater than 0, got 0"),
    ((X[None], Y[None]), {"bandwidth": torch.ones(1, 1, dtype=torch.long)}, TypeError, "bandwidth must have dtype float64"),
    (
        (X[None], Y[None]),
        {"bandwidth": torch.ones(1, 1), "kernel": "polynomial"},
        ValueError,
        "kernel must be a function of the distance for a bandwidth for each problem, got 'polynomial'",
    ),
    ((X, Y), {"bandwidth": torch.ones(1, dtype=torch.long)}, TypeError, "bandwidth must have dtype float64"),
    ((X, Y), {"bandwidth_weights": [1.0, 2.0]}, ValueError, "bandwidth_weights must have one value for each bandwidth, got 2 for 1"),
    (
        (X, Y),
        {"kernel": "rfb"},
        ValueError,
        f"kernel must be one of {', '.join(map(repr, KERNEL_NAMES))}, got 'rfb'",
    ),
    ((X, Y), {"estimator": "u"}, ValueError, "estimator must be one of 'biased', 'unbiased', 'linear', got 'u'"),
    ((X, Y), {"kernel": 2}, TypeError, "kernel must be a name or a fastvae.radial.Kernel, got int"),
    ((X, Y), {"estimator": "linear"}, ValueError, "x and y must have the same number of rows for estimator='linear', got 4 and 5"),
    ((X, Y), {"estimator": "linear", "x_weights": HALF}, ValueError, "x_weights must be None for estimator='linear', got weights"),
    ((X, Y), {"precision": "low"}, ValueError, "precision must be one of None, 'highest', 'high', 'medium', 'ieee', got 'low'"),
    ((X, Y), {"backend": "cuda"}, ValueError, "backend must be one of None, 'cpu', 'triton', 'reference', 'inductor', got 'cuda'"),
    (
        (X[:1], Y),
        {"estimator": "unbiased"},
        ValueError,
        "x must have at least two rows for estimator='unbiased', got 1: use estimator='biased'",
    ),
    ((X, Y[:1]), {"estimator": "unbiased"}, ValueError, "y must have at least two rows for estimator='unbiased', got 1"),
    (
        (X, Y),
        {"x_weights": HALF[:3]},
        ValueError,
        "x_weights must have one value for each row of x, shape (4,), got (3,)",
    ),
    ((X, Y), {"x_weights": 2 * HALF}, ValueError, "x_weights must sum to one, got a sum of 2: divide by x_weights.sum(-1, keepdim=True)"),
    (
        (X, Y),
        {"x_weights": torch.eye(4)[0], "estimator": "unbiased"},
        ValueError,
        "x_weights must have at least two nonzero values for estimator='unbiased', got one: use estimator='biased'",
    ),
    (
        (X, Y),
        {"bandwidth": 1e160},
        ValueError,
        "bandwidth must be between 1e-30 and 1e30, so that its powers do not overflow, got 1e+160",
    ),
    (
        (X, Y),
        {"bandwidth": torch.tensor([1.0, 1e-16])},
        ValueError,
        "bandwidth must hold values within a factor of 1e15 of one another, got 1e-16 and 1",
    ),
    ((X, Y), {"bandwidth": 10**400}, ValueError, "bandwidth must be finite, got inf"),
    ((X, Y), {"x_weights": [0.25] * 4}, TypeError, "x_weights must be a torch.Tensor, got list"),
    ((X, Y), {"x_weights": HALF.to("meta")}, ValueError, "x_weights and x must be on the same device, got meta and cpu"),
    ((X, Y), {"x_weights": HALF.clone().requires_grad_()}, ValueError, "x_weights must be constant, got a tensor that requires grad"),
    ((X, MEAN), {"bandwidth": 2.0}, ValueError, "bandwidth must be left out where y is a KernelMean, which has its own, got 2.0"),
    ((X, MEAN), {"bandwidth_weights": [1.0]}, ValueError, "bandwidth_weights must be left out where y is a KernelMean"),
    ((X, MEAN), {"kernel": "imq"}, ValueError, "kernel must be left out where y is a KernelMean, which has its own, got 'imq'"),
    ((X, MEAN), {"y_weights": HALF}, ValueError, "y_weights must be left out where y is a KernelMean"),
    ((X[:, :2], MEAN), {}, ValueError, "x and the KernelMean must have the same number of features, got shapes (4, 2) and (5, 3)"),
    ((X.expand(2, 4, 3), MEAN), {}, ValueError, "x must have shape (rows, features), got (2, 4, 3)"),
    ((X.to("meta"), MEAN), {}, ValueError, "x and the KernelMean must be on the same device, got meta and cpu"),
    ((X, MEAN), {"estimator": "linear"}, ValueError, "estimator must be one of 'biased', 'unbiased', got 'linear'"),
    ((X[:1], MEAN), {"estimator": "unbiased"}, ValueError, "x must have at least two rows for estimator='unbiased', got 1"),
    ((X, MEAN), {"x_weights": 2 * HALF}, ValueError, "x_weights must sum to one, got a sum of 2"),
]
# (arguments of KernelMean.fit, its options, error, start of the message)
BAD_FIT = [
    ((X.numpy(),), {}, TypeError, "pool must be a torch.Tensor, got ndarray: torch.from_numpy(pool)"),
    (
        (X,),
        {"landmarks": 60_000},
        ValueError,
        "landmarks must be at most 32768, got 60000, whose kernel matrix takes 27 GiB: use fewer or method='all'",
    ),
    ((3,), {}, TypeError, "pool must be a torch.Tensor or an iterable of tensors, got int"),
    (([],), {}, ValueError, "pool must hold at least one batch, got none"),
    (([X, Y.double()],), {}, TypeError, "a batch of pool and the one before must have the same dtype, got torch.float64 and torch.float32"),
    (([X, Y[:, :2]],), {}, ValueError, "a batch of pool and the one before must have the same number of features"),
    (([3],), {}, TypeError, "a batch of pool must be a torch.Tensor, got int"),
    ((X[0],), {}, ValueError, "pool must have shape (rows, features), got (3,)"),
    ((X / 0,), {}, ValueError, "pool must be finite, got a nan or an infinity"),
    ((X,), {"landmarks": 0}, ValueError, "landmarks must be at least 1, got 0"),
    ((X,), {"landmarks": Y[:, :2], "bandwidth": 1.0}, ValueError, "pool and landmarks must have the same number of features"),
    ((X,), {"method": "random"}, ValueError, "method must be one of 'nystrom', 'all', got 'random'"),
    ((X,), {"kernel": "energy"}, ValueError, "kernel must be positive definite for the Nyström approximation, got 'energy'"),
    ((X,), {"ridge": 0}, ValueError, "ridge must be greater than 0, got 0"),
    (
        (X,),
        {"ridge": 1e-300, "landmarks": X[[0, 0]], "bandwidth": 1.0},
        ValueError,
        "ridge must make the kernel matrix of the landmarks positive definite, got 1e-300: pass a larger one",
    ),
    ((X,), {"norm_rows": 1}, ValueError, "norm_rows must be at least 2, got 1"),
    ((X,), {"kmeans_iterations": 0}, ValueError, "kmeans_iterations must be at least 1, got 0"),
    (
        (iter([X, Y]),),
        {"norm_rows": 2, "kmeans_rows": 5, "landmarks": 2, "bandwidth": 1.0},
        ValueError,
        "pool must be iterable twice, as a list or a DataLoader is, if it has more rows than are drawn, 5, got an iterator over 9 rows",
    ),
]


@pytest.mark.parametrize(("pool", "options", "error", "sentence"), BAD_FIT, ids=[case[3][:60] for case in BAD_FIT])
def test_fit_of_a_kernel_mean(pool, options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.KernelMean.fit(*pool, **options)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_kernel_mean():
    for arguments, options, error, sentence in (
        ((X[0],), {}, ValueError, "points must have shape (rows, features), got (3,)"),
        ((X, HALF[:2]), {}, ValueError, "weights must have one number for each of the 4 points, got shape (2,)"),
        ((X,), {"norm": "1"}, TypeError, "norm must be a number, got str"),
        (
            (X,),
            {"bandwidth": "median"},
            ValueError,
            "bandwidth must be a number or several for a KernelMean that is not fitted",
        ),
    ):
        with pytest.raises(error) as caught:
            fastvae.KernelMean(*arguments, **{"norm": 1.0, "bandwidth": 1.0, **options})
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("points", "options", "error", "sentence"), BAD_MMD, ids=[case[3][:60] for case in BAD_MMD])
def test_mmd(points, options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.mmd(*points, **options)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


POSITIVE = "one of 'rbf', 'imq', 'rational_quadratic', 'laplace', 'matern32', 'matern52', 'gaussian',"


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: fastvae.log_kernel_density(X, Y, kernel="energy"),
            ValueError,
            f"kernel must be {POSITIVE} for log_kernel_density, got 'energy'",
        ),
        (
            lambda: fastvae.kernel_matmul(X, Y, Y, kernel="polynomial", normalize="rows"),
            ValueError,
            f"kernel must be {POSITIVE} for normalize, got 'polynomial'",
        ),
        (
            lambda: fastvae.log_kernel_density(X, Y, kernel="laplace", normalized=True),
            ValueError,
            "kernel with normalized=True must be one of 'rbf', got 'laplace'",
        ),
        (
            lambda: fastvae.log_kernel_density(X, Y, y_weights=HALF),
            ValueError,
            "y_weights must have one value for each row of y, shape (5,), got (4,)",
        ),
        (
            lambda: fastvae.log_kernel_density(X, Y, y_weights=Y[:, 0].double()),
            TypeError,
            "y and y_weights must have the same dtype, got torch.float32 and torch.float64",
        ),
        (
            lambda: fastvae.kernel_matmul(X, Y, Y, normalize="row"),
            ValueError,
            "normalize must be one of 'rows', 'columns', 'both', got 'row'",
        ),
        (
            lambda: fastvae.kernel_matmul(X, Y, Y, bandwidth=torch.ones(1, requires_grad=True), normalize="rows"),
            ValueError,
            "bandwidth must be constant, got a tensor that requires grad: pass bandwidth.detach()",
        ),
        (
            lambda: fastvae.kernel_matmul(X[None], Y[None], Y),
            ValueError,
            "v must have shape (1, 5, columns), the rows of y, got (5, 3)",
        ),
    ],
)
def test_normalised_kernels(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"mu": X[0], "logvar": X[0]}, ValueError, "mu must have shape (..., features), two dimensions or more, got (3,)"),
        ({"mu": X[:0], "logvar": X[:0]}, ValueError, "mu must have at least one row and one feature, got shape (0, 3)"),
        ({"logvar": X[:, :1]}, ValueError, "mu and logvar must have the same shape, got (4, 3) and (4, 1)"),
        ({"logvar": X.double()}, TypeError, "mu and logvar must have the same dtype, got torch.float32 and torch.float64"),
        ({"logvar": 1.0}, TypeError, "logvar must be a torch.Tensor, got float"),
        ({"eps": Y}, ValueError, "mu and eps must have the same shape, got (4, 3) and (5, 3)"),
        ({"eps": X, "generator": torch.Generator()}, ValueError, "generator must be None where eps is given, got both: pass one of them"),
        ({"eps": X.clone().requires_grad_()}, ValueError, "eps must be constant, got a tensor that requires grad: pass eps.detach()"),
        ({"backend": "gpu"}, ValueError, "backend must be one of None, 'cpu', 'triton', 'reference', 'inductor', got 'gpu'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_reparameterize_kl(options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.reparameterize_kl(**{"mu": X, "logvar": X} | options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"z": [[1.0]]}, TypeError, "z must be a torch.Tensor, got list"),
        ({"z": X[0]}, ValueError, "z must have shape (rows, features), got (3,)"),
        ({"z": X[:0]}, ValueError, "z must have at least one row and one feature, got shape (0, 3)"),
        ({"mu": 1.0}, TypeError, "mu must be a torch.Tensor, got float"),
        ({"logvar": X.long()}, TypeError, "logvar must have dtype float64, float32, bfloat16 or float16, got torch.int64"),
        ({"mu": Y}, ValueError, "z and mu must have the same shape, got (4, 3) and (5, 3)"),
        ({"logvar": X[:, :1]}, ValueError, "z and logvar must have the same shape, got (4, 3) and (4, 1)"),
        ({"mu": X.double()}, TypeError, "z and mu must have the same dtype, got torch.float32 and torch.float64"),
        ({"logvar": X.to("meta")}, ValueError, "z and logvar must be on the same device, got cpu and meta"),
        ({"dataset_size": 3}, ValueError, "dataset_size must be at least the number of rows of z, 4, got 3"),
        ({"dataset_size": 0}, ValueError, "dataset_size must be at least 1, got 0"),
        ({"dataset_size": 10.0}, TypeError, "dataset_size must be an integer, got float"),
        (
            {"estimator": "mws"},
            ValueError,
            "estimator must be one of 'minibatch_weighted', 'minibatch_stratified', got 'mws'",
        ),
        (
            {"z": X[:1], "mu": X[:1], "logvar": X[:1], "estimator": "minibatch_stratified"},
            ValueError,
            "z must have at least two rows for estimator='minibatch_stratified', got 1: use estimator='minibatch_weighted'",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of None, 'cpu', 'triton', 'reference', got 'gpu'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_total_correlation(options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.total_correlation(**{"z": X, "mu": X, "logvar": X, "dataset_size": 10} | options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"z": [[1.0]]}, TypeError, "z must be a torch.Tensor, got list"),
        ({"z": X[0]}, ValueError, "z must have shape (..., rows, features), got (3,)"),
        (
            {"z": X[:1], "estimator": "unbiased"},
            ValueError,
            "z must have at least two rows for estimator='unbiased', got 1: use estimator='biased'",
        ),
        ({"estimator": "linear"}, ValueError, "estimator must be one of 'biased', 'unbiased', got 'linear'"),
        (
            {"kernel": "laplace"},
            ValueError,
            "kernel must be 'rbf', 'gaussian', 'imq' or 'rational_quadratic' for a Stein discrepancy, which takes derivatives at distance "
            "zero, got 'laplace'",
        ),
        ({"bandwidth": "median"}, ValueError, "bandwidth must be a number or several, got 'median': pass fastvae.median_bandwidth(z)"),
        ({"bandwidth": 1e-9}, ValueError, "bandwidth must be between 1e-8 and 1e8 for a Stein discrepancy, got 1e-09"),
        (
            {"bandwidth": torch.ones(1, requires_grad=True)},
            ValueError,
            "bandwidth must be constant, got a tensor that requires grad: pass bandwidth.detach()",
        ),
        (
            {"bandwidth_weights": torch.ones(1, requires_grad=True)},
            ValueError,
            "bandwidth_weights must be constant, got a tensor that requires grad: pass bandwidth_weights.detach()",
        ),
        ({"backend": "inductor"}, ValueError, "backend must be one of None, 'cpu', 'triton', 'reference', got 'inductor'"),
        (
            {"process_group": "all"},
            TypeError,
            "process_group must be a torch.distributed.ProcessGroup that this process is in, got str",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_ksd_to_normal(options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.ksd_to_normal(**{"z": X} | options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"z": [1.0]}, TypeError, "z must be a torch.Tensor, got list"),
        ({"z": X[0]}, ValueError, "z must have shape (..., rows, features), got (3,)"),
        ({"z": X[:0]}, ValueError, "z must have at least one row and one feature, got shape (0, 3)"),
        ({"directions": X}, ValueError, "directions must have shape (3, slices), one row for each feature of z, got (4, 3)"),
        (
            {"directions": X[:3].clone().requires_grad_()},
            ValueError,
            "directions must be constant, got a tensor that requires grad: pass directions.detach()",
        ),
        ({"directions": X[:3].to("meta")}, ValueError, "directions must be on the device of z, cpu, got meta"),
        ({"num_slices": 0}, ValueError, "num_slices must be at least 1, got 0"),
        ({"num_points": 1}, ValueError, "num_points must be at least 2, got 1"),
        ({"num_points": 9.0}, TypeError, "num_points must be an integer, got float"),
        ({"t_max": 0}, ValueError, "t_max must be greater than 0, got 0"),
        ({"t_min": -2}, ValueError, "t_min must be 0 or -t_max, here -3.0, got -2.0"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"precision": "low"}, ValueError, "precision must be one of None, 'highest', 'high', 'medium', 'ieee', got 'low'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of None, 'cpu', 'triton', 'reference', got 'gpu'"),
        ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup that this process is in, got int"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_sigreg(options, error, sentence):
    with pytest.raises(error) as caught:
        fastvae.sigreg(**{"z": X} | options)
    assert str(caught.value) == sentence
    if "num_slices" in options:
        with pytest.raises(error, match="num_slices must be at least 1, got 0"):
            fastvae.SIGReg(0)


def test_a_sentence_asks_whether_images_were_meant():
    x = torch.randn(4, 3, 8, 8)
    sample = r"x of shape \(4, 3, 8, 8\) is treated as a batch of 12 samples, each with 8 rows and 8 features: pass x.flatten"
    with pytest.warns(UserWarning, match=sample) as caught:
        assert fastvae.mmd_to_normal(x).shape == (4, 3)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="is treated as a batch of 12 samples"):
        torch.testing.assert_close(fastvae.mmd(x, x + 1).flatten(), fastvae.mmd(x.flatten(0, -3), x.flatten(0, -3) + 1))
    one_kl = r"mu of shape \(4, 3, 8, 8\) has a KL of shape \(4, 3, 8\), summed over its last dimension alone: pass kl_dims='all'"
    with pytest.warns(UserWarning, match=one_kl) as caught:
        assert fastvae.reparameterize_kl(x, x)[1].shape == (4, 3, 8)
    assert caught[0].filename == __file__
    # What is asked for says no more, as warnings are errors here.
    assert fastvae.reparameterize_kl(x, x, kl_dims=())[1].shape == x.shape
    assert fastvae.reparameterize_kl(x, x, kl_dims="all")[1].shape == (4,)
    assert fastvae.reparameterize_kl(x, x, kl_dims=(-1,))[1].shape == (4, 3, 8)
    assert fastvae.mmd_to_normal(x.flatten(1)).shape == ()


def test_normal_refuses_what_mmd_refuses():
    with pytest.raises(ValueError, match="x must have at least two rows for estimator='unbiased', got 1"):
        fastvae.mmd_to_normal(X[:1], estimator="unbiased")


def test_loss_refuses_when_it_is_made():
    with pytest.raises(ValueError, match="estimator must be one of"):
        fastvae.MMDLoss(estimator="u")
    with pytest.raises(ValueError, match="bandwidth must be greater than 0"):
        fastvae.MMDLoss(bandwidth=-1.0)
    with pytest.raises(ValueError, match="bandwidth must be a number, several, or one of 'median', 'mean', got 'scott'"):
        fastvae.MMDLoss(bandwidth="scott")
    with pytest.raises(ValueError, match=r"closed form against N\(0, I\), got 'median': pass fastvae.median_bandwidth\(x\), or"):
        fastvae.MMDLoss(bandwidth="median")(X)
    with pytest.raises(ValueError, match="y_weights must be None if y is None"):
        fastvae.MMDLoss()(X, y_weights=HALF)


def test_modules_show_their_process_group():
    group = types.SimpleNamespace(group_name="workers")
    for module in (fastvae.MMDLoss(), fastvae.SIGReg(), fastvae.VAEObjective.vae()):
        assert "process_group" not in repr(module)
        module.process_group = group
        assert "process_group=workers" in repr(module)


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' must have tensors on a CUDA device, got cpu"):
        fastvae.mmd(X, Y, backend="triton")


def test_weights_that_sum_to_one_within_rounding_pass():
    n = 100_000
    weights = torch.rand(n)
    assert fastvae.mmd(torch.zeros(n, 1)[:1], torch.zeros(1, 1), backend="reference").item() == 0
    fastvae.checks.sum_of_weights("w", weights / weights.sum())


def arguments():
    """(where, annotation) of each argument of the public functions and classes."""
    for module in (fastvae, recipes, schedules):
        for name, item in vars(module).items():
            if name.startswith("_") or not getattr(item, "__module__", "").startswith("fastvae"):
                continue
            methods = vars(item).values() if inspect.isclass(item) else [item]
            for function in (getattr(method, "__func__", method) for method in methods):
                if inspect.isfunction(function) and (function.__name__ == "__init__" or not function.__name__.startswith("_")):
                    for argument, annotation in inspect.get_annotations(function).items():
                        if argument != "return":
                            yield f"{name}, {function.__name__}({argument})", str(annotation)


def test_types_list_the_options():
    found = dict(arguments())
    assert found["mmd, mmd(estimator)"] == "checks.MMDEstimator"
    assert found["VAE, __init__(posterior)"] == "Posterior"
    free = {where for where, annotation in found.items() if re.search(r"(?<!dict\[)\bstr\b", annotation)}
    paths = {"VAE, save_pretrained(folder)", "VAE, from_pretrained(folder)", "KernelMean, save(path)", "KernelMean, load(path)"}
    assert free == paths


VAE = fastvae.VAE.mlp(3, latent_dim=2, hidden=(4,))
FLAGS = {
    "DiagonalGaussianDistribution, __init__(deterministic)": lambda flag: fastvae.DiagonalGaussianDistribution(X[:, :2], flag),
    "Gaussian, __init__(learned)": lambda flag: fastvae.Gaussian(learned=flag),
    "Gaussian, __init__(optimal)": lambda flag: fastvae.Gaussian(optimal=flag),
    "ImportanceWeighted, forward(all_terms)": lambda flag: fastvae.VAEObjective.iwae(2)(VAE(X, samples=2), X, all_terms=flag),
    "SIGReg, __init__(scale_by_n)": lambda flag: fastvae.SIGReg(scale_by_n=flag),
    "VAE, encode(prepared)": lambda flag: VAE.encode(X, prepared=flag),
    "VAE, forward(prepared)": lambda flag: VAE(X, prepared=flag),
    "VAE, log_likelihood(prepared)": lambda flag: VAE.log_likelihood(X, prepared=flag),
    "VAEObjective, forward(all_terms)": lambda flag: fastvae.VAEObjective.vae()(VAE(X), X, all_terms=flag),
    "cmmd, cmmd(normalize)": lambda flag: recipes.cmmd(X, Y, normalize=flag),
    "dan, dan(linear)": lambda flag: recipes.dan(X, X, linear=flag),
    "log_kernel_density, log_kernel_density(normalized)": lambda flag: fastvae.log_kernel_density(X, Y, normalized=flag),
    "mean_bandwidth, mean_bandwidth(self_pairs)": lambda flag: fastvae.mean_bandwidth(X, self_pairs=flag),
    "median_bandwidth, median_bandwidth(self_pairs)": lambda flag: fastvae.median_bandwidth(X, self_pairs=flag),
    "mmd_gan, mmd_gan(biased)": lambda flag: recipes.mmd_gan(X, Y, biased=flag),
    "mmd_gan_mix, mmd_gan_mix(biased)": lambda flag: recipes.mmd_gan_mix(X, Y, biased=flag),
    "mmdagg, mmdagg(permutations_same_sample_size)": lambda flag: recipes.mmdagg(X, Y, permutations_same_sample_size=flag),
    "sigreg, sigreg(scale_by_n)": lambda flag: fastvae.sigreg(X, scale_by_n=flag),
}


def test_each_flag_is_tested():
    assert {where for where, annotation in arguments() if annotation == "bool"} == set(FLAGS)


@pytest.mark.parametrize("where", FLAGS)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags(where, value):
    name = where[:-1].partition("(")[2]
    with pytest.raises(TypeError, match=f"{name} must be "):
        FLAGS[where](value)


def test_names_of_kernels():
    assert set(get_args(checks.KernelName)) == set(KERNEL_NAMES)
    x, y = torch.randn(5, 2), torch.randn(6, 2)
    for function in (fastvae.mmd, fastvae.reference.mmd, fastvae.MMDLoss(kernel="gaussian"), functools.partial(fastvae.witness, x)):
        options = {} if isinstance(function, fastvae.MMDLoss) else {"kernel": "gaussian"}
        plain = fastvae.MMDLoss() if options == {} else function
        torch.testing.assert_close(function(x, y, **options), plain(x, y), rtol=0, atol=0)
    assert fastvae.VAEObjective(kernel="gaussian").kernel == fastvae.radial.RBF()
    assert isinstance(fastvae.VAEObjective(kernel="gaussian").kernel, fastvae.Kernel)
    torch.testing.assert_close(fastvae.mmd_to_normal(x, kernel="gaussian"), fastvae.mmd_to_normal(x))


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (lambda: fastvae.VAE.mlp(12, latent_dim=3, hidden=400), TypeError, "hidden must be a sequence of integers, got int"),
        (lambda: fastvae.VAE.conv(28, latent_dim=3), TypeError, "shape must be a sequence of integers, got int"),
        (lambda: fastvae.VAE.conv((1, 8, 8), latent_dim=3, channels=8), TypeError, "channels must be a sequence of integers, got int"),
        (
            lambda: fastvae.VAE.conv((1, 8, 8), latent_dim=3, channels=(0, 4)),
            ValueError,
            "every size of channels must be at least 1, got 0",
        ),
        (lambda: fastvae.VAE.conv((1, 8.0, 8), latent_dim=3), TypeError, "every size of shape must be an integer, got float"),
    ],
)
def test_vae_builders(build, error, sentence):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == sentence


# The arguments that a call needs, valid ones.
Z = torch.arange(12.0).view(4, 3)
CALLED = {
    "mmd": (Z, Z),
    "mmd_to_normal": (Z,),
    "kernel_matmul": (Z, Z, Z),
    "witness": (Z, Z, Z),
    "group_mmd": (Z, torch.tensor([0, 0, 1, 1])),
    "log_kernel_density": (Z, Z),
    "ksd_to_normal": (Z,),
    "sigreg": (Z,),
    "reparameterize_kl": (Z, Z),
    "reparameterize_kl_moments": (Z[:, :2],),
    "gaussian_kl": (Z, Z),
    "DiagonalGaussianDistribution": (Z[:, :2],),
    "median_bandwidth": (Z,),
    "mean_bandwidth": (Z,),
    "two_sample_test": (Z, Z),
    "MMDLoss": (),
    "SIGReg": (),
    "VAEObjective": (),
    "VAEObjective.vae": (),
    "VAEObjective.beta_vae": (2.0,),
    "VAEObjective.info_vae": (0.5, 3.0),
    "VAEObjective.mmd_vae": (2.0,),
    "VAEObjective.wae_mmd": (2.0,),
    "VAEObjective.beta_tc_vae": (2.0, 9),
    "VAEObjective.capacity_vae": (2.0, 3.0),
    "VAEObjective.dip_vae": (2.0,),
    "VAEObjective.iwae": (2,),
    "KernelMean": {"points": Z, "norm": 1.0, "bandwidth": 1.0},
    "KernelMean.fit": (Z,),
    "RandomFeatures": (2,),
    "NystromFeatures": (2,),
    "Gaussian": (),
    "Laplace": (),
    "VAE.mlp": {"shape": 4, "latent_dim": 2},
    "VAE.conv": {"shape": (1, 8, 8), "latent_dim": 2},
}
CALLED |= {f"recipes.{name}": (Z, Z) for name in ("alibi_detect", "cmmd", "dan", "deepda", "drifting", "geomloss", "mmdagg", "mmd_gan")}
CALLED |= {f"recipes.{name}": (Z, Z) for name in ("mmd_gan_mix", "pythae", "pytorch_adapt", "pytorch_vae", "stable_audio", "wae")}


def refusal(function, arguments):
    """The sentence of its error, or an empty one."""
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CALLED)
def test_an_error_names_an_argument_of_the_call(name):
    """Also where the value is an array, which has no single truth value."""
    function = functools.reduce(getattr, name.split("."), fastvae)
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    valid = CALLED[name] if isinstance(CALLED[name], dict) else dict(zip(parameters, CALLED[name], strict=False))
    for parameter in parameters:
        for bad in (object(), "bad", -2.0, Z.numpy(), Z, torch.zeros(0, 3), torch.zeros(3, dtype=torch.long)):
            sentence = refusal(function, valid | {parameter: bad})
            rule, _, received = sentence.partition(", got ")
            assert "\n" not in sentence
            assert not sentence or parameter in rule
            named = re.findall(r"(?<!\.)\b([a-z_]+)=", f"{rule} {received.partition(':')[2]}")
            assert set(named) <= set(parameters), sentence
