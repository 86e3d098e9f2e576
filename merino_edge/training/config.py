"""The training configuration: every option that the result of a training depends on. It needs no PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from merino_edge import forms, limits, names
from merino_edge.errors import ArtefactError, InputError

Precision = Literal["auto", "fp32", "bf16"]
Optimizer = Literal["adamw", "muon"]
Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class TrainingConfig:
    """Training options with the paper's recipe (section 7) as defaults. Raises InputError for a value out of range.

    `micro_batch` only trades memory for time. Precision "auto" is bf16 autocast where the GPU or CPU computes in bf16
    natively, and otherwise fp32. "muon" is Muon for the layers' matrices and AdamW for the rest.
    """

    steps: int = 600_000
    batch: int = 1024  # sequences per step, over all workers
    sequence: int = 1024  # tokens per sequence
    micro_batch: int = 16  # sequences per forward pass of a worker
    learning_rate: float = 6e-4  # peak
    warmup: int = 1000  # steps
    weight_decay: float = 0.1  # of matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient clipping: the largest gradient norm
    seed: int = 0
    precision: Precision = "auto"
    optimizer: Optimizer = "adamw"
    z_loss: float = 0.0  # coefficient of the z-loss (PaLM uses 1e-4); 0: none
    ema: float = 0.0  # decay of the averaged weights, for example 0.999; 0: no average, the last weights are kept
    teacher_weight: float = 0.0  # weight of the distillation loss (merino_edge.training.loss); 0: no teacher
    temperature: float = 1.0  # of both softmaxes in the distillation loss
    direction: Direction = "forward"  # of the KL divergence: forward covers the teacher, reverse seeks its modes

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, limits.MAX_ITERATIONS),
            ("batch", 1, limits.MAX_BATCH),
            ("sequence", 1, limits.MAX_POSITIONS),
            ("micro_batch", 1, limits.MAX_BATCH),
            ("warmup", 0, self.steps),
            ("seed", 0, limits.MAX_SEED),
        ):
            limits.check_range(name, getattr(self, name), low, high)
        _require(0 < self.learning_rate < 1, f"learning rate is {self.learning_rate}", "give more than 0, less than 1")
        for name in ("weight_decay", "beta1", "beta2", "z_loss", "ema"):
            _require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}", "give 0 or more, less than 1")
        _require(0 < self.clip <= 1e6, f"clip is {self.clip}", "give more than 0, at most 1e6")
        _require(0 <= self.teacher_weight <= 1, f"teacher_weight is {self.teacher_weight}", "give 0 to 1")
        _require(0.01 <= self.temperature <= 100, f"temperature is {self.temperature}", "give 0.01 to 100")
        check_precision(self.precision)
        _check_choice("optimizer", self.optimizer, Optimizer)
        _check_choice("direction", self.direction, Direction)

    @staticmethod
    def of(fields: Mapping[str, Any], where: str) -> TrainingConfig:
        """The configuration that a file holds; options that an older version did not know have their defaults.

        Raises ArtefactError naming `where`, InputError for a value out of range.
        """
        if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(TrainingConfig)}):
            raise ArtefactError(f"{where}: config has an unknown {unknown[0]}", "run: pip install -U merino-edge")
        forms.check(dict(fields), TrainingConfig, f"{where}: config")
        return TrainingConfig(**fields)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate: linear warm-up to the peak, then linear decay that reaches 0 one step after the last."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all workers."""
        return self.batch * self.sequence


def check_precision(precision: str) -> str:
    """Return `precision` if it is one. Raises InputError."""
    _check_choice("precision", precision, Precision)
    return precision


def _check_choice(name: str, value: str, choices: Any) -> None:
    """Raise InputError unless `value` is one of `choices`, a Literal."""
    _require(value in get_args(choices), f"{name} is {value!r}", names.choose(value, get_args(choices)))


def _require(condition: object, message: str, hint: str) -> None:
    if not condition:
        raise InputError(message, hint)
