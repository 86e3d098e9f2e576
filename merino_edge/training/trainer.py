"""The trainer: an architecture and a corpus become a checkpoint, by the paper's recipe, with exact resume.

Batches are a function of the step (merino_edge.data.corpus), and the model has no dropout. So a resumed run ends with
the bits of an uninterrupted one, on the same CPU and thread count. Any number of workers sees the same batches
(merino_edge.training.distributed). The trainer knows no terminal: progress goes to a callback.

    CKPT/state (merino_edge.training.state), while training:
        step, architecture_id, corpus_sha256, start_sha256, teacher_sha256, config, figures;
        tensors weights.NAME and those of the optimizer (merino_edge.training.optimizer)
    CKPT/training.json:
        source "train", step, config, tokens, validation_loss_before, validation_loss (nats per token),
        tokens_per_second, history [[step, loss], ...], corpus_sha256, architecture_id,
        start_sha256 (of the checkpoint that the training began with, or null), teacher_sha256 (or null)

Losses in these files are cross-entropies, with a teacher too.
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

from merino_edge import atomic, checkpoint, limits, output
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import IGNORED, Corpus, fingerprint, prepare
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer
from merino_edge.training import device
from merino_edge.training import state as training_state
from merino_edge.training.config import TrainingConfig
from merino_edge.training.distributed import Workers, full_tensor, shard
from merino_edge.training.loss import distillation_loss, next_token_loss
from merino_edge.training.optimizer import Optimizer
from merino_edge.training.place import Place
from merino_edge.training.teacher import Teacher

VALIDATION_TOKENS = 2**14
HISTORY_POINTS = 200
CHANGED = {  # messages for a resumed training, by the field of its saved state
    "architecture_id": "the architecture has changed since the training began",
    "corpus_sha256": "the corpus has changed since the training began",
    "start_sha256": "the training began with another checkpoint",
    "teacher_sha256": "the training began with another teacher, or none",
}


@dataclass(frozen=True)
class Progress:
    """The argument of the callback of `train` after every step. `validation_loss` is the latest, in nats per token."""

    step: int  # steps done
    loss: float
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float
    validation_loss: float
    folder: Path  # where the training's files are at this time


@dataclass(frozen=True)
class Outcome:
    """The end of `train`: `finished`, or stopped on request. `training` is the content of training.json."""

    finished: bool
    training: dict[str, Any]


class Diverged(InputError):
    """The loss or the gradient is not finite. The model is unchanged by that step."""


def check(a: Architecture, config: TrainingConfig, workers: Workers) -> None:
    """Raise InputError for options that do not fit together, before any worker writes a file.

    When one worker fails, torchrun kills the others, and they clean nothing up.
    """
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
        """Begin with random weights, or with those of `start`, a checkpoint of `a`.

        Raises InputError where the options, the corpus and the teacher do not fit together.
        """
        self.corpus, self.config, self.step, self.gradient_norm = corpus, config, 0, 0.0
        self.workers = workers or Workers()
        check(a, config, self.workers)
        if (tokens := corpus.header["tokenizer_tokens"]) > a.vocab_size:
            what = f"the corpus has {tokens} tokens, the model's vocabulary {a.vocab_size}"
            raise InputError(what, "make it again with the model's vocabulary: merino-edge tokenize")
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
        self.wrapped_model = self.workers.wrap(self.model)
        self.optimizer = Optimizer(self.model, config)

    def _losses(
        self, inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the cross-entropy of tokens [B, T], as `next_token_loss` gives them.

        With `starts`, the first tokens [B] of the rows, the loss has the teacher's part too.
        """
        x, y = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (inputs, targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.wrapped_model(x)  # [B, T, V]
        total, entropy = next_token_loss(logits, y, self.config.z_loss)
        if self.teacher is None or starts is None:
            return total, entropy
        c, predicted = self.config, self.teacher.predict(x, starts, bf16=self.bf16)
        divergence = distillation_loss(logits, predicted, y, c.temperature, c.direction)
        return total + c.teacher_weight * (divergence - entropy), entropy

    def train_step(self) -> float:
        """Do one optimizer step and return the batch's mean loss in nats. Raises Diverged, with the model unchanged."""
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
        """The message about a diverged step: its number, and the sequences of its batch."""
        bad = [i for i, entropy in enumerate(entropies) if not math.isfinite(float(entropy))]
        what = f"loss {loss}, gradient {self.gradient_norm}"
        if bad:
            first = self.batch_shard.start + bad[0] * self.config.micro_batch
            what += f", first in sequences {first} to {min(self.batch_shard.stop, first + self.config.micro_batch) - 1}"
        return f"training diverged at step {self.step + 1} ({what})"

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss in nats per token over a fixed part of the held-out tokens, for the weights to be saved."""
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
        """The number of tokens trained on so far, repetitions included."""
        return self.step * self.config.tokens_per_step

    # --- state ---

    def identity(self) -> dict[str, Any]:
        """The step, and the fields that must be equal when a training resumes."""
        ids = {"architecture_id": self.model.architecture.id, "corpus_sha256": self.corpus.sha256}
        config = dataclasses.asdict(self.config)
        teacher = {"teacher_sha256": None if self.teacher is None else self.teacher.sha256}
        return {"step": self.step, **ids, "start_sha256": self.start_sha256, **teacher, "config": config}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, by their names in the state file: full tensors on every worker."""
        tensors = {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        return {name: full_tensor(tensor) for name, tensor in (tensors | self.optimizer.state()).items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Resume from what `tensors()` gave at `step`. Raises ArtefactError for the tensors of another model."""
        try:
            self._restore(tensors)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            what = f"the saved state is not one of this model ({reason})"
            raise ArtefactError(what, "train again with another --out") from None
        self.step = step

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        like = self.model.state_dict()
        parameter_of = {name: like.get(name.partition(".")[2], tensor) for name, tensor in tensors.items()}
        shards = {
            name: shard(tensor.to(self.device), parameter_of[name])
            if tensor.shape == parameter_of[name].shape
            else tensor
            for name, tensor in tensors.items()
        }
        self.model.load_state_dict({name: shards.pop(f"weights.{name}") for name in like})
        self.optimizer.restore(shards)

    def kept_weights(self) -> dict[str, np.ndarray]:
        """The weights for a checkpoint, averaged ones where there are any. Every worker must call this."""
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
    """Train into the checkpoint folder `out`. It saves every `save_every` steps, and stops when `should_stop` says so.

    `corpus` is a prepared corpus, or the sources of one. `start` is a checkpoint to begin with instead of random
    weights. `teacher` is for distillation. With `resume` the training in `out` goes on. Raises InputError (an unusable
    corpus or teacher, or options changed before a resume), Diverged (earlier saves stay), ArtefactError (an altered
    state), OutputError. A failure before the first save leaves no files, and a checkpoint in `out` as it was.
    """
    limits.check_range("save_every", save_every, 1, limits.MAX_ITERATIONS)
    out, workers = Path(out), workers or Workers()
    check(a, config, workers)
    if start is not None and start.path.resolve() == out.resolve():
        raise OutputError(f"{out} is the checkpoint that the training begins with", "choose another --out")
    # The main worker's claim keeps the others' processes out too.
    with output.claim(out, checkpoint.KIND, resumes=resume) if workers.is_main else contextlib.nullcontext():
        saved = training_state.load(out) if resume else None
        prepared = corpus if isinstance(corpus, Corpus) else None
        if saved is not None:
            sha256 = prepared.sha256 if prepared else fingerprint(corpus, _tokenizer(start, teacher))  # type: ignore[arg-type]
            start_sha256 = None if start is None else start.training["sha256"]
            teacher_sha256 = None if teacher is None else teacher.sha256
            hashes = {"corpus_sha256": sha256, "start_sha256": start_sha256, "teacher_sha256": teacher_sha256}
            _refuse_changed(saved, {"architecture_id": a.id, **hashes}, config, out)
        place = Place(out, workers, begins=saved is None)
        try:
            if prepared is None:
                tokenizer, folder = _tokenizer(start, teacher), training_state.folder_of(place.folder) / "corpus"
                prepared = _prepared(corpus, a, tokenizer, folder, workers)  # type: ignore[arg-type]
            trainer = Trainer(a, prepared, config, start=start, teacher=teacher, workers=workers, compiled=compiled)
            if saved is not None:
                trainer.restore(training_state.load_tensors(out, saved), saved["step"])
            figures = saved["figures"] if saved else None
            return _run(trainer, place, figures, save_every=save_every, on_step=on_step, should_stop=should_stop)
        except BaseException as error:
            if place.folder != out:
                if workers.is_main:
                    atomic.remove(place.folder)
            elif not (training_state.exists(out) or (out / "training.json").exists()):
                if workers.is_main:
                    shutil.rmtree(training_state.folder_of(out), ignore_errors=True)
                    with contextlib.suppress(OSError):
                        (out / training_state.LOG).unlink(missing_ok=True)
                        out.rmdir()  # only if it is empty
            elif isinstance(error, Diverged) and training_state.exists(out):
                step = training_state.load(out)["step"]
                raise Diverged(f"{error.message}; {out} keeps step {step:,}", error.hint) from None
            raise


def _prepared(
    sources: Sequence[Path | str], a: Architecture, tokenizer: Tokenizer | None, folder: Path, workers: Workers
) -> Corpus:
    """The corpus of `sources` in `folder`. The main worker makes it, then the others read it."""
    if not workers.is_main:
        workers.barrier()
    corpus = prepare(sources, a.vocab_size, folder, tokenizer)
    if workers.is_main:
        workers.barrier()
    return corpus


def _tokenizer(start: Checkpoint | None, teacher: Teacher | None) -> Tokenizer | None:
    """The tokenizer that a training must use: that of its first checkpoint, or of its teacher."""
    if start is not None:
        return Tokenizer.load(start.path)
    return None if teacher is None else teacher.tokenizer


def _run(
    trainer: Trainer,
    place: Place,
    figures: dict[str, Any] | None,
    *,
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
        (stop,) = trainer.workers.all_reduce_sum(should_stop())
        saves = trainer.step < c.steps and (stop or trainer.step % save_every == 0)
        if saves:
            figures["validation_loss"] = trainer.validation_loss()
        speed = trainer.tokens / figures["train_seconds"]
        norm = trainer.gradient_norm
        # Before the save: a training that goes on after this step logs from the next one.
        on_step(Progress(trainer.step, loss, rate, norm, speed, figures["validation_loss"], place.folder))
        if saves:
            training = _save(trainer, place, figures, unfinished=True)
            if stop:
                return Outcome(finished=False, training=training)
    figures["validation_loss"] = trainer.validation_loss()
    training = _save(trainer, place, figures, unfinished=False)
    if trainer.workers.is_main:
        training_state.end(place.folder)
    trainer.workers.barrier()
    return Outcome(finished=True, training=training)


def _save(trainer: Trainer, place: Place, figures: dict[str, Any], *, unfinished: bool) -> dict[str, Any]:
    """Write the checkpoint, and the state of an `unfinished` training. Returns the content of training.json."""
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
            training_state.save(place.folder, {**identity, "figures": figures}, tensors)
        a, corpus = trainer.model.architecture, trainer.corpus
        checkpoint.write_files(
            place.folder, a, weights, tokenizer_json=corpus.tokenizer_json, chat=corpus.chat, training=training
        )
    trainer.workers.barrier()
    trainer.corpus = place.publish(trainer.corpus)
    return training


def _refuse_changed(saved: dict[str, Any], identity: dict[str, str | None], config: TrainingConfig, out: Path) -> None:
    """Raise InputError where a resumed training differs from its saved state in identity or options."""
    hint = f"give what the training in {out} began with, or choose another --out"
    for name, message in CHANGED.items():
        _require(saved.get(name) == identity[name], message, hint)
    saved_config = dataclasses.asdict(TrainingConfig.of(saved["config"], str(out)))
    for name, value in dataclasses.asdict(config).items():
        if name == "micro_batch":  # it only trades memory for time
            continue
        _require(saved_config[name] == value, f"{name} is {value}, the training began with {saved_config[name]}", hint)


def _require(condition: object, message: str, hint: str) -> None:
    if not condition:
        raise InputError(message, hint)
