"""CUDA tensors without a GPU: the library's CUDA implementations on tensors that have a shape, a dtype and a device, and no values.

What a GPU would be asked to do is counted instead: launches, copies from the host, and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")

# Operations besides views that launch nothing.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# Operations whose result, or its shape, the host waits for.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim"}
# Arguments of a launch that are not the kernel's.
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


def missing() -> str | None:
    """What keeps this machine from it."""
    if torch.cuda.is_available():
        return "is for a machine without a GPU"
    if torch.__version__ < (2, 13):
        return "uses PyTorch's inner parts as torch 2.13 has them"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, whose launches it counts"
    return None if COMPILER else "needs a C++ compiler, g++ or clang++"


class Waits(AssertionError):
    """A call that makes the host wait for the device."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Devices of which each is an H100, and what the calls within ask of them."""
    from triton.runtime.jit import KernelInterface

    # FakeTensorMode comes before the patches: it imports PyTorch's compiler, which looks at what they replace.
    guard, fake, recorder = _guard(), FakeTensorMode(allow_non_fake_inputs=True), Recorder()
    _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", lambda fn, grid: functools.partial(recorder.launch, fn))
        patch.setattr(FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.itemsize)
        patch.setattr(torch.Tensor, "pin_memory", lambda t: t)
        patch.setattr(torch.cuda, "current_device", guard.current_device)
        patch.setattr(torch.cuda, "_exchange_device", guard.exchange_device)
        patch.setattr(torch.cuda, "_maybe_exchange_device", guard.exchange_device)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
        guard.install()
        try:
            with torch.autograd.set_multithreading_enabled(False), fake, recorder:
                yield recorder
        finally:
            guard.uninstall()
            _forget()


@functools.cache
def _guard() -> ctypes.CDLL:
    # The first backward pass of a process starts a thread for each device: it comes before these, which would keep theirs.
    torch.zeros((), requires_grad=True).backward()
    folders = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        command = [COMPILER, "-std=c++20", "-shared", "-fPIC", abi, source, *folders, "-lc10", "-ltorch_cpu", "-o", library]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def _forget() -> None:
    """Empty the caches of tensors on devices, and of what the devices are."""
    for name, module in list(sys.modules.items()):
        if name in ("fastvae.kernel_sums", "fastvae.functional") or name.startswith("fastvae.kernels."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


class Recorder(TorchDispatchMode):
    """Counts what calls ask of a device. What they do with tensors on the CPU, which are real ones, counts for nothing.

    Attributes:
        triton: launches of Triton kernels, by name.
        pytorch: operations of PyTorch that launch something, by name.
        copies: from the host, by the function of the library that makes one.
        live, peak: bytes of the tensors on devices, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.live = 0
        self.reset()

    def reset(self) -> None:
        """Count from here on."""
        self.triton: Counter[str] = Counter()
        self.pytorch: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.peak = self.live

    def launch(self, fn: Any, *args: Any, **named: Any) -> None:
        """Stands for a launch of `fn`, which must be given its arguments, on the current device."""
        inspect.signature(fn.fn).bind(*args, **{name: value for name, value in named.items() if name not in LAUNCH_OPTIONS})
        current = torch.device("cuda", torch.cuda.current_device())
        for device in _devices(tree_leaves([args, list(named.values())])):
            assert device == current, f"{fn.fn.__name__} is launched on {current} with a tensor on {device}"
        self.triton[fn.fn.__name__] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        if all(device.type == "cpu" for device in _devices(leaves)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        with self:
            if func.namespace == "fastvae":
                own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
                key = torch._C.DispatchKey.CUDA if own else torch._C.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(key, *args, **kwargs)
            # Within an operation of ours those of PyTorch that are made of others come whole.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.split("::")[1]
        masked = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None)
        if name in WAITING or masked:
            raise Waits(f"{name} in {_caller()}")
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" for t in made):
            raise Waits(f"{name} to the host in {_caller()}")
        if name in ("_to_copy", "copy_") and any(isinstance(t, Tensor) and t.device.type == "cpu" for t in leaves):
            self.copies[_caller()] += 1
        elif not func.is_view and name not in NO_LAUNCH:
            self.pytorch[name] += 1
        for t in made:
            self._keep(t)
        return result

    def _keep(self, t: Tensor) -> None:
        """The bytes of t are live as long as its storage."""
        storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
        key = storage._cdata
        if key in self._storages:
            return

        def free(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def _devices(leaves: Iterable[Any]) -> list[torch.device]:
    return [leaf.device if isinstance(leaf, Tensor) else leaf for leaf in leaves if isinstance(leaf, (Tensor, torch.device))]


def _caller() -> str:
    """The innermost function of the library that is running."""
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "fastvae"):
            return f"{path.relative_to(ROOT).as_posix()}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "no function of the library"
