"""A dry run: everything that comes before training, and a few steps of it, to see what a run would do and how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback

TIMED_STEPS = 4
"""Steps of a dry run; the first, in which things are allocated, does not count."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a run would train.

    Attributes:
        model: Name of the class.
        parameters: Of the model.
        trained: Parameters that training changes.
        examples: In the training split.
        steps: Optimizer steps of the whole run.
        epochs: Passes over the examples.
        seconds_per_step: Mean of the steps that were timed; ``None`` where the run is too short to time one.
        device: Where the steps ran.
        processes: Ranks that share each step.
    """

    model: str
    parameters: int
    trained: int
    examples: int
    steps: int
    epochs: float
    seconds_per_step: float | None
    device: str
    processes: int

    def __str__(self) -> str:
        trained = "" if self.trained == self.parameters else f", of which {self.trained:,} are trained"
        ranks = "" if self.processes == 1 else f" on each of {self.processes} processes"
        lines = [
            f"{self.model}: {self.parameters:,} parameters{trained}.",
            f"{self.examples:,} examples, {self.epochs:g} epochs, {self.steps:,} steps on {self.device}{ranks}.",
        ]
        if self.seconds_per_step is not None:
            total = _clock(self.seconds_per_step * self.steps)
            lines.append(f"{self.seconds_per_step:.2g} s a step: {total} of training, without its evaluations.")
        return "\n".join(lines)


_found: ContextVar[list[TrainingPlan] | None] = ContextVar("dry_run", default=None)


@contextmanager
def dry_run() -> Iterator[list[TrainingPlan]]:
    """Within it a function of this package that trains stops after a few steps, and what it would do is in the list.

    Everything before training happens as ever: data are read, tokenizers fitted, examples built in `output_dir`, which
    should therefore be another folder than that of the run itself.

    Example:
    ```python
    from hf_ehr.training import dry_run

    with dry_run() as plans:
        ...  # pretrain(data, options, training)
    print(*plans)
    ```
    """
    plans: list[TrainingPlan] = []
    token = _found.set(plans)
    try:
        yield plans
    except _StopAsPlanned:
        pass
    finally:
        _found.reset(token)


def run_dry(trainer: Trainer) -> None:
    """Under `dry_run` makes the trainer stop after some steps and leave its plan; else does nothing."""
    plans = _found.get()
    if plans is not None:
        trainer.add_callback(_Rehearsal(trainer, plans))


class _StopAsPlanned(Exception):  # noqa: N818, it is no error
    """Leaves a run whose plan is known."""


class _Rehearsal(TrainerCallback):
    def __init__(self, trainer: Trainer, plans: list[TrainingPlan]):
        self.trainer, self.plans, self.times = trainer, plans, [time.perf_counter()]

    def on_step_end(self, args, state, control, **_: Any) -> None:
        """Notes the time; after the last step that is timed it leaves the run."""
        self.times.append(time.perf_counter())
        if len(self.times) > min(TIMED_STEPS, state.max_steps):
            self.plans.append(self._plan(args, state))
            raise _StopAsPlanned

    def _plan(self, args, state) -> TrainingPlan:
        model: Any = self.trainer.model
        data: Any = self.trainer.train_dataset
        timed = self.times[1:]
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return TrainingPlan(
            model=type(self.trainer.accelerator.unwrap_model(model)).__name__,
            parameters=sum(size for size, _ in sizes),
            trained=sum(size for size, trained in sizes if trained),
            examples=getattr(data, "num_examples", len(data)),
            steps=state.max_steps,
            epochs=state.num_train_epochs if args.max_steps > 0 else args.num_train_epochs,
            seconds_per_step=(timed[-1] - timed[0]) / (len(timed) - 1) if len(timed) > 1 else None,
            device=str(args.device),
            processes=args.world_size,
        )


def _clock(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
