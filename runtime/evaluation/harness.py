"""Zero-shot evaluation: runs an engine as a model of lm-evaluation-harness, and reports each item's score.

A log-likelihood is one forward pass over context and continuation. A prefix that a request shares with the one before
is reused from the KV cache. Source of the protocol: https://github.com/EleutherAI/lm-evaluation-harness. Its own `hf`
backend gives the same numbers (docs/lab-notes.md). `per_item` is what two runs are compared by: for accuracies 1 or 0,
for perplexities [sum of log p, words or bytes]. The report:

    {"kind": "evaluation", "schema_version": 1, "tool_version", "model", "engine", "limit", "tasks": {NAME: {"items",
     "items_sha256", "metrics": {NAME: {"value", "stderr"}}, "per_item": {NAME: [...]}, "seconds"}}, "mean_accuracy",
     "perplexity" (merino_edge.runtime.evaluation.perplexity), "sha256"}
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from merino_edge import artefact
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.evaluation.tasks import harness_task
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.statistics import percentile_interval, resampled_indices
from merino_edge.tokenizer import Tokenizer

KIND = "evaluation"
SCHEMA_VERSION = 1
RESAMPLES = 2000  # bootstrap samples
MOST_NATS = 700.0  # a float holds no much larger power of e
ROWS = 256  # rows of logits in one step; float64 copies for a whole context would take gigabytes
PERPLEXITIES: dict[str, Callable[[float], float]] = {  # from nats per token, word or byte
    "token_perplexity": lambda nats: math.exp(min(nats, MOST_NATS)),
    "word_perplexity": lambda nats: math.exp(min(nats, MOST_NATS)),
    "byte_perplexity": lambda nats: math.exp(min(nats, MOST_NATS)),
    "bits_per_byte": lambda nats: nats / math.log(2),
}


class EngineLM(TemplateLM):  # type: ignore[misc]
    """An engine as a model of the harness."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, on_step: Callable[[int, int], None]) -> None:
        """`on_step` is called before each request with (requests done, all requests)."""
        super().__init__()
        self._session, self._tokenizer, self._on_step = Session(engine), tokenizer, on_step

    @property
    def eot_token_id(self) -> int:
        """The context of a text that has none: the bos token, or an eos token. Raises InputError without either."""
        chat = self._tokenizer.chat
        if chat.bos_token_id is not None:
            return chat.bos_token_id
        if not chat.eos_token_ids:
            raise InputError("the tokenizer has no token that begins or ends a text", "give tasks that have a context")
        return chat.eos_token_ids[0]

    def tok_encode(self, string: str, *, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of `string`, without bos where `add_special_tokens` is False."""
        ids, bos = self._tokenizer.encode(string), self._tokenizer.chat.bos_token_id
        return ids[1:] if add_special_tokens is False and bos is not None and ids[:1] == [bos] else ids

    def loglikelihood(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Like the harness's method, but without its progress bar, which ignores TQDM_DISABLE."""
        results: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for done, (_, context, continuation) in enumerate(requests):
            self._on_step(done, len(requests))
            results.append(self.log_likelihood(context, continuation))
        return results

    def log_likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The sum of log p of `continuation` after `context`, and whether greedy decoding gives the continuation.

        A request that is longer than the engine's context loses its beginning. Raises InputError where the
        continuation alone is longer.
        """
        session, max_positions = self._session, self._session.engine.max_positions
        if len(continuation) > max_positions:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, the context {max_positions}", "give a larger one"
            )
        ids = [*context, *continuation][-(max_positions + 1) :][:-1]
        first = len(ids) - len(continuation)  # the last token before the continuation
        if session.prompt_length >= first and session.ids[:first] == ids[:first]:
            session.cut(first)
        else:
            session.prefill(ids[:first])
        total, greedy = 0.0, True
        max_rows = min(session.engine.max_rows, ROWS)
        for start in range(0, len(continuation), max_rows):
            expected = np.asarray(continuation[start : start + max_rows])
            token, *others = ids[first + start : first + start + len(expected)]
            rows = session.step(token, others).astype(np.float64)  # [N, V]
            for other in others:
                session.accept(other)
            largest = rows.max(axis=1, keepdims=True)
            normalizer = largest[:, 0] + np.log(np.exp(rows - largest).sum(axis=1))
            total += float((rows[np.arange(len(expected)), expected] - normalizer).sum())
            greedy &= bool((rows.argmax(axis=1) == expected).all())
        return total, greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the engine's context; each token is scored once."""
        results = []
        for done, request in enumerate(requests):
            self._on_step(done, len(requests))
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._session.engine.max_positions,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            results.append(sum(self.log_likelihood(context, continuation)[0] for context, continuation in pairs))
        return results

    def generate_until(self, requests: Sequence[Any], *, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the stop strings `until` or `max_gen_toks` tokens."""
        results = []
        for done, request in enumerate(requests):
            self._on_step(done, len(requests))
            context, options = request.args
            max_tokens, until = options.get("max_gen_toks", 256), [options.get("until", [])]
            stop = [text for part in until for text in ([part] if isinstance(part, str) else part)]
            ids = self.tok_encode(context)[-(self._session.engine.max_positions - max_tokens) :]
            answer = generate(self._session, self._tokenizer, ids, Sampling(greedy=True), max_tokens, stop=stop)
            results.append("".join(answer))
        return results


def evaluate_task(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer,
    data: Path,
    *,
    limit: int | None,
    on_step: Callable[[int, int], None],
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate one task over its first `limit` items and return its entry of the report.

    `on_step` is called with (requests done, all requests). `before` is the entry of an interrupted run, which stays if
    it is of the same items. Raises InputError where a file is missing.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    began = time.perf_counter()
    model = EngineLM(engine, tokenizer, on_step)
    with warnings.catch_warnings(), _naming_the_set(name, data):
        warnings.simplefilter("ignore")  # about F-scores where a class is never predicted
        task = harness_task(name, data)
        if before is not None and before["items_sha256"] == _hash_of(list(itertools.islice(task.eval_docs, limit))):
            return before
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
        "items_sha256": _hash_of([sample["doc"] for sample in samples]),
        "metrics": metrics,
        "per_item": per_item,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _hash_of(items: list[dict[str, Any]]) -> str:
    return artefact.sha256_text(artefact.canonical_json(items))


@contextlib.contextmanager
def _naming_the_set(name: str, data: Path) -> Iterator[None]:
    """Turn what the harness raises for items of another form into a one-line InputError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{data}: the items of {name} cannot be used ({reason})", "get the set again") from error


def value_of(metric: str, items: Any) -> float:
    """A metric's value from its items: their mean, or for a perplexity the ratio of their sums."""
    array = np.asarray(items, np.float64)
    if metric in PERPLEXITIES:
        return float(PERPLEXITIES[metric](-array[:, 0].sum() / array[:, 1].sum()))
    return float(array.mean())


def resampled(metric: str, items: Any, seed: int = 0) -> np.ndarray:
    """The metric's values [R] over R = RESAMPLES bootstrap samples. The samples depend only on the number of items."""
    array = np.asarray(items, np.float64)
    return np.array([value_of(metric, array[drawn]) for drawn in resampled_indices(len(array), RESAMPLES, seed)])


def standard_error(metric: str, items: Any) -> float:
    """The standard error: s / sqrt(n) for a mean, a bootstrap over items for a perplexity."""
    array = np.asarray(items, np.float64)
    if len(array) < 2:
        return 0.0
    return float(resampled(metric, array).std() if metric in PERPLEXITIES else array.std(ddof=1) / np.sqrt(len(array)))


def mean_accuracy(tasks: dict[str, Any]) -> float | None:
    """The mean over the tasks that have an accuracy; None if there is none."""
    accuracies = [entry["metrics"]["acc"]["value"] for entry in tasks.values() if "acc" in entry["metrics"]]
    return sum(accuracies) / len(accuracies) if accuracies else None


def differences(report: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare two reports: a row for each metric of the same items, with its difference and 95 % interval.

    The interval is a paired bootstrap over items. Tasks whose items differ are left out.
    """
    rows = []
    for name, entry in report["tasks"].items():
        other = baseline["tasks"].get(name)
        if other is None or other["items_sha256"] != entry["items_sha256"]:
            continue
        for metric, items in entry["per_item"].items():
            if metric not in other["per_item"]:
                continue
            pair = [value_of(metric, part) for part in (items, other["per_item"][metric])]
            draws = resampled(metric, items) - resampled(metric, other["per_item"][metric])
            low, high = percentile_interval(draws)
            row = {"task": name, "metric": metric, "value": pair[0], "other": pair[1]}
            rows.append(row | {"difference": pair[0] - pair[1], "low": float(low), "high": float(high)})
    return rows
