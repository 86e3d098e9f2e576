"""A training: an architecture and a corpus become a checkpoint, whose files are saved now and then.

It can go on from its last save; `merino_edge.training.trainer` says how exactly. It knows no terminal: progress goes
to a callback.

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
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import atomic, checkpoint, limits, output
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import Corpus, fingerprint, prepare
from merino_edge.errors import InputError, OutputError
from merino_edge.tokenizer import Tokenizer
from merino_edge.training import state as training_state
from merino_edge.training.config import TrainingConfig
from merino_edge.training.distributed import Workers
from merino_edge.training.place import Place
from merino_edge.training.teacher import Teacher
from merino_edge.training.trainer import Diverged, Trainer, check

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
