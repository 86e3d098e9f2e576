"""Teacher logits on disk: the k largest log-probabilities of a teacher after every token of a corpus.

The teacher runs over windows of `window` tokens that move by `stride`. Of each window but the first only the last
`stride` positions count. So a prediction has at least window - stride tokens of context, except at the corpus's
beginning. Windows ignore the borders of conversations. The folder is written shard by shard, and a killed run resumes
with the first incomplete shard.

    logits.json      kind "teacher_logits", schema 1: teacher_sha256, corpus_sha256, vocab_size, tokens, top_k, window,
                     stride, batch, precision, shards [{tokens, logs_sha256, ids_sha256}, ...], finished
    logs-00000.bin   little-endian float16 [tokens, k], natural logarithms, descending; more of these as needed
    ids-00000.bin    their tokens [tokens, k], little-endian uint16, or uint32 above 65,536 tokens of vocabulary
    verified.json    which files were correct (merino_edge.data.shards)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merino_edge import artefact, limits, output
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import Corpus
from merino_edge.data.corpus_writer import token_dtype
from merino_edge.data.shards import Shards, Verified, shard_name
from merino_edge.distillation import forms
from merino_edge.errors import ArtefactError, InputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer

KIND = "teacher_logits"
SCHEMA_VERSION = 1
HEADER = "logits.json"
SHARD_VALUES = 2**24  # log-probabilities: 32 MiB, and as much of ids


def write_teacher_logits(
    teacher: Checkpoint,
    corpus: Corpus,
    folder: Path | str,
    *,
    top_k: int = 64,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    shard_values: int = SHARD_VALUES,
    on_tokens: Callable[[int, int], None] = lambda done, now: None,
) -> dict[str, Any]:
    """Write `folder`, or resume it. Returns the header.

    `window` is the model's context by default, and `stride` half of the window. `on_tokens` gets the number of tokens
    done, and the number that this call did. Raises InputError (another tokenizer, options that differ from the existing
    folder), OutputError.
    """
    folder, a, n = Path(folder), teacher.architecture, len(corpus.tokens)
    window = a.max_positions if window is None else limits.check_range("window", window, 2, a.max_positions)
    stride = max(1, window // 2) if stride is None else limits.check_range("stride", stride, 1, window)
    limits.check_range("top_k", top_k, 1, a.vocab_size)
    limits.check_range("batch", batch, 1, limits.MAX_BATCH)
    if Tokenizer.load(teacher.path).sha256 != corpus.header["tokenizer_sha256"]:
        hint = f"make it again: merino-edge tokenize SOURCES --tokenizer {teacher.path} --out CORPUS"
        raise InputError("the corpus was made with another tokenizer than the teacher's", hint)
    identity = {
        "teacher_sha256": teacher.training["sha256"],
        "corpus_sha256": corpus.sha256,
        "vocab_size": a.vocab_size,
        "tokens": n,
        "top_k": top_k,
        "window": window,
        "stride": stride,
        "batch": batch,
        "precision": "bf16" if bf16 else "fp32",
    }
    with output.claim(folder, KIND, resumes=True):
        return _write(teacher, corpus, folder, identity, device=device, shard_values=shard_values, on_tokens=on_tokens)


def _write(
    teacher: Checkpoint,
    corpus: Corpus,
    folder: Path,
    identity: dict[str, Any],
    *,
    device: torch.device | str,
    shard_values: int,
    on_tokens: Callable[[int, int], None],
) -> dict[str, Any]:
    a, n, bf16 = teacher.architecture, len(corpus.tokens), identity["precision"] == "bf16"
    top_k, window, stride, batch = (identity[name] for name in ("top_k", "window", "stride", "batch"))
    header = _open_header(folder, identity)
    if header["finished"]:
        return header
    model = Model.from_weights(a, teacher.weights, copy=False).eval().requires_grad_(requires_grad=False).to(device)
    shards: list[dict[str, Any]] = header["shards"]
    done = before = sum(shard["tokens"] for shard in shards)
    shard_windows = max(1, shard_values // (top_k * stride))
    windows = _Windows(n, window, stride, batch)
    for first in range(len(shards) * shard_windows, windows.count, shard_windows):
        batches = windows.batches(first, min(windows.count, first + shard_windows))
        logs, ids = _predict(model, corpus, windows, batches, top_k=top_k, bf16=bf16)
        number = len(shards)
        content = {"logs": logs.astype("<f2").tobytes(), "ids": ids.astype(token_dtype(a.vocab_size)).tobytes()}
        for stem, values in content.items():
            artefact.write_bytes(folder / shard_name(stem, number), values)
        hashes = {f"{stem}_sha256": artefact.sha256_bytes(values) for stem, values in content.items()}
        shards.append({"tokens": len(logs), **hashes})
        done += len(logs)
        header["finished"] = done == n
        header = artefact.write_json(folder / HEADER, KIND, artefact.remove_envelope(header), SCHEMA_VERSION)
        on_tokens(done, done - before)
    return header


def _open_header(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The existing header, if it has this identity, or a new one. Raises InputError, ArtefactError, OutputError."""
    if not (folder / HEADER).is_file():
        payload = {**identity, "shards": [], "finished": False}
        return artefact.write_json(folder / HEADER, KIND, payload, SCHEMA_VERSION)
    header = artefact.read_json(folder / HEADER, KIND, SCHEMA_VERSION, form=forms.TeacherLogits)
    for name, value in identity.items():
        if header.get(name) != value:
            what = f"{name} is {value}, {folder} began with {header.get(name)}"
            raise InputError(what, "give the same again, or choose another --out")
    return header


