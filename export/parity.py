"""Parity: proof that a bundle computes what its checkpoint computes, its engine against PyTorch fp32.

Every check is one figure against one limit (`LIMITS`, per precision). One failure fails the export. The engine runs
real text position by position, in windows at the start, in the middle and at the very end of the context:

    graph_kl               mean over positions of KL(PyTorch with the weights as stored || exported), nats: is the graph
                           right, whatever its precision costs
    mean_kl                the same against the checkpoint's own weights: what the precision costs
    max_logit_difference   max over positions and vocabulary of |exported - checkpoint|
    top1_agreement         share of positions with the same best token; a tie of the reference counts as agreement
    left_out_kl            for a pruned vocabulary: what the loss of the other tokens costs, nats; the other checks are
                           over the tokens that are kept
    greedy_tokens_equal    how many of GREEDY_TOKENS greedily decoded tokens agree before the first difference
    prefill_difference     max |prompt run at once - run token by token| at the end of each window, both exported
    graph_kl_C             KL of the graph with a cache of C positions from the largest graph, both exported

The report is a list of {check, value, limit, passed}. Imports PyTorch, as calibration and sensitivity do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ParityError
from merino_edge.export.quantization.stored_weights import StoredWeights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from merino_edge.runtime.engine import Engine

GREEDY_TOKENS = 200
FIRST_WINDOW, WINDOW = 96, 16  # positions compared at the start, and in each of the other two windows
GREEDY_PROMPT = 32
FIRST_GREEDY = 16  # tokens after which a difference is looked for: int4 often has one, and the rest is not decoded
CHUNK = 512  # positions that PyTorch runs at once before it reaches a window

# exp(mean_kl) is the factor on perplexity for text that the reference itself would write: at most 0.1 % more at fp16,
# 2 % at int8, 65 % at int4. docs/lab-notes.md has the figures of real models. ONNX Runtime's kernels round activations
# to int8; that shows in graph_kl.
# A limit is the greatest value that passes, except for the checks in `AT_LEAST`, where it is the least.
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {
        "graph_kl": 1e-6,
        "mean_kl": 1e-6,
        "max_logit_difference": 1e-3,
        "top1_agreement": 1.0,
        "greedy_tokens_equal": GREEDY_TOKENS,
        "prefill_difference": 1e-3,
    },
    "fp16": {"graph_kl": 1e-3, "mean_kl": 1e-3, "top1_agreement": 0.97, "prefill_difference": 0.1},
    "int8": {"graph_kl": 2e-2, "mean_kl": 2e-2},
    "int4": {"graph_kl": 2e-2, "mean_kl": 0.5},
}
AT_LEAST = ("top1_agreement", "greedy_tokens_equal")
TIE = 1e-3  # logits closer than this are one choice: fp32 rounding decides between them

# Written for this project. Any text would do; ordinary English is closest to a chat.
TEXT = """The little board sits on the desk beside the window. It has a small fan, a green light, and a stack of
notes from the week before. Every morning someone asks it a question: what is the weather like, how far is
the moon, why does bread rise? It reads the words one at a time, thinks for a moment, and answers in a calm
voice. "The moon is about 384,400 kilometres away," it says. Nobody trained it to be clever; it was made to be quick,
to use little power, and to say when it does not know. On some days it is wrong, and then we write that down too.
def area(width, height):
    return width * height  # in square metres
In the evening the light goes off, the fan stops, and the room is quiet again until tomorrow."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    check: str
    value: float
    limit: float | None  # None: reported, not judged
    passed: bool


