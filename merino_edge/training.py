"""Training: an architecture and text files to a checkpoint, by the paper's recipe, with exact resume.

AdamW with warm-up, linear decay, gradient clipping and gradient accumulation. Batches are a function of the step
(`merino_edge.data`) and the model has no dropout, so a run that was killed and continued ends with the bits of one
that was not (same machine and thread count, CPU). It knows no terminal: progress goes to a callback.

While training, CKPT/state (merino_edge.training_state) holds step, architecture_id, corpus_sha256, config, the figures
so far and the tensors weights.NAME, exp_avg.NAME, exp_avg_sq.NAME.

The finished checkpoint's training.json holds source "train", step, config, tokens, validation_loss_before,
validation_loss (nats per token), tokens_per_second, history [[step, loss], ...], corpus_sha256, architecture_id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from merino_edge import artefact, checkpoint, data, limits, training_state
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError, OutputError
from merino_edge.model import Model

VALIDATION_TOKENS = 2**14
HISTORY_POINTS = 200
MOMENTS = ("exp_avg", "exp_avg_sq")

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are the paper's recipe (section 7); `micro_batch` only trades memory for time.

    Precision "auto" is bf16 autocast where the GPU or CPU computes in bf16 natively, else fp32.
    """

    steps: int = 600_000
    batch: int = 1024  # sequences per step
    sequence: int = 1024  # tokens per sequence
    micro_batch: int = 16  # sequences per forward pass
    learning_rate: float = 6e-4  # peak
    warmup: int = 1000  # steps
    weight_decay: float = 0.1  # of matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient norm
    seed: int = 0
    precision: Precision = "auto"

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
        _require(0 < self.learning_rate < 1, f"learning rate is {self.learning_rate}, outside 0 to 1")
        _require(self.precision in get_args(Precision), f"precision is {self.precision!r}, not auto, fp32 or bf16")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up to the peak, then linear decay that would reach 0 one step after the last."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup)


