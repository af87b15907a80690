"""Schedules of weights, for any training loop: `objective.set(kl_weight=schedules.linear(step, 10_000))`.

They are plain functions of the step without state, so a resumed run continues where it stopped. `step` counts optimizer steps from 0; after
`steps` steps each function returns `end`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from fastvae import checks

Kind = Literal["constant", "linear", "cosine", "cyclical"]
SCHEDULES = get_args(Kind)


def linear(step: int, steps: int, *, start: float = 0.0, end: float = 1.0) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps`.

    Source: Bowman et al. 2016, "Generating sentences from a continuous space" (KL annealing); Burgess et al. 2018, "Understanding
    disentangling in β-VAE" (the capacity).
    """
    return start + (end - start) * _share(step, steps)


def cosine(step: int, steps: int, *, start: float = 0.0, end: float = 1.0) -> float:
    """Half a period of a cosine from `start` at step 0 to `end` at step `steps`, flat at both ends."""
    return start + (end - start) * (1 - math.cos(math.pi * _share(step, steps))) / 2


def cyclical(step: int, steps: int, *, start: float = 0.0, end: float = 1.0, cycles: int = 4, ramp: float = 0.5) -> float:
    """`cycles` cycles within `steps` steps. Each is a line from `start` to `end` over its first share `ramp`, and then `end`.

    Source: Fu et al. 2019, "Cyclical annealing schedule: a simple approach to mitigating KL vanishing".
    """
    checks.integer("cycles", cycles, at_least=1)
    if not 0 < checks.real("ramp", ramp) <= 1:
        raise ValueError(f"ramp must be greater than 0 and at most 1, as a share of a cycle, got {ramp:g}")
    share = _share(step, steps)
    within = share * cycles % 1 if share < 1 else 1.0
    return start + (end - start) * min(within / ramp, 1.0)


def schedule(kind: Kind, step: int, steps: int, *, start: float = 0.0, end: float = 1.0, cycles: int = 4, ramp: float = 0.5) -> float:
    """The schedule of this name: "constant", which is `end` at each step, "linear", "cosine" or "cyclical".

    Raises:
        ValueError: An unknown kind, a step below 0, steps or cycles below 1, or a ramp outside (0, 1].
    """
    checks.option("kind", kind, SCHEDULES)
    if kind == "constant":
        return end
    if kind == "cyclical":
        return cyclical(step, steps, start=start, end=end, cycles=cycles, ramp=ramp)
    return (linear if kind == "linear" else cosine)(step, steps, start=start, end=end)


def _share(step: int, steps: int) -> float:
    checks.integer("steps", steps, at_least=1)
    return min(checks.integer("step", step, at_least=0) / steps, 1.0)
