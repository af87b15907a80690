"""NVIDIA's figures for one GPU of each architecture, from which `benchmarks.compile_report` predicts times."""

from __future__ import annotations

from dataclasses import dataclass

# A multiprocessor's rates in a clock: exponentials, instructions of one lane, and bytes from the level-2 cache.
EXPONENTIALS = 16
ISSUE = 128
CACHE_BYTES = 64


@dataclass(frozen=True)
class GPU:
    """The rates bf16 to fp64 are dense multiply-adds in a clock on one multiprocessor."""

    name: str
    multiprocessors: int
    ghz: float
    bytes_per_second: float
    bf16: int
    tf32: int
    fp32: int
    fp64: int


GPUS = {
    80: GPU("A100", 108, 1.41, 2.0e12, 1024, 512, 64, 64),
    86: GPU("RTX 3090", 82, 1.70, 0.94e12, 256, 128, 128, 2),
    89: GPU("RTX 4090", 128, 2.52, 1.0e12, 256, 128, 128, 2),
    90: GPU("H200", 132, 1.98, 4.8e12, 2048, 1024, 128, 128),
    100: GPU("B200", 148, 1.85, 8.0e12, 4096, 2048, 128, 64),
    120: GPU("RTX 5090", 170, 2.41, 1.79e12, 256, 128, 128, 2),
}
