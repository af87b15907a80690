"""What the kernels read and write: nothing outside of their tensors, no place of which another program of the launch writes, and none that
nothing has written to.

Triton's interpreter runs one program after another, on raw addresses: it would show neither. `compute-sanitizer` does, on a GPU.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastvae
from fastvae.checks import triton_interpreter
from tests.cases import evaluate, without_few_pairs

pytestmark = [
    pytest.mark.skipif(not triton_interpreter(), reason="needs Triton's interpreter"),
    pytest.mark.interpreter,
    pytest.mark.usefixtures("interpreter_warnings"),
]


class Launch:
    """The tensors of a launch, and what each of its programs has read and written, as sorted addresses."""

    def __init__(self, name, tensors):
        self.name = name
        ends = [(t.data_ptr(), t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))))
                for t in tensors if t.numel()]  # fmt: skip
        self.starts, self.ends = (np.array(sorted(column), dtype=np.uint64) for column in zip(*ends, strict=True))
        self.read, self.written = {}, {}

    def visit(self, program, places, pointers, mask, size):
        addresses = np.unique(pointers[np.broadcast_to(mask, pointers.shape).astype(bool)])
        # Tensors of a launch may be parts of one, so that ranges overlap: an address is inside where more have started than ended.
        inside = np.searchsorted(self.starts, addresses, "right") > np.searchsorted(self.ends, addresses + np.uint64(size - 1), "right")
        assert inside.all(), f"{self.name}, program {program}: {(~inside).sum()} of {inside.size} addresses are in no tensor"
        places.setdefault(program, []).append(addresses)

    def finish(self):
        written = {program: np.unique(np.concatenate(parts)) for program, parts in self.written.items()}
        if not written:
            return
        places, counts = np.unique(np.concatenate(list(written.values())), return_counts=True)
        assert (counts == 1).all(), f"{self.name}: two programs write the same place"
        for program, parts in self.read.items():
            others = np.setdiff1d(places, written.get(program, []), assume_unique=True)
            assert not np.isin(np.concatenate(parts), others).any(), f"{self.name}: program {program} reads what another writes"


@contextmanager
def watched(monkeypatch):
    from triton.runtime import interpreter

    launches = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, init = executor.__call__, executor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_args(self, args, kwargs):
        found = init(self, args, kwargs)
        launches.append(Launch(self.fn.__name__, [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]))
        return found

    def called(self, *args, **kwargs):
        call(self, *args, **kwargs)
        launches[-1].finish()

    def visit(self, places, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        launches[-1].visit(tuple(self.grid_idx), getattr(launches[-1], places), np.asarray(pointers.data), np.asarray(mask.data), size)

    def masked_load(self, ptrs, mask, *rest):
        visit(self, "read", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        visit(self, "written", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", init_args)
        patch.setattr(executor, "__call__", called)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        yield launches


def rows(*shape):
    return torch.randn(shape)


CALLS = {
    "mmd": (lambda x, y: fastvae.mmd(x, y, backend="triton"), rows(70, 5), rows(33, 5)),
    "mmd, small bandwidth": (lambda x, y: fastvae.mmd(x, y, bandwidth=0.01, backend="triton"), rows(70, 17), rows(3, 17)),
    "mmd, weights and bandwidths": (
        lambda x, y: fastvae.mmd(
            x, y, bandwidth=[1.0, 2.0, 3.1], x_weights=torch.arange(70.0).softmax(0), estimator="unbiased", backend="triton"
        ),
        rows(70, 5).double(),
        rows(33, 5).double(),
    ),
    "mmd, batch": (lambda x, y: fastvae.mmd(x, y, kernel="laplace", backend="triton").sum(), rows(3, 5, 4), rows(3, 66, 4)),
    "mmd, value": (lambda x, y: fastvae.mmd(x.detach(), y, precision="high", backend="triton"), rows(130, 65), rows(1, 65)),
    "mmd, many chunks": (lambda x, y: fastvae.mmd(x, y, kernel="polynomial", backend="triton"), rows(520, 2), rows(7, 2)),
    "mmd_to_normal": (lambda x: fastvae.mmd_to_normal(x, bandwidth=[1.0, 2.0], backend="triton"), rows(70, 5)),
    "kernel_matmul": (lambda x, y, v: fastvae.kernel_matmul(x, y, v, backend="triton").sum(), rows(70, 5), rows(33, 5), rows(33, 3)),
    "kernel_matmul, sweeps of bfloat16": (
        lambda x, y, v: fastvae.kernel_matmul(x, y, v, precision="medium", backend="triton").sum(),
        rows(70, 5),
        rows(33, 5),
        rows(33, 3),
    ),
    "kernel_matmul, small bandwidth": (
        lambda x, y, v: fastvae.kernel_matmul(x, y, v, bandwidth=0.01, kernel="imq", backend="triton").sum(),
        rows(33, 5),
        rows(130, 5),
        rows(130, 70),
    ),
    "group_mmd": (lambda z: fastvae.group_mmd(z, torch.arange(70) % 3, backend="triton").mean(), rows(70, 5)),
    "kernel_matmul, sweeps": (
        lambda x, y, v: fastvae.kernel_matmul(x, y, v, backend="triton").sum(), rows(70, 5), rows(33, 5), rows(33, 3)
    ),
    "group_mmd, sweeps": (lambda z: fastvae.group_mmd(z, torch.arange(70) % 3, backend="triton").mean(), rows(70, 5)),
    "group_mmd, many groups": (
        lambda z: fastvae.group_mmd(z, torch.arange(200) % 70, estimator="unbiased", backend="triton").values[0].sum(), rows(200, 5)
    ),
    "group_mmd, weights": (
        lambda z: fastvae.group_mmd(z, 1 + torch.arange(520.0 * 7).view(520, 7) % 3, kernel="polynomial", backend="triton").mean(),
        rows(520, 2),
    ),
    "total_correlation": (
        lambda z, mu, logvar: sum(fastvae.total_correlation(z, mu, logvar, dataset_size=300, backend="triton")),
        *(rows(70, 5) for _ in range(3)),
    ),
    "sigreg": (lambda z: fastvae.sigreg(z, num_slices=70, num_points=5, backend="triton"), rows(2, 70, 5)),
    "sigreg, wide rows": (lambda z: fastvae.sigreg(z, num_slices=3, num_points=3, backend="triton"), rows(33, 70)),
    "reparameterize_kl": (
        lambda mu, logvar: sum(t.sum() for t in fastvae.reparameterize_kl(mu, logvar, backend="triton")),
        rows(70, 5),
        rows(70, 5),
    ),
    "reparameterize_kl, channels_last and a prior": (
        lambda moments, prior: sum(
            t.sum() for t in fastvae.reparameterize_kl_moments(moments.permute(0, 3, 1, 2), prior=prior, backend="triton")
        ),
        rows(2, 21, 30, 6),
        rows(6, 21, 30),
    ),
    "reparameterize_kl, long rows": (
        lambda moments: sum(t.sum() for t in fastvae.reparameterize_kl_moments(moments, backend="triton")), rows(2, 9000)
    ),
    "reparameterize_kl, audio": (
        lambda moments: sum(t.sum() for t in fastvae.reparameterize_kl_moments(moments, kl_dims=1, scale="softplus", backend="triton")),
        rows(2, 300, 35),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("deterministic_algorithms")
@pytest.mark.parametrize("name", CALLS)
def test_places(name, monkeypatch):
    function, *inputs = CALLS[name]
    if "sweeps" in name:
        without_few_pairs(monkeypatch)
    with watched(monkeypatch) as launches:
        results = evaluate(function, *inputs) if name != "mmd, value" else (function(*inputs),)
    assert launches
    assert all(t.isfinite().all() for t in results)


def test_what_is_outside_is_seen(monkeypatch):
    from fastvae.kernels import prepare

    original = prepare.launch

    def launch(fn, key, device, grid, args, constants):
        args = list(args)
        if fn is prepare.operands_kernel:
            place = fn.arg_names.index("operands")
            args[place] = args[place]._replace(neg_half_norm2_ptr=args[place].neg_half_norm2_ptr[:-8].clone())
        original(fn, key, device, grid, args, constants)

    with watched(monkeypatch):
        monkeypatch.setattr(prepare, "launch", launch)
        with pytest.raises(Exception, match=r"operands_kernel, program .* are in no tensor"):
            fastvae.mmd(rows(20, 3), rows(20, 3), backend="triton")


def test_what_two_programs_write_is_seen(monkeypatch):
    from fastvae.kernels import prepare

    original = prepare.launch

    def launch(fn, key, device, grid, args, constants):
        # Another problem of a batch that is none.
        original(fn, key, device, (grid[0], grid[1], 2) if fn is prepare.statistics_kernel else grid, args, constants)

    with watched(monkeypatch):
        monkeypatch.setattr(prepare, "launch", launch)
        with pytest.raises(AssertionError, match="statistics_kernel: two programs write the same place"):
            fastvae.mmd(rows(20, 3), rows(20, 3), backend="triton")
