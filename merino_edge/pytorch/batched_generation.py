"""Many answers at once: prompts of one length, decoded together by PyTorch over one static cache.

What all of them begin with is run once. A row that ends leaves the batch, and what remains of the cache moves together,
so nothing is computed for it. How a token is chosen means what it means in merino_edge.runtime.sampling:
frequency penalty, temperature, top-k with its ties, top-p. Each row draws from numbers of its own, so its choices
depend on its logits alone, not on its fellows. (Its logits do in their last bits: products of other sizes round
otherwise.) Knows no text and no files.
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
from merino_edge.pytorch.model import Cache, Model


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token; as in merino_edge.runtime.sampling. Raises InputError naming what is out of range."""

    temperature: float = 0.8  # 0: the likeliest
    top_k: int = 50  # keep the k likeliest and their ties; 0: all
    top_p: float = 0.95  # keep the fewest that together hold this probability; 1: all
    frequency_penalty: float = 0.0  # taken off a token's logit for each time that the answer has it

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("frequency_penalty", -2, 2)):
            if not low <= getattr(self, name) <= high:
                what = f"{name} is {getattr(self, name)}, outside {low} to {high}"
                raise InputError(what, f"give {low} to {high}")
        limits.check_range("top_k", self.top_k, 0, limits.MAX_VOCAB_SIZE)


@dataclass(frozen=True)
class Completion:
    """Token ids without the end token, and whether there was one: else `max_tokens` or the context cut it off."""

    ids: tuple[int, ...]
    ended: bool


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Of logits [B, V] the candidates' ids [B, N] and probabilities [B, N] float64, summing to 1.

    A row with fewer than N candidates has others, of probability 0. With top-p the least likely come first.
    """
    ids, scores = _top(logits, params.top_k)
    likely = (scores.double() / params.temperature).softmax(-1)
    if params.top_p < 1:
        # Drop the unlikeliest while they hold no more than 1 - top_p; the likeliest always stays.
        likely, order = likely.sort(dim=-1, stable=True)
        ids = ids.gather(1, order)
        dropped = likely.cumsum(-1) <= 1 - params.top_p
        dropped[:, -1] = False
        likely = likely.masked_fill(dropped, 0)
        likely = likely / likely.sum(-1, keepdim=True)
    return ids, likely


def sample(logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
    """The next token [B] of each row of logits [B, V], by its draw [B] float64, uniform in 0 to 1."""
    if params.temperature == 0:
        return logits.argmax(-1)
    ids, likely = distribution(logits, params)
    cumulative = likely.cumsum(-1)
    # The first whose cumulative probability exceeds the draw: never one of probability zero.
    index = (cumulative <= (draws * cumulative[:, -1])[:, None]).sum(-1, keepdim=True)
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1)).squeeze(1)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids [B, N], ascending, of each row's k largest and their ties, and their logits; -inf where a row has fewer."""
    if not 0 < k < logits.shape[1]:
        return torch.arange(logits.shape[1], device=logits.device).expand_as(logits), logits
    least = logits.topk(k, sorted=True).values[:, -1:]  # [B, 1]
    most = int((logits >= least).sum(-1).max())  # more than k where there are ties, as bf16 has many
    ids = logits.topk(most, sorted=False).indices.sort(dim=-1).values
    found = logits.gather(1, ids)
    return ids, found.masked_fill(found < least, -torch.inf)


class BatchedGenerator:
    """A model that answers batches, which it takes over: moved to `device`, cast to `dtype`."""

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model.eval().to(device, dtype)
        self.dtype, self.device = dtype, device
        self.computed_tokens = 0  # tokens that were run after prompts, over all batches

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        max_tokens: int,
        ends: Sequence[int],
        generators: Sequence[np.random.Generator],
    ) -> list[Completion]:
        """One answer to each of `prompts`, ids of one length; row i draws its numbers from `generators[i]`.

        Raises InputError for a prompt that leaves no room, ArtefactError for logits that are not finite.
        """
        length, a = len(prompts[0]), self.model.architecture
        if any(len(prompt) != length for prompt in prompts):
            raise InputError("the prompts of a batch differ in length", "group them by length")
        if not 0 < length <= a.max_positions:
            what = f"a prompt has {length} tokens, the model has {a.max_positions} positions"
            raise InputError(what, "shorten the prompts")
        # A last token needs no place in the cache: nothing is computed after it.
        steps = min(max_tokens, a.max_positions - length + 1)
        cache = Cache(a, len(prompts), length + steps - 1, self.dtype, self.device)
        draws = np.stack([generator.random(steps) for generator in generators])  # [B, S]
        uniform = torch.from_numpy(draws).to(self.device)
        of = torch.arange(len(prompts), device=self.device)  # which prompt each row that is left belongs to
        times = None  # [B, V], how often each answer has each token
        if params.frequency_penalty:
            times = torch.zeros((len(prompts), a.vocab_size), device=self.device)
        written = torch.empty((len(prompts), steps), dtype=torch.int64, device=self.device)
        lengths, ended = [steps] * len(prompts), [False] * len(prompts)
        last = torch.tensor(ends, dtype=torch.int64, device=self.device)
        start = self._prefill_common(prompts, cache)
        tokens = torch.tensor([prompt[start:] for prompt in prompts], dtype=torch.int64, device=self.device)  # [B, T]
        for step in range(steps):
            logits = self.model(tokens, cache, start, last_only=True)[:, 0].float()  # [B, V]
            if not bool(logits.amax(-1).isfinite().all()):  # NaN and +infinity come out first
                raise ArtefactError("the model returned logits that are not finite", "use --precision fp32")
            start += tokens.shape[1]
            if times is not None:
                logits = logits - params.frequency_penalty * times
            chosen = sample(logits, params, uniform[of, step])
            written[of, step] = chosen
            going = ~torch.isin(chosen, last)
            if not bool(going.all()):
                for row in of[~going].tolist():
                    lengths[row], ended[row] = step, True
                rows = going.nonzero().squeeze(1)
                if not len(rows):
                    break
                of, chosen, times = of[rows], chosen[rows], None if times is None else times[rows]
                _keep(cache, rows, start)
            tokens = chosen[:, None]
            if times is not None:
                times.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=times.dtype))
            self.computed_tokens += len(chosen)
        found = written.tolist()
        return [Completion(tuple(found[i][: lengths[i]]), ended[i]) for i in range(len(prompts))]

    def _prefill_common(self, prompts: Sequence[Sequence[int]], cache: Cache) -> int:
        """Run once what all prompts begin with (their last tokens apart), for every row; how many tokens that is."""
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=True)
        length = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        if length:
            one = Cache(self.model.architecture, 1, length, self.dtype, self.device)
            self.model(torch.tensor([prompts[0][:length]], device=self.device), one, last_only=True)
            for every, single in ((cache.keys, one.keys), (cache.values, one.values)):
                for whole, part in zip(every, single, strict=True):
                    whole[:, :, :length] = part
        return length


def _keep(cache: Cache, rows: Tensor, length: int) -> None:
    """Move these rows' first `length` positions to the cache's beginning, and forget the others; no new memory."""
    for tensors in (cache.keys, cache.values):
        for layer, tensor in enumerate(tensors):  # [B, Hkv, C, D]
            kept = tensor[: len(rows)]
            kept[:, :, :length] = tensor[:, :, :length].index_select(0, rows)
            tensors[layer] = kept
