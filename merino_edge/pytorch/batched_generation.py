"""Batched generation: PyTorch decodes prompts of one length together over one static cache.

The prefix that all prompts share runs once. A row that ends leaves the batch and frees its cache positions. Sampling
means the same as in merino_edge.runtime.sampling: frequency penalty, temperature, top-k with its ties, top-p. Each row
draws random numbers of its own, so its tokens depend on its own logits alone. The last bits of those logits depend on
the batch size, because a matrix product of another size rounds otherwise. This module knows no text and no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merino_edge import limits
from merino_edge.errors import ArtefactError, InputError
from merino_edge.pytorch.model import KVCache, Model


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a token, as in merino_edge.runtime.sampling. Raises InputError for a value out of range."""

    temperature: float = 0.8  # 0: greedy
    top_k: int = 50  # keep the k likeliest and their ties; 0: all
    top_p: float = 0.95  # keep the fewest that together hold this probability; 1: all
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time that the completion has it

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("frequency_penalty", -2, 2)):
            if not low <= getattr(self, name) <= high:
                what = f"{name} is {getattr(self, name)}, outside {low} to {high}"
                raise InputError(what, f"give {low} to {high}")
        limits.check_range("top_k", self.top_k, 0, limits.MAX_VOCAB_SIZE)


@dataclass(frozen=True)
class Completion:
    """The generated token ids, without the end token.

    `ended` says whether an end token came. Otherwise `max_tokens` or the context cut the completion off.
    """

    ids: tuple[int, ...]
    ended: bool


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The candidates' ids [B, N] and probabilities [B, N] float64, from logits [B, V]. Probabilities sum to 1.

    A row with fewer than N candidates is filled with others of probability 0. With top-p the least likely come first.
    """
    ids, scores = _top_k(logits, params.top_k)
    probabilities = (scores.double() / params.temperature).softmax(-1)
    if params.top_p < 1:
        # Drop the least likely while they hold no more than 1 - top_p; the likeliest always stays.
        probabilities, order = probabilities.sort(dim=-1, stable=True)
        ids = ids.gather(1, order)
        dropped = probabilities.cumsum(-1) <= 1 - params.top_p
        dropped[:, -1] = False
        probabilities = probabilities.masked_fill(dropped, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return ids, probabilities


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """The next token [B] of each row of logits [B, V], from its draw `uniform` [B] float64 in 0 to 1."""
    if params.temperature == 0:
        return logits.argmax(-1)
    ids, probabilities = distribution(logits, params)
    cumulative = probabilities.cumsum(-1)
    # The first whose cumulative probability exceeds the draw: never one of probability zero.
    index = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(-1, keepdim=True)
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1)).squeeze(1)


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids [B, N], ascending, of each row's k largest logits and their ties, and those logits.

    N is the largest count over the rows. A row that has fewer gets -inf for the rest.
    """
    if not 0 < k < logits.shape[1]:
        return torch.arange(logits.shape[1], device=logits.device).expand_as(logits), logits
    threshold = logits.topk(k, sorted=True).values[:, -1:]  # [B, 1]
    candidates = int((logits >= threshold).sum(-1).max())  # more than k where there are ties, as bf16 has many
    ids = logits.topk(candidates, sorted=False).indices.sort(dim=-1).values
    scores = logits.gather(1, ids)
    return ids, scores.masked_fill(scores < threshold, -torch.inf)


class BatchedGenerator:
    """Generates completions for batches of prompts. It takes the model over: moved to `device`, cast to `dtype`."""

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model.eval().to(device, dtype)
        self.dtype, self.device = dtype, device
        self.computed_tokens = 0  # decoded after the prompts, over all batches

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_tokens: int,
        end_token_ids: Sequence[int],
        generators: Sequence[np.random.Generator],
    ) -> list[Completion]:
        """One completion for each of `prompts`, token ids of one length. Row i draws from `generators[i]`.

        Raises InputError for a prompt that leaves no room, ArtefactError for logits that are not finite.
        """
        length, a = len(prompts[0]), self.model.architecture
        if any(len(prompt) != length for prompt in prompts):
            raise InputError("the prompts of a batch differ in length", "group them by length")
        if not 0 < length <= a.max_positions:
            what = f"a prompt has {length} tokens, the model has {a.max_positions} positions"
            raise InputError(what, "shorten the prompts")
        # The last token needs no cache position: nothing is computed after it.
        steps = min(max_tokens, a.max_positions - length + 1)
        cache = KVCache(a, len(prompts), length + steps - 1, self.dtype, self.device)
        draws = np.stack([generator.random(steps) for generator in generators])  # [B, S]
        uniform = torch.from_numpy(draws).to(self.device)
        prompt_of = torch.arange(len(prompts), device=self.device)  # the prompt of each row that is still decoded
        counts = None  # [B, V], how often each completion has each token
        if params.frequency_penalty:
            counts = torch.zeros((len(prompts), a.vocab_size), device=self.device)
        output = torch.empty((len(prompts), steps), dtype=torch.int64, device=self.device)
        lengths, ended = [steps] * len(prompts), [False] * len(prompts)
        end_tokens = torch.tensor(end_token_ids, dtype=torch.int64, device=self.device)
        start = self._prefill_shared_prefix(prompts, cache)
        tokens = torch.tensor([prompt[start:] for prompt in prompts], dtype=torch.int64, device=self.device)  # [B, T]
        for step in range(steps):
            logits = self.model(tokens, cache, start, last_only=True)[:, 0].float()  # [B, V]
            if not bool(logits.amax(-1).isfinite().all()):  # NaN and +infinity come out first
                raise ArtefactError("the model returned logits that are not finite", "use --precision fp32")
            start += tokens.shape[1]
            if counts is not None:
                logits = logits - params.frequency_penalty * counts
            sampled = sample(logits, params, uniform[prompt_of, step])
            output[prompt_of, step] = sampled
            unfinished = ~torch.isin(sampled, end_tokens)
            if not bool(unfinished.all()):
                for row in prompt_of[~unfinished].tolist():
                    lengths[row], ended[row] = step, True
                rows = unfinished.nonzero().squeeze(1)
                if not len(rows):
                    break
                prompt_of, sampled = prompt_of[rows], sampled[rows]
                counts = None if counts is None else counts[rows]
                _keep_rows(cache, rows, start)
            tokens = sampled[:, None]
            if counts is not None:
                counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
            self.computed_tokens += len(sampled)
        ids = output.tolist()
        return [Completion(tuple(ids[i][: lengths[i]]), ended[i]) for i in range(len(prompts))]

    def _prefill_shared_prefix(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> int:
        """Run the prompts' common prefix once and copy it to every row. Returns its length.

        The last token of a prompt never counts, because its logits are needed row by row.
        """
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=True)
        length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        if length:
            one_row = KVCache(self.model.architecture, 1, length, self.dtype, self.device)
            self.model(torch.tensor([prompts[0][:length]], device=self.device), one_row, last_only=True)
            for all_layers, prefix_layers in ((cache.keys, one_row.keys), (cache.values, one_row.values)):
                for rows, prefix in zip(all_layers, prefix_layers, strict=True):
                    rows[:, :, :length] = prefix
        return length


def _keep_rows(cache: KVCache, rows: Tensor, length: int) -> None:
    """Move the first `length` positions of these rows to the cache's beginning, in place, and drop the other rows."""
    for tensors in (cache.keys, cache.values):
        for layer, tensor in enumerate(tensors):  # [B, Hkv, C, D]
            kept = tensor[: len(rows)]
            kept[:, :, :length] = tensor[:, :, :length].index_select(0, rows)
            tensors[layer] = kept
