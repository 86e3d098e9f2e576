"""Training: an architecture and text to a checkpoint, by the paper's recipe, with exact resume.

Batches are a function of the step (`merino_edge.data.corpus`) and the model has no dropout, so a run that was killed and
continued ends with the bits of one that was not (same machine and thread count, CPU), and any number of workers
(`merino_edge.training.distributed`) sees the same batches. It knows no terminal: progress goes to a callback.

While training, CKPT/state (merino_edge.training.state) holds step, architecture_id, corpus_sha256, start_sha256,
teacher_sha256, config, the figures so far and the tensors weights.NAME and of the optimizer (merino_edge.training.optimizer).

The finished checkpoint's training.json holds source "train", step, config, tokens, validation_loss_before,
validation_loss (nats per token), tokens_per_second, history [[step, loss], ...], corpus_sha256, architecture_id,
start_sha256 (of the checkpoint that it began with, or null), teacher_sha256 (of what taught it, or null). Losses are
cross-entropies, with a teacher too.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merino_edge import artefact, checkpoint, limits
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import IGNORED, Corpus, fingerprint, prepare
from merino_edge.errors import InputError, OutputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer
from merino_edge.training import device
from merino_edge.training import state as training_state
from merino_edge.training.config import TrainingConfig
from merino_edge.training.distributed import Workers, full_tensor, shard
from merino_edge.training.loss import distillation, next_token
from merino_edge.training.optimizer import Optimizer
from merino_edge.training.teacher import Teacher

VALIDATION_TOKENS = 2**14
HISTORY_POINTS = 200


@dataclass(frozen=True)
class Progress:
    """What the callback of `train` gets after every step. `validation_loss` is the latest, in nats per token."""

    step: int  # steps done
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float
    validation_loss: float


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: `finished` or stopped on request, and what training.json holds."""

    finished: bool
    training: dict[str, Any]


class Diverged(InputError):
    """A loss or gradient that is no number. The model is as it was before that step."""


def check(a: Architecture, config: TrainingConfig, workers: Workers) -> None:
    """Refuse what no corpus can change, before a worker writes anything: torchrun ends the others when one refuses,
    and who is ended cleans nothing up. Raises InputError."""
    if config.sequence > a.max_positions:
        what = f"sequences of {config.sequence} are longer than the model's {a.max_positions} positions"
        raise InputError(what, f"use --sequence {a.max_positions} or less")
    if workers.is_distributed and workers.parallel == "fsdp" and config.optimizer == "muon":
        raise InputError("Muon needs whole matrices, FSDP divides them", "use --parallel ddp, or --optimizer adamw")
    workers.shard_of_batch(config.batch)


