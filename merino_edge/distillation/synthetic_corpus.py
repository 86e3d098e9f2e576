"""A corpus that a teacher writes: answers to prompts, as lines that `tokenize` and `train` read; gone on with at will.

Sample i is drawn from numbers that are a function of (seed, i), and batches are formed from `count` and `batch` alone:
samples in rounds of ROUND batches, in a round prompts of equal token length together. So a run that was killed and
given again ends with the bytes of one that was not (same machine, threads and PyTorch). A batch's lines are on the disk
before the header says so; what the file has beyond the header is dropped and made again.

    CORPUS.jsonl   {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "sample": i}, one a line, or of
                   plain text {"text": prompt and continuation, "sample": i}
    CORPUS.json    kind "written_corpus", schema 1: teacher {name, checkpoint_sha256, architecture_id}, licence (a note
                   that was given, or null), prompts {name, sha256}, options {count, max_tokens, temperature, top_k,
                   top_p, frequency_penalty, batch, seed, precision, device, plain}, batches (done), finished,
                   samples (done), kept, dropped {reason: count}, tokens (the answers' that were kept), bytes,
                   content_sha256

Dropped are answers that `max_tokens` cut off, empty ones, those that say eight words in a row twice, those with broken
characters and those with words that the prompts call unwanted. Exact copies are kept.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from merino_edge import artefact, limits
from merino_edge.checkpoint import Checkpoint
from merino_edge.distillation.prompts import Prompt, Prompts
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.batched_generation import BatchedGenerator, Completion, SamplingParams
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Message, Tokenizer

KIND = "written_corpus"
SCHEMA_VERSION = 1
ROUND = 16  # batches
REPEATED = 8  # words


@dataclass(frozen=True)
class Plan:
    """What is to be written, with `sampling`; construction raises InputError naming what is out of range."""

    count: int  # of prompts; fewer answers are kept
    max_tokens: int = 300
    sampling: SamplingParams = field(default_factory=SamplingParams)
    batch: int = 32
    seed: int = 0
    plain: bool = False  # prompts are continued instead of answered

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, limits.MAX_ITERATIONS),
            ("max_tokens", 1, limits.MAX_NEW_TOKENS),
            ("batch", 1, limits.MAX_BATCH),
            ("seed", 0, limits.MAX_SEED),
        ):
            limits.check_range(name, getattr(self, name), low, high)


@dataclass(frozen=True)
class Sample:
    number: int
    prompt: Prompt
    ids: tuple[int, ...]


def header_of(out: Path) -> Path:
    return out.with_suffix(".json")


def write(
    teacher: Checkpoint,
    prompts: Prompts,
    out: Path | str,
    plan: Plan,
    *,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    licence: str | None = None,
    on_batch: Callable[[dict[str, Any], int], None] = lambda header, computed: None,
) -> dict[str, Any]:
    """Write `out` (.jsonl) and its header, or go on with them; the header. `on_batch` gets it after every batch, and
    how many tokens this call has computed.

    Raises InputError (other options than it began with, a prompt that does not fit, another process writes),
    ArtefactError (what is there was altered), OutputError.
    """
    out, device = Path(out), torch.device(device)
    if out.suffix != ".jsonl":
        raise OutputError(f"{out} does not end in .jsonl", "tokenize tells conversations by it; choose another --out")
    tokenizer = Tokenizer.load(teacher.path)
    if not plan.plain and tokenizer.chat.chat_template is None:
        raise InputError(f"{teacher.path} has no chat template", "add --plain, or use a teacher that answers")
    identity = _identity(teacher, prompts, plan, bf16, device, licence)
    if (header := _begun(out, identity))["finished"]:
        return header
    model = Model.from_weights(teacher.architecture, teacher.weights)
    generator = BatchedGenerator(model, torch.bfloat16 if bf16 else torch.float32, device)
    with artefact.translate_os_errors(out), open(out, "r+b") as file:
        _lock(file, out)
        header = _begun(out, identity)  # as it is now that nobody else writes
        digest = _rewound(file, header, out)
        for number, samples in enumerate(_batches(prompts, plan, tokenizer)):
            if number < header["batches"]:
                continue
            generators = [np.random.default_rng([plan.seed, sample.number, 1]) for sample in samples]
            prompt_ids, ends = [sample.ids for sample in samples], tokenizer.chat.eos_token_ids
            answers = generator.generate(prompt_ids, plan.sampling, max_tokens=plan.max_tokens, end_token_ids=ends, generators=generators)
            lines = _lines(samples, answers, tokenizer, prompts.unwanted, plan.plain, header)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            digest.update(lines)
            header["bytes"] += len(lines)
            header["batches"] += 1
            header["samples"] += len(samples)
            header["finished"] = header["samples"] == plan.count
            header["content_sha256"] = digest.hexdigest()
            _save(out, header)
            on_batch(header, generator.computed_tokens)
    return header


def _identity(
    teacher: Checkpoint, prompts: Prompts, plan: Plan, bf16: bool, device: torch.device, licence: str | None
) -> dict[str, Any]:
    options = dataclasses.asdict(plan)
    options |= options.pop("sampling")
    source = teacher.training.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    return {
        "teacher": {
            "name": name or teacher.path.name,
            "checkpoint_sha256": teacher.training["sha256"],
            "architecture_id": teacher.architecture.id,
        },
        "licence": licence,
        "prompts": {"name": prompts.name, "sha256": prompts.sha256},
        "options": {**options, "precision": "bf16" if bf16 else "fp32", "device": device.type},
    }


def _begun(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The header to go on with: the one that is there, if it is of the same, or a new one."""
    path = header_of(out)
    if not path.exists():
        if out.exists():
            raise OutputError(f"{out} exists and {path.name} does not", "choose another --out")
        counts = dict.fromkeys(("batches", "samples", "kept", "tokens", "bytes"), 0)
        nothing = hashlib.sha256().hexdigest()
        header = {**identity, "finished": False, "dropped": {}, **counts, "content_sha256": nothing}
        _save(out, header)
    else:
        header = artefact.read_json(path, KIND, SCHEMA_VERSION)
        for name, value in identity.items():
            _require_same(name, header.get(name), value, path)
        if not out.exists() and header["bytes"]:
            raise ArtefactError(f"{out} is gone, {path.name} is there", f"remove {path} and begin again")
    if not out.exists():
        with artefact.translate_os_errors(out), open(out, "xb"):
            pass
    return artefact.remove_envelope(header)


