"""Launch choices as data: one frozen config a kernel, chosen from shape, dtype and architecture. No autotuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepConfig:
    """Rows, columns and features of a tile of a pair sweep, and how many warps and pipeline stages work on it."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowConfig:
    """Rows and features of a block of a row-wise kernel."""

    block_n: int
    block_d: int
    num_warps: int


# Features that one block holds: with a gradient, its accumulator and two operands live in registers and shared memory together.
MAX_BLOCK_D = 128


def sweep_config(dim: int, itemsize: int, gradient: bool) -> SweepConfig:
    """For rows of `dim` features, operands of `itemsize` bytes each."""
    block_d = min(max(16, _next_power_of_2(dim)), MAX_BLOCK_D)
    if itemsize == 8:
        return SweepConfig(32, 32, min(block_d, 32), 4, 2)
    if block_d <= 64:
        return SweepConfig(128, 64, block_d, 8 if gradient else 4, 2 if gradient else 3)
    return SweepConfig(64, 64, block_d, 4, 2)


def difference_config(itemsize: int) -> SweepConfig:
    return SweepConfig(32, 32 if itemsize == 4 else 16, 8, 4, 1)


def row_config(dim: int) -> RowConfig:
    """Blocks of about 2,048 elements: 16 a thread, so that each array moves in 16-byte loads."""
    block_d = min(max(16, _next_power_of_2(dim)), 2048)
    return RowConfig(max(1, 2048 // block_d), block_d, 4)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
