"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import time
import warnings

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: one thread each, and one in each process that a test starts.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

from fastvae.checks import triton_interpreter

if triton_interpreter():
    from benchmarks.interpreter import emulate_tf32
    from tests import fast_interpreter

    emulate_tf32()
    fast_interpreter.speed_up()


# Seconds of a processor that a test may take before it has to be marked as slow, with room for slower machines.
FAST = 10.0


def pytest_runtest_setup():
    """`benchmarks.gpu` gives the tests so much time."""
    if time.time() > float(os.environ.get("TESTS_END", "inf")):
        pytest.skip("no time is left")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that is in `make check` and takes long fails there, so that it stays quick."""
    before = sum(os.times()[:4])
    result = yield
    seconds = sum(os.times()[:4]) - before
    left_out = any(item.get_closest_marker(name) for name in ("slow", "interpreter"))
    if seconds > FAST and not left_out and "FAST_TESTS_ONLY" in os.environ:
        pytest.fail(f"{item.name} takes {seconds:.0f} s of a processor: mark it as slow", pytrace=False)
    return result


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture
def deterministic_algorithms():
    """PyTorch's, and memory that nothing has written to is nan."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreter_warnings():
    """numpy warns where the interpreter computes with a padded column's exponent of −inf or with a nan; a GPU does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        yield
