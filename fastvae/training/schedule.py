"""The schedules of `fastvae.schedules` as a Lightning callback."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from fastvae import checks
from fastvae.objectives import VAEObjective
from fastvae.schedules import SCHEDULES, Kind, schedule

Weight = Literal["kl_weight", "mmd_weight", "tc_weight", "capacity"]


class Schedule(Callback):
    """Sets a weight of a `VAEModule`'s objective before each step, by a schedule of `fastvae.schedules`.

    Args:
        weight: "kl_weight", "mmd_weight", "tc_weight" or "capacity".
        kind: "constant", "linear", "cosine" or "cyclical".
        steps: The number of optimizer steps until the weight has its final value.
        start: The weight at step 0.
        end: The weight after `steps` steps; None takes the objective's weight.
        cycles: The number of cycles of "cyclical".
        ramp: The share of each cycle of "cyclical" in which the weight rises.
    """

    def __init__(
        self,
        weight: Weight,
        kind: Kind = "linear",
        steps: int = 10_000,
        *,
        start: float = 0.0,
        end: float | None = None,
        cycles: int = 4,
        ramp: float = 0.5,
    ) -> None:
        checks.option("weight", weight, get_args(Weight))
        checks.option("kind", kind, SCHEDULES)
        self.weight = weight
        self.kind = kind
        self.steps = checks.integer("steps", steps, at_least=1)
        self.start = checks.real("start", start, at_least=0)
        self.end = end if end is None else checks.real("end", end, at_least=0)
        self.cycles = cycles
        self.ramp = ramp

    def value(self, step: int) -> float:
        assert self.end is not None
        return schedule(self.kind, step, self.steps, start=self.start, end=self.end, cycles=self.cycles, ramp=self.ramp)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            objective = self._objective(pl_module)
            if self.end is None:
                self.end = float(getattr(objective, self.weight))
            # Before the module moves to its device and is compiled, as this turns the weight into a tensor.
            objective.set(**{self.weight: self.value(trainer.global_step)})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        value = self.value(trainer.global_step)
        self._objective(pl_module).set(**{self.weight: value})
        pl_module.log(f"train/{self.weight}", value, on_step=True, on_epoch=False)

    def _objective(self, module: LightningModule) -> VAEObjective:
        objective = getattr(module, "objective", None)
        if not isinstance(objective, VAEObjective):
            raise TypeError(f"Schedule must be used with a VAEModule, got {type(module).__name__}")
        return objective