def _lock(file: IO[bytes], out: Path) -> None:
    """Until the file is closed, for this process alone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process writes {out}", "wait until it ends, or choose another --out") from None


def _require_same(name: str, then: Any, now: Any, path: Path) -> None:
    if isinstance(now, dict) and isinstance(then, dict):
        for key in now:
            _require_same(key, then.get(key), now[key], path)
    elif then != now:
        raise InputError(f"{name} is {now}, {path} began with {then}", "give the same again, or choose another --out")


def _save(out: Path, header: dict[str, Any]) -> None:
    artefact.write_json(header_of(out), KIND, header, SCHEMA_VERSION)


def _rewound(file: IO[bytes], header: dict[str, Any], out: Path) -> Any:
    """Drop what the header does not know of; the hash of what it does."""
    digest, left = hashlib.sha256(), header["bytes"]
    while left and (chunk := file.read(min(left, 2**20))):
        digest.update(chunk)
        left -= len(chunk)
    if left or digest.hexdigest() != header["content_sha256"]:
        raise ArtefactError(f"{out} is not what {header_of(out)} says", f"it was altered; remove {out} and begin again")
    file.truncate(header["bytes"])
    return digest


def _batches(prompts: Prompts, plan: Plan, tokenizer: Tokenizer) -> Iterator[list[Sample]]:
    """All of them in order, the same whatever was done before."""
    for first in range(0, plan.count, ROUND * plan.batch):
        numbers = range(first, min(plan.count, first + ROUND * plan.batch))
        of_length: dict[int, list[Sample]] = {}
        for number in numbers:
            prompt = prompts.prompt(plan.seed, number)
            sample = Sample(number, prompt, tuple(_encoded(prompt, tokenizer, plan.plain)))
            of_length.setdefault(len(sample.ids), []).append(sample)
        for _, samples in sorted(of_length.items()):
            for start in range(0, len(samples), plan.batch):
                yield samples[start : start + plan.batch]


def _encoded(prompt: Prompt, tokenizer: Tokenizer, plain: bool) -> list[int]:
    if plain:
        return tokenizer.encode(prompt.asked)
    messages: list[Message] = [{"role": "user", "content": prompt.asked}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return tokenizer.encode_chat(messages)


def _lines(
    samples: Sequence[Sample],
    answers: Sequence[Completion],
    tokenizer: Tokenizer,
    unwanted: Sequence[str],
    plain: bool,
    header: dict[str, Any],
) -> bytes:
    """What a batch adds to the file; the header's counts follow."""
    lines = []
    for sample, answer in zip(samples, answers, strict=True):
        said, asked = tokenizer.decode(answer.ids), sample.prompt.user
        if (reason := fault(said, ended=answer.ended, unwanted=unwanted)) is not None:
            header["dropped"][reason] = header["dropped"].get(reason, 0) + 1
            continue
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said.strip()}]
        value: dict[str, Any] = {"text": asked + said} if plain else {"messages": messages}
        lines.append(json.dumps({**value, "sample": sample.number}, ensure_ascii=False) + "\n")
        header["kept"] += 1
        header["tokens"] += len(answer.ids)
    return "".join(lines).encode()


def fault(said: str, ended: bool, unwanted: Sequence[str] = ()) -> str | None:
    """Why an answer is not kept; None: it is."""
    if not ended:
        return "cut off"
    words = said.lower().split()
    if not words:
        return "empty"
    if "\ufffd" in said:
        return "broken characters"
    runs = [tuple(words[i : i + REPEATED]) for i in range(len(words) - REPEATED + 1)]
    if len(set(runs)) < len(runs):
        return "repeats itself"
    return "unwanted words" if any(text.lower() in said.lower() for text in unwanted) else None
