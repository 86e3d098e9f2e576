"""A synthetic corpus: a teacher answers prompts, in lines that `tokenize` and `train` read. Generation can resume.

Sample i draws random numbers that are a function of (seed, i). Batches depend only on `count` and `batch`: a round is
ROUND_BATCHES batches of samples, and within it prompts of equal token length form the batches. So a resumed run ends
with the bytes of an uninterrupted one (same machine, threads and PyTorch). A batch's lines are on disk before the
header counts them. Lines beyond the header are dropped and made again.

    CORPUS.jsonl   {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "sample": i}, one per line; for
                   plain text {"text": prompt and continuation, "sample": i}
    CORPUS.json    kind "written_corpus", schema 1: teacher {name, checkpoint_sha256, architecture_id}, licence (a note,
                   or null), prompts {name, sha256}, options {count, max_tokens, temperature, top_k,
                   top_p, frequency_penalty, batch, seed, precision, device, plain}, batches (done), finished,
                   samples (done), kept, dropped {reason: count}, tokens (the answers' that were kept), bytes,
                   content_sha256

`rejection_reason` says which answers are dropped. Exact copies are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from merino_edge import artefact, limits, output
from merino_edge.checkpoint import Checkpoint
from merino_edge.distillation.forms import WrittenCorpus
from merino_edge.distillation.prompts import Prompt, Prompts
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.batched_generation import BatchedGenerator, Completion, SamplingParams
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Message, Tokenizer

KIND = "written_corpus"
SCHEMA_VERSION = 1
ROUND_BATCHES = 16  # batches whose prompts are grouped by length
REPEATED_WORDS = 8


@dataclass(frozen=True)
class Plan:
    """The options of a generation. Raises InputError for a value out of range."""

    count: int  # of prompts; some answers are dropped
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
    """A prompt with its number and its token ids."""

    number: int
    prompt: Prompt
    ids: tuple[int, ...]


def header_path(out: Path) -> Path:
    """The header beside the corpus: CORPUS.json."""
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
    """Write `out` (.jsonl) and its header, or resume them. Returns the header.

    `on_batch` gets the header after every batch, and the number of tokens that this call has computed. Raises
    InputError (options that differ from the existing header, a prompt that does not fit, another process that writes),
    ArtefactError (altered files), OutputError.
    """
    out, device = Path(out), torch.device(device)
    if out.suffix != ".jsonl":
        raise OutputError(f"{out} does not end in .jsonl", "tokenize tells conversations by it; choose another --out")
    tokenizer = Tokenizer.load(teacher.path)
    if not plan.plain and tokenizer.chat.chat_template is None:
        raise InputError(f"{teacher.path} has no chat template", "add --plain, or use a teacher that answers")
    options = {**_options(plan), "precision": "bf16" if bf16 else "fp32", "device": device.type}
    identity = {**_origin(teacher, licence, prompts), "options": options}
    if (header := _open_header(out, identity))["finished"]:
        return header
    model = Model.from_weights(teacher.architecture, teacher.weights, copy=False)
    generator = BatchedGenerator(model, torch.bfloat16 if bf16 else torch.float32, device)
    with output.lock(out), artefact.translate_os_errors(out), open(out, "r+b") as file:
        header = _open_header(out, identity)  # again, now that no other process writes
        digest = _truncate_to_header(file, header, out)
        for number, samples in enumerate(_batches(prompts, plan, tokenizer)):
            if number < header["batches"]:
                continue
            generators = [np.random.default_rng([plan.seed, sample.number, 1]) for sample in samples]
            prompt_ids, ends = [sample.ids for sample in samples], tokenizer.chat.eos_token_ids
            answers = generator.generate(
                prompt_ids, plan.sampling, max_tokens=plan.max_tokens, end_token_ids=ends, generators=generators
            )
            lines = _lines(samples, answers, tokenizer, header, unwanted=prompts.unwanted, plain=plan.plain)
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


def _options(plan: Plan) -> dict[str, Any]:
    """The plan as the header records it, with the sampling parameters among the other options."""
    options = dataclasses.asdict(plan)
    sampling = options.pop("sampling")
    return {**options, **sampling}


def _origin(teacher: Checkpoint, licence: str | None, prompts: Prompts) -> dict[str, Any]:
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
    }


def _open_header(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The existing header, if it has this identity, or a new one. Raises InputError, ArtefactError, OutputError."""
    path = header_path(out)
    if not path.exists():
        if out.exists():
            raise OutputError(f"{out} exists and {path.name} does not", "choose another --out")
        counts = dict.fromkeys(("batches", "samples", "kept", "tokens", "bytes"), 0)
        empty_sha256 = hashlib.sha256().hexdigest()
        header = {**identity, "finished": False, "dropped": {}, **counts, "content_sha256": empty_sha256}
        _save(out, header)
    else:
        header = artefact.read_json(path, KIND, SCHEMA_VERSION, form=WrittenCorpus)
        for name, value in identity.items():
            _require_same(name, header.get(name), value, path)
        if not out.exists() and header["bytes"]:
            raise ArtefactError(f"{out} is gone, {path.name} is there", f"remove {path} and begin again")
    if not out.exists():
        with artefact.translate_os_errors(out), open(out, "xb"):
            pass
    return artefact.remove_envelope(header)