class Trainer:
    """A model, its optimizer and the step they have reached."""

    def __init__(
        self,
        a: Architecture,
        corpus: Corpus,
        config: TrainingConfig,
        *,
        start: Checkpoint | None = None,
        teacher: Teacher | None = None,
        workers: Workers | None = None,
        compiled: bool = False,
    ) -> None:
        """Begin with random weights, or with those of `start`, a checkpoint of `a`. A teacher has `teacher_weight`."""
        self.corpus, self.config, self.step, self.gradient_norm = corpus, config, 0, 0.0
        self.workers = workers or Workers()
        check(a, config, self.workers)
        self.batch_shard = self.workers.shard_of_batch(config.batch)
        self.device = self.workers.device
        self.bf16 = device.uses_bf16(config.precision, self.device)
        if (teacher is None) != (config.teacher_weight == 0):
            what = "a teacher without a weight" if teacher is not None else "a weight for a teacher that there is not"
            raise InputError(what, "give --teacher and a --teacher-weight above 0 together, or neither")
        self.teacher = teacher
        if teacher is not None:
            teacher.prepare(a, corpus, config, self.device)
        self.start_sha256 = None if start is None else start.training["sha256"]
        self.model = Model(a, config.seed) if start is None else Model.from_weights(a, start.weights)
        self.model.to(self.device)
        if compiled:
            self.model.compile()
        self.called = self.workers.wrap(self.model)
        self.optimizer = Optimizer(self.model, config)

    def _losses(
        self, inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of [B, T] tokens, as `next_token` gives them; of rows that begin at `starts`, the teacher's too."""
        x, y = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (inputs, targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.called(x)  # [B, T, V]
        total, entropy = next_token(logits, y, self.config.z_loss)
        if self.teacher is None or starts is None:
            return total, entropy
        c, expected = self.config, self.teacher.expects(x, starts, bf16=self.bf16)
        taught = distillation(logits, expected, y, c.temperature, c.direction)
        return total + c.teacher_weight * (taught - entropy), entropy

    def train_step(self) -> float:
        """One optimizer step; the batch's mean loss in nats. Raises Diverged, the model unchanged."""
        c = self.config
        starts = self.corpus.starts(self.step, c.batch, c.sequence, c.seed)
        inputs, targets = self.corpus.rows(starts, c.sequence)
        learned = max(1, int((targets != IGNORED).sum()))  # over all workers
        starts, inputs, targets = starts[self.batch_shard], inputs[self.batch_shard], targets[self.batch_shard]
        self.optimizer.zero_grad()
        entropies = []
        for first in range(0, len(inputs), c.micro_batch):
            rows = slice(first, first + c.micro_batch)
            with self.workers.accumulate_gradients(last=first + c.micro_batch >= len(inputs)):
                total, entropy = self._losses(inputs[rows], targets[rows], starts[rows])
                (total * (self.workers.world_size / learned)).backward()  # type: ignore[no-untyped-call]
            entropies.append(entropy.detach())
        (loss,) = self.workers.all_reduce_sum(sum(float(entropy) for entropy in entropies) / learned)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip))
        self.gradient_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(self.gradient_norm)):
            raise Diverged(self._divergence(loss, entropies), "train again with a lower --learning-rate")
        self.optimizer.step(c.learning_rate_at(self.step))
        self.step += 1
        return loss

    def _divergence(self, loss: float, entropies: list[Tensor]) -> str:
        """Where a step went wrong: its number, and which of its sequences."""
        bad = [i for i, entropy in enumerate(entropies) if not math.isfinite(float(entropy))]
        what = f"loss {loss}, gradient {self.gradient_norm}"
        if bad:
            first = self.batch_shard.start + bad[0] * self.config.micro_batch
            what += f", first in sequences {first} to {min(self.batch_shard.stop, first + self.config.micro_batch) - 1}"
        return f"training diverged at step {self.step + 1} ({what})"

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the weights that would be kept, over a fixed part of the held-out tokens, in nats per token."""
        c = self.config
        inputs, targets = self.corpus.validation(max(1, VALIDATION_TOKENS // c.sequence), c.sequence)
        total = 0.0
        with self.optimizer.averaged():
            for first in range(0, len(inputs), c.micro_batch):
                rows = slice(first, first + c.micro_batch)
                total += float(self._losses(inputs[rows], targets[rows])[1])
        return total / max(1, int((targets != IGNORED).sum()))

    @property
    def tokens(self) -> int:
        """Trained on so far, repeats counted."""
        return self.step * self.config.tokens_per_step

    # --- state ---

    def identity(self) -> dict[str, Any]:
        """What a continued training must agree with, and the step reached."""
        ids = {"architecture_id": self.model.architecture.id, "corpus_sha256": self.corpus.sha256}
        config = dataclasses.asdict(self.config)
        taught = {"teacher_sha256": None if self.teacher is None else self.teacher.sha256}
        return {"step": self.step, **ids, "start_sha256": self.start_sha256, **taught, "config": config}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by its name in the state file; whole, on every worker."""
        found = {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        return {name: full_tensor(tensor) for name, tensor in (found | self.optimizer.state()).items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from what `tensors` gave at `step`."""
        self.step = step
        like = self.model.state_dict()
        of = {name: like.get(name.partition(".")[2], tensor) for name, tensor in tensors.items()}
        parts = {
            name: shard(tensor.to(self.device), of[name]) if tensor.shape == of[name].shape else tensor
            for name, tensor in tensors.items()
        }
        self.model.load_state_dict({name: parts.pop(f"weights.{name}") for name in like})
        self.optimizer.restore(parts)

    def kept_weights(self) -> dict[str, np.ndarray]:
        """The weights that a checkpoint gets: averaged ones where there are any. On every worker."""
        with self.optimizer.averaged():
            state = self.model.state_dict()
            return {name: full_tensor(value).float().numpy(force=True).copy() for name, value in state.items()}


def train(
    a: Architecture,
    corpus: Corpus | Sequence[Path | str],
    out: Path | str,
    config: TrainingConfig,
    *,
    start: Checkpoint | None = None,
    teacher: Teacher | None = None,
    workers: Workers | None = None,
    compiled: bool = False,
    resume: bool = False,
    save_every: int = 1000,
    on_step: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train into the checkpoint folder `out`, saving every `save_every` steps and when `should_stop` says so.

    `corpus` is a prepared one, or what to prepare one from. `start`: a checkpoint to begin with instead of random
    weights; `teacher` is learned from besides. With `resume` it continues what `out` holds. Raises InputError (corpus,
    a teacher that does not fit, anything changed since), Diverged (what was saved before stays), ArtefactError (an
    altered state), OutputError. Before the first save a failure leaves nothing behind.
    """
    limits.check_range("save_every", save_every, 1, limits.MAX_ITERATIONS)
    out, workers = Path(out), workers or Workers()
    check(a, config, workers)
    saved = training_state.load(out) if resume else None
    prepared = corpus if isinstance(corpus, Corpus) else None
    if saved is None:
        if workers.is_main:
            _refuse_occupied(out)
    else:
        sha256 = prepared.sha256 if prepared else fingerprint(corpus, _tokenizer(start, teacher))  # type: ignore[arg-type]
        start_sha256 = None if start is None else start.training["sha256"]
        _refuse_changed(saved, a, sha256, start_sha256, None if teacher is None else teacher.sha256, config, out)
    try:
        if prepared is None:
            tokenizer, folder = _tokenizer(start, teacher), training_state.folder_of(out) / "corpus"
            prepared = _prepared(corpus, a, tokenizer, folder, workers)  # type: ignore[arg-type]
        trainer = Trainer(a, prepared, config, start=start, teacher=teacher, workers=workers, compiled=compiled)
        if saved is not None:
            trainer.restore(training_state.load_tensors(out, saved), saved["step"])
        return _run(trainer, out, saved["figures"] if saved else None, save_every, on_step, should_stop)
    except BaseException as error:
        if not training_state.exists(out):
            if workers.is_main:
                shutil.rmtree(training_state.folder_of(out), ignore_errors=True)
                with contextlib.suppress(OSError):
                    (out / training_state.LOG).unlink(missing_ok=True)
                    out.rmdir()  # only if it is empty: an older checkpoint stays
        elif isinstance(error, Diverged):
            step = training_state.load(out)["step"]
            raise Diverged(f"{error.message}; {out} keeps step {step:,}", error.hint) from None
        raise


def _prepared(
    sources: Sequence[Path | str], a: Architecture, tokenizer: Tokenizer | None, folder: Path, workers: Workers
) -> Corpus:
    """The corpus of `sources` in `folder`: the first worker makes it, the others read it."""
    if not workers.is_main:
        workers.barrier()
    found = prepare(sources, a.vocab_size, folder, tokenizer)
    if workers.is_main:
        workers.barrier()
    return found


def _tokenizer(start: Checkpoint | None, teacher: Teacher | None) -> Tokenizer | None:
    """The one that a training must use: its beginning's, or its teacher's."""
    if start is not None:
        return Tokenizer.load(start.path)
    return None if teacher is None else teacher.tokenizer


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
        first = trainer.validation_loss()
        figures = {"validation_loss_before": first, "validation_loss": first, "train_seconds": 0.0, "history": []}
    while trainer.step < c.steps:
        rate, began = c.learning_rate_at(trainer.step), time.perf_counter()
        loss = trainer.train_step()
        figures["train_seconds"] += time.perf_counter() - began
        if trainer.step == 1 or trainer.step % max(1, c.steps // HISTORY_POINTS) == 0:
            figures["history"].append([trainer.step, loss])
        (asked,) = trainer.workers.all_reduce_sum(should_stop())
        if trainer.step < c.steps and (asked or trainer.step % save_every == 0):
            figures["validation_loss"] = trainer.validation_loss()
            training = _save(trainer, out, figures, unfinished=True)
            if asked:
                return Outcome(False, training)
        speed = trainer.tokens / figures["train_seconds"]
        norm = trainer.gradient_norm
        on_step(Progress(trainer.step, loss, rate, norm, speed, figures["validation_loss"]))
    figures["validation_loss"] = trainer.validation_loss()
    training = _save(trainer, out, figures, unfinished=False)
    if trainer.workers.is_main:
        shutil.rmtree(training_state.folder_of(out), ignore_errors=True)
    trainer.workers.barrier()
    return Outcome(True, training)


def _save(trainer: Trainer, out: Path, figures: dict[str, Any], unfinished: bool) -> dict[str, Any]:
    """Write the checkpoint, and what an unfinished training needs to go on. What training.json holds."""
    speed = trainer.tokens / figures["train_seconds"]
    identity = trainer.identity()
    training = {
        "source": "train",
        **identity,
        "tokens": trainer.tokens,
        "tokens_per_second": speed,
        **figures,
    }
    tensors = trainer.tensors() if unfinished else {}
    weights = trainer.kept_weights()
    if trainer.workers.is_main:
        if unfinished:
            training_state.save(out, {**identity, "figures": figures}, tensors)
        a, corpus = trainer.model.architecture, trainer.corpus
        checkpoint.write_files(out, a, weights, tokenizer_json=corpus.tokenizer_json, chat=corpus.chat, training=training)
    trainer.workers.barrier()
    return training


def _refuse_changed(
    saved: dict[str, Any],
    a: Architecture,
    corpus_sha256: str,
    start_sha256: str | None,
    teacher_sha256: str | None,
    config: TrainingConfig,
    out: Path,
) -> None:
    hint = f"give what the training in {out} began with, or choose another --out"
    _require(saved.get("architecture_id") == a.id, "the architecture has changed since the training began", hint)
    _require(saved.get("corpus_sha256") == corpus_sha256, "the corpus has changed since the training began", hint)
    _require(saved.get("start_sha256") == start_sha256, "the training began with another checkpoint", hint)
    _require(saved.get("teacher_sha256") == teacher_sha256, "the training began with another teacher, or none", hint)
    then = dataclasses.asdict(TrainingConfig(**saved["config"]))
    for name, value in dataclasses.asdict(config).items():
        _require(then[name] == value, f"{name} is {value}, the training began with {then[name]}", hint)


def _refuse_occupied(out: Path) -> None:
    if training_state.exists(out):
        raise OutputError(f"{out} holds an unfinished training", "add --continue, or choose another --out")
    ours = out.is_dir() and (
        artefact.is_artefact_folder(out) or {p.name for p in out.iterdir()} <= {"state", training_state.LOG}
    )
    if out.exists() and not ours:
        raise OutputError(f"{out} exists and is not an artefact of merino-edge", "choose another --out")


def _require(condition: object, message: str, hint: str) -> None:
    if not condition:
        raise InputError(message, hint)
