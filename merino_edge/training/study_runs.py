"""The trainings of a study: every architecture with every seed, for equal tokens; resumable, several at a time.

STUDY/study.json       kind "study", schema 1: space (null: they were given), architectures (dicts), names (theirs),
                       seeds, config (merino_edge.training.config), corpus_sha256
      corpus/          the tokens that all of them read (merino_edge.data.corpus)
      models/ID-sN/    a checkpoint for architecture ID and seed N (merino_edge.checkpoint), unfinished ones with state/

It knows no score: what the losses say is merino_edge.search.study.scores's.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.architecture import Architecture
from merino_edge.data import corpus as data
from merino_edge.errors import ArtefactError, InputError
from merino_edge.training import state
from merino_edge.training.config import TrainingConfig

KIND = "study"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What a study trains."""

    architectures: tuple[Architecture, ...]
    seeds: tuple[int, ...]
    config: TrainingConfig  # its seed is not used
    space: str | None = None  # that they were drawn from
    names: tuple[str, ...] = ()  # of models that were given

    def to_dict(self) -> dict[str, Any]:
        shapes = [a.to_dict() for a in self.architectures]
        config = dataclasses.asdict(self.config)
        given = {"space": self.space, "names": list(self.names)}
        return {**given, "architectures": shapes, "seeds": list(self.seeds), "config": config}

    @staticmethod
    def of(document: dict[str, Any]) -> Plan:
        shapes = tuple(Architecture.from_dict(shape) for shape in document["architectures"])
        config = TrainingConfig(**document["config"])
        return Plan(shapes, tuple(document["seeds"]), config, document["space"], tuple(document.get("names", ())))


@dataclass(frozen=True)
class Run:
    """One training of a study."""

    architecture: Architecture
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "training.json").is_file() and not state.exists(self.folder)


def open_study(folder: Path | str, plan: Plan, sources: Sequence[Path | str]) -> None:
    """Begin the study in `folder`, or make sure that it is the one there. Raises InputError, ArtefactError."""
    folder = Path(folder)
    sizes = {a.vocab_size for a in plan.architectures}
    if len(sizes) != 1:
        raise InputError(f"the architectures have vocabularies of {sorted(sizes)}", "losses compare only over one")
    document = {**plan.to_dict(), "corpus_sha256": data.fingerprint(sources)}
    if (folder / "study.json").is_file():
        there = artefact.read_json(folder / "study.json", KIND, SCHEMA_VERSION)
        there |= Plan.of(there).to_dict()  # what this version knows besides has its default
        for name, value in document.items():
            if artefact.canonical_json(there.get(name)) != artefact.canonical_json(value):
                raise InputError(f"{folder} is a study of other {name}", "give what it began with, or another --out")
    else:
        data.prepare(sources, sizes.pop(), folder / "corpus")
        artefact.write_json(folder / "study.json", KIND, document, SCHEMA_VERSION)


def load(folder: Path | str) -> Plan:
    """The plan of the study in `folder`. Raises ArtefactError."""
    path = Path(folder) / "study.json"
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no study", "begin one: merino-edge study --help")
    return Plan.of(artefact.read_json(path, KIND, SCHEMA_VERSION))


def runs(folder: Path | str, plan: Plan) -> list[Run]:
    """Every training, the first seed of all architectures first."""
    models = Path(folder) / "models"
    return [Run(a, seed, models / f"{a.id}-s{seed}") for seed in plan.seeds for a in plan.architectures]


def train_all(
    folder: Path | str,
    plan: Plan,
    workers: int = 1,
    threads: int = 1,
    on_run: Callable[[Run, dict[str, Any]], None] = lambda run, training: None,
) -> None:
    """Train what is not finished, `workers` at a time with `threads` each; largest first, so that none is left alone.

    Killed at any moment, what it saved is continued. Raises what a training raises.
    """
    left = [run for run in runs(folder, plan) if not run.finished]
    left.sort(key=lambda run: (run.seed, -run.architecture.parameters))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _ignore_interrupts, (threads,)) as pool:
        waiting = {pool.submit(_train_one, Path(folder), run, plan.config): run for run in left}
        try:
            for done in as_completed(waiting):
                on_run(waiting[done], done.result())
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()  # each keeps what it last saved
            raise


def _ignore_interrupts(threads: int) -> None:
    """Ctrl-C reaches every process of a terminal; the first one decides."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _train_one(folder: Path, run: Run, config: TrainingConfig) -> dict[str, Any]:
    from merino_edge.training import trainer

    corpus = data.load(folder / "corpus")
    config = dataclasses.replace(config, seed=run.seed)
    resume, save_every = state.exists(run.folder), max(1, config.steps // 4)
    outcome = trainer.train(run.architecture, corpus, run.folder, config, resume=resume, save_every=save_every)
    return outcome.training