@dataclass(frozen=True)
class _Windows:
    """Windows of `window` tokens over a corpus of `tokens` tokens. They move by `stride`, and `batch` run at once."""

    tokens: int
    window: int
    stride: int
    batch: int

    @property
    def count(self) -> int:
        return max(0, -(-(self.tokens - self.window) // self.stride)) + 1

    def batches(self, first: int, last: int) -> Iterator[list[int]]:
        """The first tokens of windows `first` to `last`, in batches. A window cut by the corpus's end runs alone."""
        starts = [number * self.stride for number in range(first, last)]
        full = [start for start in starts if start + self.window <= self.tokens]
        for index in range(0, len(full), self.batch):
            yield full[index : index + self.batch]
        for start in starts[len(full) :]:
            yield [start]


@torch.no_grad()
def _predict(
    model: Model, corpus: Corpus, windows: _Windows, batches: Iterator[list[int]], *, top_k: int, bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The largest log-probabilities and their ids, each [N, k], of the positions that count in these windows."""
    window, stride = windows.window, windows.stride
    logs, ids = [], []
    for starts in batches:
        stop = min(window, windows.tokens - starts[0])
        rows = np.stack([corpus.tokens.window(start, start + stop) for start in starts]).astype(np.int64)  # [B, W]
        tokens = torch.from_numpy(rows).to(model.embedding.weight.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            logits = model(tokens)
        for row, start in zip(logits, starts, strict=True):  # [W, V]
            counted = row[0 if start == 0 else window - stride :].float().log_softmax(-1)
            values, indices = counted.topk(top_k, dim=-1)
            logs.append(values.numpy(force=True))
            ids.append(indices.numpy(force=True))
    return np.concatenate(logs), np.concatenate(ids)


class TeacherLogits:
    """A finished folder of teacher logits, memory-mapped."""

    def __init__(self, folder: Path | str) -> None:
        """Raises ArtefactError for an unfinished or altered folder."""
        self.folder = Path(folder)
        self.header = header = artefact.read_json(self.folder / HEADER, KIND, SCHEMA_VERSION, form=forms.TeacherLogits)
        if not header["finished"]:
            raise ArtefactError(f"{folder} is unfinished", "give its merino-edge distill logits command again")
        verified = Verified(self.folder, header["sha256"])
        k, dtypes = header["top_k"], {"logs": np.dtype("<f2"), "ids": token_dtype(header["vocab_size"])}
        arrays: dict[str, list[np.ndarray]] = {stem: [] for stem in dtypes}
        for number, shard in enumerate(header["shards"]):
            for stem, dtype in dtypes.items():
                name, shape = shard_name(stem, number), (shard["tokens"], k)
                verified.check(name, shard[f"{stem}_sha256"], shape[0] * k * dtype.itemsize)
                arrays[stem].append(np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape))
        verified.save()
        self._logs, self._ids = Shards(arrays["logs"]), Shards(arrays["ids"])

    def rows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities float32 and ids int64, each [B, T, k], after `length` tokens from each of `starts` [B]."""
        logs = np.stack([self._logs.window(int(start), int(start) + length) for start in starts])
        ids = np.stack([self._ids.window(int(start), int(start) + length) for start in starts])
        if ids.max() >= self.header["vocab_size"]:
            raise ArtefactError(f"{self.folder} holds tokens beyond its vocabulary", "make it again")
        return logs.astype(np.float32), ids.astype(np.int64)