def _require_same(name: str, then: Any, now: Any, path: Path) -> None:
    if isinstance(now, dict) and isinstance(then, dict):
        for key in now:
            _require_same(key, then.get(key), now[key], path)
    elif then != now:
        raise InputError(f"{name} is {now}, {path} began with {then}", "give the same again, or choose another --out")


def _save(out: Path, header: dict[str, Any]) -> None:
    artefact.write_json(header_path(out), KIND, header, SCHEMA_VERSION)


def _truncate_to_header(file: IO[bytes], header: dict[str, Any], out: Path) -> Any:
    """Cut the file where the header's content ends. Returns the running hash. Raises ArtefactError if it differs."""
    digest, left = hashlib.sha256(), header["bytes"]
    while left and (chunk := file.read(min(left, 2**20))):
        digest.update(chunk)
        left -= len(chunk)
    if left or digest.hexdigest() != header["content_sha256"]:
        raise ArtefactError(
            f"{out} is not what {header_path(out)} says", f"it was altered; remove {out} and begin again"
        )
    file.truncate(header["bytes"])
    return digest


def _batches(prompts: Prompts, plan: Plan, tokenizer: Tokenizer) -> Iterator[list[Sample]]:
    """All batches in order. They do not depend on how many are done."""
    for first in range(0, plan.count, ROUND_BATCHES * plan.batch):
        numbers = range(first, min(plan.count, first + ROUND_BATCHES * plan.batch))
        by_length: dict[int, list[Sample]] = {}
        for number in numbers:
            prompt = prompts.prompt(plan.seed, number)
            sample = Sample(number, prompt, tuple(_encoded(prompt, tokenizer, plain=plan.plain)))
            by_length.setdefault(len(sample.ids), []).append(sample)
        for _, samples in sorted(by_length.items()):
            for start in range(0, len(samples), plan.batch):
                yield samples[start : start + plan.batch]


def _encoded(prompt: Prompt, tokenizer: Tokenizer, *, plain: bool) -> list[int]:
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
    header: dict[str, Any],
    *,
    unwanted: Sequence[str],
    plain: bool,
) -> bytes:
    """The lines that a batch adds to the file. It also adds to the header's counts."""
    lines = []
    for sample, answer in zip(samples, answers, strict=True):
        prompt = sample.prompt.user
        text = tokenizer.decode_after(sample.ids if plain else (), answer.ids)
        if (reason := rejection_reason(text, ended=answer.ended, unwanted=unwanted)) is not None:
            header["dropped"][reason] = header["dropped"].get(reason, 0) + 1
            continue
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text.strip()}]
        value: dict[str, Any] = {"text": prompt + text} if plain else {"messages": messages}
        lines.append(json.dumps({**value, "sample": sample.number}, ensure_ascii=False) + "\n")
        header["kept"] += 1
        header["tokens"] += len(answer.ids)
    return "".join(lines).encode()


def rejection_reason(text: str, *, ended: bool, unwanted: Sequence[str] = ()) -> str | None:
    """Why an answer is dropped; None if it is kept.

    Dropped are answers without end token, empty ones, those that repeat eight words in a row, and those with broken
    characters or unwanted words.
    """
    if not ended:
        return "cut off"
    words = text.lower().split()
    if not words:
        return "empty"
    if "\ufffd" in text:
        return "broken characters"
    ngrams = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    if len(set(ngrams)) < len(ngrams):
        return "repeats itself"
    return "unwanted words" if any(phrase.lower() in text.lower() for phrase in unwanted) else None
