"""What `tests.fast_interpreter` leaves out of Triton's interpreter changes no bit of a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from tests.cases import DEVICE, needs_triton


def results() -> str:
    """Their bits, of kernels with every kind of operand: pointers, integers of both signs, bfloat16, float32 and float64."""
    from benchmarks.interpreter import emulate_tf32

    emulate_tf32()
    torch.manual_seed(0)
    x, y = (torch.randn(rows, 5) for rows in (140, 70))
    leaves = [t.requires_grad_() for t in (x.double(), x.clone(), x.bfloat16(), y.clone())]
    double, single, half, other = leaves
    found = [fastvae.mmd(t, other.to(t.dtype), bandwidth=(0.5, 1.0), backend="triton") for t in (double, single, half)]
    found += [fastvae.total_correlation(single, single, other.new_zeros(140, 5), dataset_size=300, backend="triton")[1]]
    found += [t.square().sum() for t in fastvae.reparameterize_kl(single, half.float(), backend="triton")]
    found += torch.autograd.grad(sum(found), leaves)
    return " ".join(t.detach().double().flatten().numpy().tobytes().hex() for t in found)


@needs_triton
@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are compiled")
def test_no_bit_changes():
    code = "from tests.test_fast_interpreter import results; print(results())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    plain = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], env=os.environ)
    assert results() == plain.stdout.strip()
