"""What a teacher expects after every token of a corpus: its k largest log-probabilities, on disk.

The teacher runs over windows of `window` tokens that move by `stride`; of each but the first the last `stride`
positions count, so that everything is said after at least window - stride tokens (fewer at the corpus's beginning).
Windows do not look at where conversations begin. Written shard by shard: a run that was killed goes on with the first
that is not whole.

    logits.json      kind "teacher_logits", schema 1: teacher_sha256, corpus_sha256, vocab_size, tokens, top_k, window,
                     stride, batch, precision, shards [{tokens, logs_sha256, ids_sha256}, ...], finished
    logs-00000.bin   little-endian float16 [tokens, k], natural logarithms, descending; more of these as needed
    ids-00000.bin    their tokens [tokens, k], little-endian uint16, or uint32 above 65,536 tokens of vocabulary
    verified.json    what was found whole (merino_edge.data.shards)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merino_edge import artefact, limits
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import Corpus
from merino_edge.data.corpus_writer import token_dtype
from merino_edge.data.shards import Shards, Verified, name_of
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer

KIND = "teacher_logits"
SCHEMA_VERSION = 1
HEADER = "logits.json"
SHARD_VALUES = 2**24  # log-probabilities: 32 MiB, and as much of ids


def teach(
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
    """Write `folder`, or go on with it; the header. `window` is the model's context, `stride` half of it, if not given.

    `on_tokens` gets how many tokens are done, and how many this call did. Raises InputError (another tokenizer, other
    options than it began with), OutputError.
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
    header = _begun(folder, identity)
    if header["finished"]:
        return header
    model = Model.from_weights(a, teacher.weights).eval().requires_grad_(requires_grad=False).to(device)
    shards: list[dict[str, Any]] = header["shards"]
    done = before = sum(shard["tokens"] for shard in shards)
    of_shard = max(1, shard_values // (top_k * stride))  # windows
    windows = max(0, -(-(n - window) // stride)) + 1
    for first in range(len(shards) * of_shard, windows, of_shard):
        last = min(windows, first + of_shard)
        logs, ids = _expected(model, corpus, first, last, window, stride, batch, top_k, bf16)
        number = len(shards)
        content = {"logs": logs.astype("<f2").tobytes(), "ids": ids.astype(token_dtype(a.vocab_size)).tobytes()}
        for stem, values in content.items():
            artefact.write_bytes(folder / name_of(stem, number), values)
        hashes = {f"{stem}_sha256": artefact.sha256_bytes(values) for stem, values in content.items()}
        shards.append({"tokens": len(logs), **hashes})
        done += len(logs)
        header["finished"] = done == n
        header = artefact.write_json(folder / HEADER, KIND, artefact.remove_envelope(header), SCHEMA_VERSION)
        on_tokens(done, done - before)
    return header


def _begun(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    if not (folder / HEADER).is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} exists and is not a teacher's logits", "choose another --out")
        payload = {**identity, "shards": [], "finished": False}
        return artefact.write_json(folder / HEADER, KIND, payload, SCHEMA_VERSION)
    header = artefact.read_json(folder / HEADER, KIND, SCHEMA_VERSION)
    for name, value in identity.items():
        if header.get(name) != value:
            what = f"{name} is {value}, {folder} began with {header.get(name)}"
            raise InputError(what, "give the same again, or choose another --out")
    return header


@torch.no_grad()
def _expected(
    model: Model,
    corpus: Corpus,
    first: int,
    last: int,
    window: int,
    stride: int,
    batch: int,
    top_k: int,
    bf16: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Of the positions that windows `first` to `last` count for: log-probabilities and ids, each [N, k]."""
    logs, ids = [], []
    for starts in _together(first, last, window, stride, batch, len(corpus.tokens)):
        stop = min(window, len(corpus.tokens) - starts[0])
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


def _together(first: int, last: int, window: int, stride: int, batch: int, tokens: int) -> Iterator[list[int]]:
    """Where the windows begin that run together; the last of a corpus may be shorter, and runs alone."""
    starts = [number * stride for number in range(first, last)]
    short = [start for start in starts if start + window > tokens]
    whole = starts[: len(starts) - len(short)]
    for at in range(0, len(whole), batch):
        yield whole[at : at + batch]
    for start in short:
        yield [start]


class StoredLogits:
    """A finished folder, memory-mapped."""

    def __init__(self, folder: Path | str) -> None:
        """Raises ArtefactError for one that is unfinished or altered."""
        self.folder = Path(folder)
        self.header = header = artefact.read_json(self.folder / HEADER, KIND, SCHEMA_VERSION)
        if not header["finished"]:
            raise ArtefactError(f"{folder} is unfinished", "give its merino-edge distill logits command again")
        verified = Verified(self.folder, header["sha256"])
        k, dtypes = header["top_k"], {"logs": np.dtype("<f2"), "ids": token_dtype(header["vocab_size"])}
        found: dict[str, list[np.ndarray]] = {stem: [] for stem in dtypes}
        for number, shard in enumerate(header["shards"]):
            for stem, dtype in dtypes.items():
                name, shape = name_of(stem, number), (shard["tokens"], k)
                verified.check(name, shard[f"{stem}_sha256"], shape[0] * k * dtype.itemsize)
                found[stem].append(np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape))
        verified.save()
        self._logs, self._ids = Shards(found["logs"]), Shards(found["ids"])

    def rows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """After each of `length` tokens from each of `starts`: log-probabilities float32 and ids int64, [B, T, k]."""
        logs = np.stack([self._logs.window(int(start), int(start) + length) for start in starts])
        ids = np.stack([self._ids.window(int(start), int(start) + length) for start in starts])
        return logs.astype(np.float32), ids.astype(np.int64)
