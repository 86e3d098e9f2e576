"""What training reads: texts, recipes, prompts, corpora, studies, states of a training, stored logits."""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzz.byte_changes import encode_text, text_step
from fuzz.draft import Codec, Draft, Files, Loader, record, sign_file, text
from fuzz.honest import TEXT, TINY, save_checkpoint, written
from fuzz.loaders.designs import show
from fuzz.loaders.models import seal_checkpoint
from fuzz.tokenizer_form import TOKENIZER
from fuzz.weight_forms import SAFETENSORS

from merino_edge import artefact, checkpoint
from merino_edge.cli import study as study_verb
from merino_edge.cli.console import stderr
from merino_edge.data import corpus as data
from merino_edge.data.corpus import Corpus
from merino_edge.distillation import prompts, synthetic_corpus
from merino_edge.distillation.teacher_logits import write_teacher_logits
from merino_edge.tokenizer import Tokenizer
from merino_edge.training import recipe, state, study_runs, teacher, train
from merino_edge.training.config import TrainingConfig

CONFIG = TrainingConfig(
    steps=3, batch=1, sequence=8, micro_batch=1, warmup=1, learning_rate=1e-3, precision="fp32", ema=0.5
)
TALK = [
    {"messages": [{"role": "user", "content": "Hello fox"}, {"role": "assistant", "content": "The lazy dog."}]},
    {"turns": ["Who jumps?", "The quick brown fox."]},
    {"instruction": "Say it", "context": "here", "response": "Deich."},
    {"text": TEXT},
    {"text": TEXT * 3},
] * 3


@functools.cache
def kept(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of things that honest files stand beside. It stays as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder)
    return folder


@functools.cache
def model() -> Path:
    return kept("model", lambda folder: save_checkpoint(folder / "c")) / "c"


def _write_text(folder: Path) -> None:
    (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in TALK))


@functools.cache
def corpus() -> Corpus:
    def make(folder: Path) -> None:
        _write_text(folder)
        data.prepare(
            [folder / "t.jsonl"], TINY.vocab_size, folder / "corpus", Tokenizer.load(model()), shard_tokens=256
        )

    return data.load(kept("corpus", make) / "corpus")


# --- texts, recipes, prompts -----------------------------------------------------------------------


def _step_packed(plain: bytes, rng: Random) -> bytes:
    if rng.random() < 0.004:
        return bytes(rng.choice((10**7, 3 * 10**8)))  # a bomb: zeros pack well
    if len(plain) >= 10**7:  # as text it would take the memory that the loader is tried with
        return plain
    return encode_text(text_step("<|endoftext|>")(plain.decode(errors="surrogateescape"), rng))


