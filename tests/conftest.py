"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

from fastvae.checks import triton_interpreter

if triton_interpreter():
    from benchmarks.interpreter import emulate_tf32

    emulate_tf32()


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