@dataclass(frozen=True)
class Progress:
    """What the callback of `train` gets after every step. `validation_loss` is the latest, in nats per token."""

    step: int  # steps done
    loss: float
    learning_rate: float
    tokens_per_second: float
    validation_loss: float


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: `finished` or stopped on request, and what training.json holds."""

    finished: bool
    training: dict[str, Any]


class Trainer:
    """A model, its optimizer and the step they have reached."""

    def __init__(self, a: Architecture, corpus: data.Corpus, config: TrainingConfig) -> None:
        if config.sequence > a.max_positions:
            what = f"sequences of {config.sequence} are longer than the model's {a.max_positions} positions"
            raise InputError(what, f"use --sequence {a.max_positions} or less")
        self.corpus, self.config, self.step = corpus, config, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _has_bf16(self.device))
        self.model = Model(a, config.seed).to(self.device)
        named = sorted(self.model.named_parameters(), key=lambda item: item[1].ndim < 2)  # matrices first
        self.names = [name for name, _ in named]
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)

    def _loss(self, batch: data.Batch) -> Tensor:
        inputs, targets = (torch.from_numpy(part).to(self.device) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(inputs)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def train_step(self) -> float:
        """One optimizer step; the batch's mean loss in nats. Raises InputError, the model unchanged, if it diverged."""
        c = self.config
        inputs, targets = self.corpus.batch(self.step, c.batch, c.sequence, c.seed)
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for first in range(0, c.batch, c.micro_batch):
            part = slice(first, first + c.micro_batch)
            share = self._loss((inputs[part], targets[part])) * (len(inputs[part]) / c.batch)
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"training diverged at step {self.step + 1} (loss {loss})", "train again with a lower --learning-rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate_at(self.step)
        self.optimizer.step()
        self.step += 1
        return loss

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over a fixed part of the held-out tokens, in nats per token."""
        c = self.config
        inputs, targets = self.corpus.validation(max(1, VALIDATION_TOKENS // c.sequence), c.sequence)
        parts = [slice(i, i + c.micro_batch) for i in range(0, len(inputs), c.micro_batch)]
        losses = [self._loss((inputs[part], targets[part])).item() for part in parts]
        return float(np.average(losses, weights=[len(inputs[part]) for part in parts]))

    @property
    def tokens(self) -> int:
        """Trained on so far, repeats counted."""
        return self.step * self.config.batch * self.config.sequence

    # --- state ---

    def identity(self) -> dict[str, Any]:
        """What a continued training must agree with, and the step reached."""
        ids = {"architecture_id": self.model.architecture.id, "corpus_sha256": self.corpus.sha256}
        return {"step": self.step, **ids, "config": dataclasses.asdict(self.config)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by its name in the state file."""
        result = {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            result.update({f"{kind}.{self.names[index]}": moments[kind] for kind in MOMENTS})
        return result

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from what `tensors` gave at `step`."""
        self.step = step
        weights = {name: tensors[f"weights.{name}"] for name in self.names}
        self.model.load_state_dict(weights)
        moments = {
            index: {"step": torch.tensor(float(step)), **{kind: tensors[f"{kind}.{name}"].clone() for kind in MOMENTS}}
            for index, name in enumerate(self.names)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def train(
    a: Architecture,
    sources: Sequence[Path | str],
    out: Path | str,
    config: TrainingConfig,
    *,
    resume: bool = False,
    save_every: int = 1000,
    on_step: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train into the checkpoint folder `out`, saving every `save_every` steps and when `should_stop` says so.

    With `resume` it continues what `out` holds. Raises InputError (corpus, divergence, anything changed since),
    ArtefactError (an altered state), OutputError. Before the first save a failure leaves nothing behind.
    """
    limits.check_range("save_every", save_every, 1, limits.MAX_ITERATIONS)
    out = Path(out)
    saved = training_state.load(out) if resume else None
    if saved is None:
        _refuse_occupied(out)
    else:
        _refuse_changed(saved, a, data.fingerprint(sources), config, out)
    try:
        corpus = data.prepare(sources, a.vocab_size, training_state.folder_of(out) / "corpus")
        trainer = Trainer(a, corpus, config)
        if saved is not None:
            trainer.restore(training_state.load_tensors(out, saved), saved["step"])
        return _run(trainer, out, saved["figures"] if saved else None, save_every, on_step, should_stop)
    except BaseException:
        if not training_state.exists(out):
            shutil.rmtree(training_state.folder_of(out), ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()  # only if it is empty: an older checkpoint stays
        raise


def _run(
    trainer: Trainer,
    out: Path,
    figures: dict[str, Any] | None,
    save_every: int,
    on_step: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    c = trainer.config
    if figures is None:
        start = trainer.validation_loss()
        figures = {"validation_loss_before": start, "validation_loss": start, "train_seconds": 0.0, "history": []}
    while trainer.step < c.steps:
        rate, began = c.learning_rate_at(trainer.step), time.perf_counter()
        loss = trainer.train_step()
        figures["train_seconds"] += time.perf_counter() - began
        if trainer.step == 1 or trainer.step % max(1, c.steps // HISTORY_POINTS) == 0:
            figures["history"].append([trainer.step, loss])
        if trainer.step < c.steps and ((stop := should_stop()) or trainer.step % save_every == 0):
            figures["validation_loss"] = trainer.validation_loss()
            training_state.save(out, {**trainer.identity(), "figures": figures}, trainer.tensors())
            training = _write_checkpoint(trainer, out, figures)
            if stop:
                return Outcome(False, training)
        speed = trainer.tokens / figures["train_seconds"]
        on_step(Progress(trainer.step, loss, rate, speed, figures["validation_loss"]))
    figures["validation_loss"] = trainer.validation_loss()
    training = _write_checkpoint(trainer, out, figures)
    shutil.rmtree(training_state.folder_of(out))
    return Outcome(True, training)


def _write_checkpoint(trainer: Trainer, out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    speed = trainer.tokens / figures["train_seconds"]
    training = {
        "source": "train",
        **trainer.identity(),
        "tokens": trainer.tokens,
        "tokens_per_second": speed,
        **figures,
    }
    a, weights = trainer.model.architecture, trainer.model.to_weights()
    checkpoint.write_files(out, a, weights, trainer.corpus.tokenizer_json, data.chat_format(), training)
    return training


def _has_bf16(device: torch.device) -> bool:
    """Whether matrices multiply in bf16 natively; emulated, it is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch from 2.10 on
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _refuse_changed(
    saved: dict[str, Any], a: Architecture, corpus_sha256: str, config: TrainingConfig, out: Path
) -> None:
    hint = f"give what the training in {out} began with, or choose another --out"
    _require(saved.get("architecture_id") == a.id, "the architecture has changed since the training began", hint)
    _require(saved.get("corpus_sha256") == corpus_sha256, "the corpus has changed since the training began", hint)
    for name, value in dataclasses.asdict(config).items():
        then = saved["config"].get(name)
        _require(then == value, f"{name} is {value}, the training began with {then}", hint)


def _refuse_occupied(out: Path) -> None:
    if training_state.exists(out):
        raise OutputError(f"{out} holds an unfinished training", "add --continue, or choose another --out")
    ours = out.is_dir() and (artefact.is_artefact_folder(out) or {p.name for p in out.iterdir()} <= {"state"})
    if out.exists() and not ours:
        raise OutputError(f"{out} exists and is not an artefact of merino-edge", "choose another --out")


def _require(condition: bool, message: str, hint: str = "see: merino-edge train --help") -> None:
    if not condition:
        raise InputError(message, hint)
