"""Zero-shot evaluation: any engine as a model of lm-evaluation-harness, and what came out, item by item.

    {"kind": "evaluation", "schema_version": 1, "tool_version", "model", "engine", "limit", "tasks": {NAME: {"items",
     "items_sha256", "metrics": {NAME: {"value", "stderr"}}, "per_item": {NAME: [...]}, "seconds"}}, "mean_accuracy",
     "perplexity" (merino_edge.runtime.evaluation.perplexity), "sha256"}

`per_item` is what two runs are compared by: correct or not, and of perplexities [sum of log p, words or bytes]. A
log-likelihood is one pass over context and continuation, the beginning that a request shares with the one before found
in the cache. Source of the protocol: https://github.com/EleutherAI/lm-evaluation-harness, whose own `hf` backend gives
the same numbers (docs/lab-notes.md).
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from merino_edge import artefact
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.evaluation.tasks import harness_task
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling import Sampling
from merino_edge.runtime.session import Session
from merino_edge.statistics import percentile_interval, resampled_indices
from merino_edge.tokenizer import Tokenizer

KIND = "evaluation"
SCHEMA_VERSION = 1
RESAMPLES = 2000  # of a bootstrap
ROWS = 256  # of logits at once: float64 copies of a whole context's would be gigabytes
PERPLEXITIES: dict[str, Callable[[float], float]] = {  # from nats a token, word or byte
    "token_perplexity": math.exp,
    "word_perplexity": math.exp,
    "byte_perplexity": math.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}


class EngineLM(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model, from an engine. `on_step` is told how many requests of how many are done."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, on_step: Callable[[int, int], None]) -> None:
        super().__init__()
        self._session, self._tokenizer, self._on_step = Session(engine), tokenizer, on_step

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context: the token that begins a text, or else one that ends it."""
        chat = self._tokenizer.chat
        if chat.bos_token_id is not None:
            return chat.bos_token_id
        if not chat.eos_token_ids:
            raise InputError("the tokenizer has no token that begins or ends a text", "give tasks that have a context")
        return chat.eos_token_ids[0]

    def tok_encode(self, string: str, *, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids, bos = self._tokenizer.encode(string), self._tokenizer.chat.bos_token_id
        return ids[1:] if add_special_tokens is False and bos is not None and ids[:1] == [bos] else ids

    def loglikelihood(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness splits them; its bar would not heed TQDM_DISABLE."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for done, (_, context, continuation) in enumerate(requests):
            self._on_step(done, len(requests))
            found.append(self.log_likelihood(context, continuation))
        return found

    def log_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The sum of log p of `continuation` after `context`, and whether each of its tokens was the likeliest.

        What is longer than the engine's context loses its beginning. Raises InputError where that is of the
        continuation."""
        session, places = self._session, self._session.engine.max_positions
        if len(continuation) > places:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, the context {places}", "give a larger one"
            )
        ids = [*context, *continuation][-(places + 1) :][:-1]
        first = len(ids) - len(continuation)  # the last token before it
        if session.ids[:first] == ids[:first]:
            del session.ids[first:]
        else:
            session.prefill(ids[:first])
        total, greedy = 0.0, True
        most_rows = min(session.engine.max_rows, ROWS)
        for start in range(0, len(continuation), most_rows):
            expected = np.asarray(continuation[start : start + most_rows])
            token, *others = ids[first + start : first + start + len(expected)]
            rows = session.step(token, others).astype(np.float64)  # [N, V]
            for other in others:
                session.keep(other)
            most = rows.max(axis=1, keepdims=True)
            normalizer = most[:, 0] + np.log(np.exp(rows - most).sum(axis=1))
            total += float((rows[np.arange(len(expected)), expected] - normalizer).sum())
            greedy &= bool((rows.argmax(axis=1) == expected).all())
        return total, greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in windows of the context that do not overlap in what they score."""
        found = []
        for done, request in enumerate(requests):
            self._on_step(done, len(requests))
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._session.engine.max_positions,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            found.append(sum(self.log_likelihood(context, continuation)[0] for context, continuation in pairs))
        return found

    def generate_until(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[str]:
        found = []
        for done, request in enumerate(requests):
            self._on_step(done, len(requests))
            context, how = request.args
            most, until = how.get("max_gen_toks", 256), [how.get("until", [])]
            stop = [text for part in until for text in ([part] if isinstance(part, str) else part)]
            ids = self.tok_encode(context)[-(self._session.engine.max_positions - most) :]
            answer = generate(self._session, self._tokenizer, ids, Sampling(greedy=True), most, stop=stop)
            found.append("".join(answer))
        return found


def evaluate_task(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer,
    data: Path,
    *,
    limit: int | None,
    on_step: Callable[[int, int], None],
) -> dict[str, Any]:
    """One task's entry of the report, over its first `limit` items. Raises InputError."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    began = time.perf_counter()
    task = harness_task(name, data)
    model = EngineLM(engine, tokenizer, on_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of F-scores where a class is never said
        outcome = run_harness(model, {name: task}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(outcome["samples"][name], key=lambda sample: sample["doc_id"])
    results = outcome["results"][name]
    metrics, per_item = {}, {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if kind != "none" or metric.endswith("_stderr") or not isinstance(value, float):
            continue
        items = [sample[metric] for sample in samples]
        simple = isinstance(items[0], int | float) or metric in PERPLEXITIES
        metrics[metric] = {"value": value, "stderr": standard_error(metric, items) if simple else None}
        if simple:
            per_item[metric] = [list(item) if isinstance(item, tuple) else float(item) for item in items]
    return {
        "items": len(samples),
        "items_sha256": artefact.sha256_text(artefact.canonical_json([sample["doc"] for sample in samples])),
        "metrics": metrics,
        "per_item": per_item,
        "seconds": round(time.perf_counter() - began, 1),
    }


def value_of(metric: str, items: Any) -> float:
    """A metric from its items: their mean, or of perplexities what their sums give."""
    array = np.asarray(items, np.float64)
    if metric in PERPLEXITIES:
        return float(PERPLEXITIES[metric](-array[:, 0].sum() / array[:, 1].sum()))
    return float(array.mean())


def resampled(metric: str, items: Any, seed: int = 0) -> np.ndarray:
    """The metric of `RESAMPLES` draws of as many items, with replacement; the same draws for as many items [R]."""
    array = np.asarray(items, np.float64)
    return np.array([value_of(metric, array[drawn]) for drawn in resampled_indices(len(array), RESAMPLES, seed)])


def standard_error(metric: str, items: Any) -> float:
    """Of a mean s / sqrt(n), of a perplexity by bootstrap over items."""
    array = np.asarray(items, np.float64)
    if len(array) < 2:
        return 0.0
    return float(resampled(metric, array).std() if metric in PERPLEXITIES else array.std(ddof=1) / np.sqrt(len(array)))


def mean_accuracy(tasks: dict[str, Any]) -> float | None:
    """Over tasks that have one; None where none has."""
    found = [entry["metrics"]["acc"]["value"] for entry in tasks.values() if "acc" in entry["metrics"]]
    return sum(found) / len(found) if found else None


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric that two reports have of the same items: values, difference, its 95 % interval over resampled items.

    Of a task whose items differ there is nothing to say: it is left out.
    """
    found = []
    for name, entry in mine["tasks"].items():
        other = theirs["tasks"].get(name)
        if other is None or other["items_sha256"] != entry["items_sha256"]:
            continue
        for metric, items in entry["per_item"].items():
            if metric not in other["per_item"]:
                continue
            pair = [value_of(metric, part) for part in (items, other["per_item"][metric])]
            draws = resampled(metric, items) - resampled(metric, other["per_item"][metric])
            low, high = percentile_interval(draws)
            row = {"task": name, "metric": metric, "value": pair[0], "other": pair[1]}
            found.append(row | {"difference": pair[0] - pair[1], "low": float(low), "high": float(high)})
    return found
