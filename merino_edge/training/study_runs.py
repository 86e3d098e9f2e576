"""The trainings of a study: every architecture with every seed for equal tokens. They resume and run in parallel.

    STUDY/study.json       kind "study", schema 1: space (null: given models), architectures (dicts), names (theirs),
                           seeds, config (merino_edge.training.config), corpus_sha256
          corpus/          the tokens that all trainings read (merino_edge.data.corpus)
          models/ID-sN/    a checkpoint for architecture ID and seed N (merino_edge.checkpoint); unfinished: state/

This module knows no score. merino_edge.search.study.scores evaluates the losses.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.context
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.architecture import Architecture
from merino_edge.data import corpus as data
from merino_edge.errors import ArtefactError, InputError, MerinoError
from merino_edge.parent import end_with_parent
from merino_edge.training import state
from merino_edge.training.config import TrainingConfig
from merino_edge.training.forms import Study

KIND = "study"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The architectures, seeds and options of a study."""

    architectures: tuple[Architecture, ...]
    seeds: tuple[int, ...]
    config: TrainingConfig  # its seed is not used
    space: str | None = None  # the search space of the architectures, if they were drawn
    names: tuple[str, ...] = ()  # of the architectures, if they were given

    def to_dict(self) -> dict[str, Any]:
        """The plan as study.json holds it."""
        shapes = [a.to_dict() for a in self.architectures]
        config = dataclasses.asdict(self.config)
        origin = {"space": self.space, "names": list(self.names)}
        return {**origin, "architectures": shapes, "seeds": list(self.seeds), "config": config}

    @staticmethod
    def of(document: dict[str, Any], where: Path) -> Plan:
        """The plan in a study.json, which is read from `where`. Raises ArtefactError, ArchitectureError, InputError."""
        shapes = tuple(Architecture.from_dict(shape) for shape in document["architectures"])
        config = TrainingConfig.of(document["config"], str(where))
        return Plan(shapes, tuple(document["seeds"]), config, document["space"], tuple(document.get("names", ())))


@dataclass(frozen=True)
class Run:
    """One training of a study: an architecture, a seed and a checkpoint folder."""

    architecture: Architecture
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the training has reached its last step."""
        return (self.folder / "training.json").is_file() and not state.exists(self.folder)


def open_study(folder: Path | str, plan: Plan, sources: Sequence[Path | str]) -> None:
    """Begin the study in `folder`, or check that `folder` holds this study. Raises InputError, ArtefactError."""
    folder = Path(folder)
    sizes = {a.vocab_size for a in plan.architectures}
    if len(sizes) != 1:
        raise InputError(f"the architectures have vocabularies of {sorted(sizes)}", "losses compare only over one")
    document = {**plan.to_dict(), "corpus_sha256": data.fingerprint(sources)}
    if (folder / "study.json").is_file():
        existing = artefact.read_json(folder / "study.json", KIND, SCHEMA_VERSION, form=Study)
        # Options that an older version did not know have their defaults.
        existing |= Plan.of(existing, folder / "study.json").to_dict()
        for name, value in document.items():
            if artefact.canonical_json(existing.get(name)) != artefact.canonical_json(value):
                raise InputError(f"{folder} is a study of other {name}", "give what it began with, or another folder")
    else:
        data.prepare(sources, sizes.pop(), folder / "corpus")
        artefact.write_json(folder / "study.json", KIND, document, SCHEMA_VERSION)


def load(folder: Path | str) -> Plan:
    """The plan of the study in `folder`. Raises ArtefactError."""
    path = Path(folder) / "study.json"
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no study", "begin one: merino-edge study --help")
    return Plan.of(artefact.read_json(path, KIND, SCHEMA_VERSION, form=Study), path)


def runs(folder: Path | str, plan: Plan) -> list[Run]:
    """Every training of the plan: first all architectures with the first seed."""
    models = Path(folder) / "models"
    return [Run(a, seed, models / f"{a.id}-s{seed}") for seed in plan.seeds for a in plan.architectures]


def train_all(
    folder: Path | str,
    plan: Plan,
    workers: int = 1,
    threads: int = 1,
    on_run: Callable[[Run, dict[str, Any]], None] = lambda run, training: None,
) -> None:
    """Run the unfinished trainings, `workers` at a time with `threads` each. A killed study resumes from its saves.

    The largest models come first, so that no long training runs alone at the end. One at a time needs no process of
    its own, which would import PyTorch again. Raises what a training raises.
    """
    unfinished = [run for run in runs(folder, plan) if not run.finished]
    unfinished.sort(key=lambda run: (run.seed, -run.architecture.parameters))
    if workers == 1:
        import torch

        torch.set_num_threads(threads)
        for run in unfinished:
            on_run(run, _train_one(Path(folder), run, plan.config))
        return
    with ProcessPoolExecutor(workers, _workers_context(), _ignore_interrupts, (threads,)) as pool:
        waiting = {pool.submit(_train_one, Path(folder), run, plan.config): run for run in unfinished}
        try:
            for done in as_completed(waiting):
                on_run(waiting[done], done.result())
        except BrokenProcessPool:
            raise MerinoError(
                "a process that trained a model of the study was killed, maybe for want of memory",
                "the same command goes on; add --workers N for fewer at a time",
            ) from None
        except BaseException:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()  # each training keeps its last save
            raise


def _workers_context() -> multiprocessing.context.BaseContext:
    """How workers start: where it can be, from a process that has imported PyTorch once and touches no GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # PyTorch's optimizers import the second in each worker otherwise, which takes 3 s.
    context.set_forkserver_preload(["merino_edge.training.train", "torch._dynamo"])
    return context


def _ignore_interrupts(threads: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal. The main process handles it."""
    import torch

    end_with_parent()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _train_one(folder: Path, run: Run, config: TrainingConfig) -> dict[str, Any]:
    from merino_edge.training.train import train

    corpus = data.load(folder / "corpus")
    config = dataclasses.replace(config, seed=run.seed)
    resume, save_every = state.exists(run.folder), max(1, config.steps // 4)
    outcome = train(run.architecture, corpus, run.folder, config, resume=resume, save_every=save_every)
    return outcome.training
