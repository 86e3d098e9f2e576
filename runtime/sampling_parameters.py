"""Sampling parameters and their defaults, which the command line, the server and the Python API share.

Knows no logits: `merino_edge.runtime.sampling` samples with them. Imports no NumPy, so that `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merino_edge import limits
from merino_edge.errors import InputError

LOOP_PENALTY = 1.0


def _check_real(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}, outside {low:g} to {high:g}", f"give {low:g} to {high:g}")


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The constructor raises InputError that names a value out of its range."""

    temperature: float = 0.5  # 0: greedy. Small models lose the thread at the usual 0.8 (docs/lab-notes.md)
    top_k: int = 40  # keep the k most likely tokens and their ties; 0: all
    top_p: float = 0.95  # keep the fewest tokens whose probabilities sum to this; 1: all
    min_p: float = 0.0  # keep tokens at least this probable relative to the most likely one; 0: all
    typical_p: float = 1.0  # keep tokens closest to the expected surprise whose probabilities sum to this; 1: all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen
    frequency_penalty: float = 0.0  # subtracted from a token's logit once for each occurrence in the answer
    presence_penalty: float = 0.0  # subtracted once if the answer contains the token
    # Subtracted from a token that goes on with a repeated sequence (merino_edge.runtime.loop_guard).
    # None: LOOP_PENALTY, but 0 for greedy answers and where another penalty is given.
    loop_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits, by token id; -100 forbids
    seed: int | None = None  # None: a random one, see Sampler.seed
    greedy: bool = False  # the most likely token after bias and penalties; other filters are ignored

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        limits.check_range("top_k", self.top_k, 0, limits.MAX_VOCAB_SIZE)
        _check_real("top_p", self.top_p, 0.0, 1.0)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("typical_p", self.typical_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.loop_penalty is not None:
            _check_real("loop_penalty", self.loop_penalty, 0.0, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"logit_bias is {self.logit_bias!r}, no mapping", "write it as {TOKEN_ID: BIAS}")
        for token, bias in self.logit_bias.items():
            limits.check_range("logit_bias's token", token, 0, limits.MAX_VOCAB_SIZE - 1)
            _check_real(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.seed is not None:
            limits.check_range("seed", self.seed, 0, limits.MAX_SEED)
        if not isinstance(self.greedy, bool):
            raise InputError(f"greedy is {self.greedy!r}", "give True or False")

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature == 0

    @property
    def loop_strength(self) -> float:
        """What `loop_penalty` means here."""
        if self.loop_penalty is not None:
            return self.loop_penalty
        has_penalty = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return 0.0 if self.is_greedy or has_penalty else LOOP_PENALTY

    @property
    def required_topk(self) -> int | None:
        """How many of the largest logits (with ties) sampling needs; None: the whole row, as with penalties.

        Top-k is the first filter, so the other filters give the same result with those logits as with the whole row.
        A step at which something repeats needs the whole row (Sampler.repeats).
        """
        if self.logit_bias or self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1:
            return None
        return 1 if self.is_greedy else self.top_k or None