def compare(
    checkpoint: Checkpoint,
    stored: StoredWeights,
    engine: Engine,
    *,
    precision: str,
    tokens: Sequence[int],
    max_kl: float | None = None,
) -> list[Check]:
    """All checks of `engine`, whose graph holds `stored`, against the checkpoint in PyTorch fp32.

    `tokens` are repeated until they fill the context. `max_kl` replaces the precision's limit of `mean_kl`.
    """
    text = np.resize(np.asarray(tokens, np.int64), engine.max_positions)  # [C]
    compared = windows(len(text))
    a, pruned_vocab = checkpoint.architecture, stored.pruned_vocab
    stored_logits = stored_reference(a, stored).windows(text, compared)  # [P, V]
    reference = TorchReference(a, checkpoint.weights)
    expected = reference.windows(text, compared)  # [P, V]
    left_out_kl = None
    if pruned_vocab is not None:
        reference.pruned_vocab = pruned_vocab
        left_out_kl = float(-np.log(np.exp(_log_softmax(expected))[:, pruned_vocab].sum(axis=-1)).mean())
        stored_logits, expected = stored_logits[:, pruned_vocab], expected[:, pruned_vocab]  # [P, V']
    got, prefill_difference = _run_windows(engine, text, compared)
    if pruned_vocab is not None:
        got = got[:, pruned_vocab]
    greedy_start = text[: max(1, min(GREEDY_PROMPT, len(text) // 4))]
    count = min(GREEDY_TOKENS, engine.max_positions - len(greedy_start))
    figures = {
        "graph_kl": mean_kl(stored_logits, got),
        "mean_kl": mean_kl(expected, got),
        "max_logit_difference": float(np.abs(got - expected).max()),
        "top1_agreement": top1_agreement(expected, got),
        **({} if left_out_kl is None else {"left_out_kl": left_out_kl}),
        "greedy_tokens_equal": greedy_agreement(reference, engine, greedy_start, count),
        "prefill_difference": prefill_difference,
    }
    limits = dict(LIMITS[precision])
    if max_kl is not None:
        limits["mean_kl"] = max_kl
    if "greedy_tokens_equal" in limits:
        limits["greedy_tokens_equal"] = count  # as many as a short context has room for
    return [_judge(name, value, limits.get(name)) for name, value in figures.items()]


def compare_capacity(
    smaller: Engine, largest: Engine, precision: str, tokens: Sequence[int], lowering: str = ""
) -> Check:
    """The KL of another graph from the one with the `largest` cache, over windows that fill its own cache.

    `lowering`: its lowering, where it has another.
    """
    text = np.resize(np.asarray(tokens, np.int64), smaller.max_positions)  # [C]
    (expected, _), (got, _) = (_run_windows(engine, text, windows(len(text))) for engine in (largest, smaller))
    columns = np.isfinite(expected[0])  # the tokens that the head keeps
    name = "_".join(filter(None, ["graph_kl", lowering, str(smaller.max_positions)]))
    return _judge(name, mean_kl(expected[:, columns], got[:, columns]), LIMITS[precision]["graph_kl"])


def stored_reference(a: Architecture, stored: StoredWeights) -> TorchReference:
    """The model in PyTorch with the weights as they are stored."""
    return TorchReference(replace(a, tied_head=a.tied_head and not stored.own_head), stored.dequantize())


def windows(context: int) -> list[tuple[int, int]]:
    """(first, end) of the positions that are compared: at the start, in the middle and at the end of the context."""
    ends = sorted({min(FIRST_WINDOW, context), (context + 1) // 2, context})
    spans: list[tuple[int, int]] = []
    done = 0
    for end in ends:
        first = max(done, 0 if not spans else end - WINDOW)
        if first < end:
            spans.append((first, end))
            done = end
    return spans


def _run_windows(
    engine: Engine, text: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float32], float]:
    """Logits [P, V] of every position in `spans`, run one by one through the cache, and the prefill difference.

    That is the largest difference from a prompt run at once, and from a step that returns several rows of logits.
    """
    got, difference, done = [], 0.0, 0
    for first, end in spans:
        if done < first:
            engine.forward(text[done:first], done)
        done = end
        got += [engine.forward(text[i : i + 1], i).copy() for i in range(first, end)]
        at_once = engine.forward(text[:end], 0)
        columns = np.isfinite(at_once)  # the tokens that the head keeps
        difference = max(difference, float(np.abs(at_once[columns] - got[-1][columns]).max()))
        rows = min(engine.max_rows, end - first)  # as speculative decoding verifies draft tokens
        several = engine.forward_rows(text[end - rows : end], end - rows, rows)
        difference = max(difference, float(np.abs(several[:, columns] - np.stack(got[-rows:])[:, columns]).max()))
    return np.stack(got), difference


def require_passed(checks: Sequence[Check]) -> None:
    """Raise ParityError that names the failed checks with their figures, where there are any."""
    failed = [f"{c.check} {c.value:.3g} (limit {c.limit:.3g})" for c in checks if not c.passed and c.limit is not None]
    if failed:
        message = f"the export does not match the checkpoint: {', '.join(failed)}"
        raise ParityError(message, "nothing was written; try a higher --precision", report(checks))


def report(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks as a manifest holds them."""
    return [asdict(check) for check in checks]


def _judge(name: str, value: float, limit: float | None) -> Check:
    if limit is None:
        return Check(name, value, None, passed=True)
    passed = value >= limit if name in AT_LEAST else value <= limit  # NaN fails both
    return Check(name, value, limit, bool(passed))


# --- figures ---------------------------------------------------------------------------------------


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def mean_kl(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Mean over rows of KL(softmax(expected) || softmax(got)) in nats; both [T, V]."""
    p, q = _log_softmax(expected), _log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def top1_agreement(expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Share of rows whose best token agrees, up to ties of the reference; both [T, V]."""
    of_best_got = np.take_along_axis(expected, got.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return float((expected.max(axis=-1) - of_best_got <= TIE).mean())


def greedy_agreement(reference: TorchReference, engine: Engine, start: NDArray[np.int64], count: int) -> int:
    """How many of `count` greedy tokens after the prompt `start` [T] agree before the first difference.

    The engine decodes. A run of the reference over its tokens tells where the reference would choose another.
    """
    tokens = list(start)
    for decoded in sorted({min(FIRST_GREEDY, count), count} - {0}):
        while len(tokens) - len(start) < decoded:
            done = len(tokens) - 1 if len(tokens) > len(start) else 0
            tokens.append(int(engine.forward(np.asarray(tokens[done:], np.int64), done).argmax()))
        expected = reference.logits(np.asarray(tokens[:-1], np.int64))[len(start) - 1 :]  # [decoded, V]
        of_decoded = expected[np.arange(decoded), tokens[len(start) :]]
        differs = expected.max(axis=-1) - of_decoded > TIE
        if differs.any():
            return int(differs.argmax())
    return count


class TorchReference:
    """The model in PyTorch, float32. `pruned_vocab` [V']: ids of the tokens that it may say; None: all."""

    pruned_vocab: np.ndarray | None = None

    def __init__(self, a: Architecture, weights: Mapping[str, NDArray[np.floating]]) -> None:
        from merino_edge.pytorch.model import Model

        self.model = Model.from_weights(a, weights, copy=False).eval()

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [T, V] of tokens [T], without a cache. Tokens outside `pruned_vocab` have minus infinity."""
        import torch

        with torch.inference_mode():
            logits = np.asarray(self.model(torch.from_numpy(tokens)[None])[0].float().numpy())
        if self.pruned_vocab is not None:
            logits[:, np.delete(np.arange(logits.shape[1]), self.pruned_vocab)] = -np.inf
        return logits

    def windows(self, text: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Logits [P, V] of the positions in `spans`; the text before them is run for its keys and values only."""
        import torch

        from merino_edge.pytorch.model import KVCache

        cache, done, logits = KVCache(self.model.architecture, 1, len(text)), 0, []
        tokens = torch.from_numpy(text)[None]
        with torch.inference_mode():
            for first, end in spans:
                for start in range(done, first, CHUNK):
                    self.model(tokens[:, start : min(start + CHUNK, first)], cache, start, last_only=True)
                logits.append(self.model(tokens[:, first:end], cache, first)[0].float().numpy())
                done = end
        return np.concatenate(logits)