PACKED = Codec(lzma.decompress, _step_packed, functools.partial(lzma.compress, preset=0))
_PLAIN = text("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _texts() -> Files:
    talk = "".join(json.dumps(record) + "\n" for record in TALK[:5]).encode()
    return {"t.jsonl": talk, "t.txt": TEXT.encode(), "p.txt.xz": lzma.compress(TEXT.encode())}


def _use_texts(folder: Path) -> None:
    data.prepare([folder / "t.jsonl", folder / "t.txt", folder / "p.txt.xz"], TINY.vocab_size, folder / "out", _own())
    shutil.rmtree(folder / "out")


@functools.cache
def _own() -> Tokenizer:
    return Tokenizer.load(model())


def _recipe() -> Files:
    document = {"kind": "recipe", "schema_version": 1, "about": "small", "corpus": ["t.txt", "hf:a/b:text"],
                "vocab_size": 264, "config": dataclasses.asdict(CONFIG)}  # fmt: skip
    return {"r.json": json.dumps(document).encode()}


def _use_recipe(folder: Path) -> None:
    loaded = recipe.load(str(folder / "r.json"))
    TrainingConfig(**loaded.config)


def _prompts() -> Files:
    document = {
        "kind": "prompts", "schema_version": 1, "about": "stories", "system": "Be brief.", "asked": "Say: {prompt}",
        "slots": {"animal": ["a cat", "a dog"], "place": ["here", "there", "home"]},
        "groups": [{"templates": ["{animal} sits {place}", "{animal} and {animal:2}"], "share": 2},
                   {"templates": ["Nobody {place:3}"], "asked": "{prompt}?"}],
        "unwanted": ["bad"],
    }  # fmt: skip
    return {"p.json": json.dumps(document).encode(), "p.txt": b"Say hello.\nWho are you?\n"}


def _use_prompts(folder: Path) -> None:
    for name in ("p.json", "p.txt"):
        loaded = prompts.load(folder / name)
        for number in range(4):
            loaded.prompt(0, number)


# --- corpora ---------------------------------------------------------------------------------------


def _write_corpus(folder: Path) -> None:
    shutil.copytree(corpus().folder, folder, dirs_exist_ok=True)


def _seal_corpus(made: Draft) -> None:
    head = "corpus.json"
    for name in ("tokenizer", "chat"):
        record(made, f"{name}.json", head, (f"{name}_sha256",))
    record(made, "conversations.bin", head, ("conversations_sha256",))
    for name in made.honest:
        stem, _, number = name.removesuffix(".bin").rpartition("-")
        if stem in ("tokens", "learned"):
            record(made, name, head, ("shards", int(number), f"{stem}_sha256"))
    sign_file(made, head)


def _use_corpus(folder: Path) -> None:
    show(folder)
    loaded = data.load(folder)
    assert loaded.chat and Tokenizer.load(folder).vocab_size
    loaded.batch(1, 2, 8)
    loaded.validation(3, 8)


# --- studies ---------------------------------------------------------------------------------------


def _write_study(folder: Path) -> None:
    shapes = tuple(
        dataclasses.replace(TINY, blocks=(dataclasses.replace(TINY.blocks[0], layers=n),)) for n in (1, 2, 3)
    )
    plan = study_runs.Plan(shapes, (0, 1), CONFIG, None, ("one", "two", "three"))
    study_runs.open_study(folder, plan, [corpus().folder])
    for number, run in enumerate(study_runs.runs(folder, plan)):
        content = {"id": run.architecture.id, "files": {}, "source": "train", "validation_loss": 5.0 + number / 10}
        artefact.write_json(run.folder / "training.json", checkpoint.KIND, content)


def _seal_study(made: Draft) -> None:
    for name in list(made.structures):
        sign_file(made, name)


def _use_study(folder: Path) -> None:
    show(folder)
    plan = study_runs.load(folder)
    study_verb.report(folder, plan, 0, stderr())


# --- the state of a training -----------------------------------------------------------------------


def _write_state(folder: Path) -> None:
    steps: list[int] = []
    torch.set_num_threads(1)
    train.train(
        TINY, corpus(), folder, CONFIG, on_step=lambda progress: steps.append(progress.step),
        should_stop=lambda: len(steps) >= 1,
    )  # fmt: skip


def _seal_state(made: Draft) -> None:
    for name in made.honest:
        if name.startswith("state/step-"):
            record(made, name, "state/state.json", ("file_sha256",))
    if "state/state.json" in made.honest:
        sign_file(made, "state/state.json")
    seal_checkpoint(made)


def _use_state(folder: Path) -> None:
    state.load(folder)
    train.train(TINY, corpus(), folder, CONFIG, resume=True)


# --- what a teacher wrote --------------------------------------------------------------------------


def _write_logits(folder: Path) -> None:
    write_teacher_logits(_loaded(), corpus(), folder, top_k=3, window=16, shard_values=600)


def _seal_logits(made: Draft) -> None:
    for name in made.honest:
        stem, _, number = name.removesuffix(".bin").rpartition("-")
        if stem in ("logs", "ids"):
            record(made, name, "logits.json", ("shards", int(number), f"{stem}_sha256"))
    sign_file(made, "logits.json")


def _use_logits(folder: Path) -> None:
    show(folder)
    loaded = teacher.load(folder)
    loaded.prepare(TINY, corpus(), CONFIG, torch.device("cpu"))
    loaded.predict(torch.zeros(2, 8, dtype=torch.int64), np.array([0, 20]), bf16=False)


_PLAN = synthetic_corpus.Plan(count=2, max_tokens=3, batch=1, seed=0)


def _write_written(folder: Path) -> None:
    lines = prompts.Prompts("own", "0" * 64, ("Hello fox", "Say it"))
    synthetic_corpus.write(_loaded(), lines, folder / "w.jsonl", _PLAN)


@functools.cache
def _loaded() -> checkpoint.Checkpoint:
    return checkpoint.load(model())


def _seal_written(made: Draft) -> None:
    record(made, "w.jsonl", "w.json", ("content_sha256",), size=("bytes",))
    sign_file(made, "w.json")


def _use_written(folder: Path) -> None:
    show(folder / "w.json")
    _write_written(folder)


def _headed_by(name: str) -> dict[str, Any]:
    return {name: 4}


LOADERS = (
    Loader("text", _texts, _use_texts, codecs={".xz": PACKED, ".txt": _PLAIN}),
    Loader("recipe", _recipe, _use_recipe, seal=lambda made: sign_file(made, "r.json")),
    Loader("prompts", _prompts, _use_prompts, codecs={".txt": text("{a}", "#")}, weights={"p.json": 9}),
    Loader(
        "corpus",
        functools.partial(written, _write_corpus),
        _use_corpus,
        codecs={"tokenizer.json": TOKENIZER},
        seal=_seal_corpus,
        weights={"corpus.json": 8, "conversations.bin": 4},
    ),
    Loader(
        "study",
        functools.partial(written, _write_study),
        _use_study,
        seal=_seal_study,
        weights={"study.json": 12},
    ),
    Loader(
        "state",
        functools.partial(written, _write_state),
        _use_state,
        codecs={".safetensors": SAFETENSORS, "tokenizer.json": TOKENIZER},
        seal=_seal_state,
        weights={"state/state.json": 8, "state/step-1.safetensors": 8, "training.json": 0.3, "log.jsonl": 0.5}
        | dict.fromkeys(checkpoint.FILES, 0.1),
        writes=True,
    ),
    Loader(
        "logits",
        functools.partial(written, _write_logits),
        _use_logits,
        seal=_seal_logits,
        weights=_headed_by("logits.json"),
    ),
    Loader(
        "written-corpus",
        functools.partial(written, _write_written),
        _use_written,
        seal=lambda made: [
            record(made, "w.jsonl", "w.json", ("content_sha256",), size=("bytes",)),
            sign_file(made, "w.json"),
        ],
        weights=_headed_by("w.json"),
        writes=True,
    ),
)
