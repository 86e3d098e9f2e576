"""Generates one answer: prefill, then sample, detokenise and step until a stop condition holds. Knows no backend.

A `Session` remembers which ids are in the engine's cache. A longer version of a prompt, such as the next turn of a
chat, therefore runs only its new tokens. A `Generation` is an iterator over pieces of text. It holds the result once
it has ended:

    generation = generate(Session(engine), tokenizer, tokenizer.encode("Once"), Sampling(), max_tokens=64)
    for piece in generation: ...
    generation.text, generation.tokens, generation.finish_reason, generation.statistics
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from time import perf_counter
from typing import Any, Literal

from merino_edge import limits
from merino_edge.errors import ContextLengthError, EngineInUseError, InputError
from merino_edge.runtime.detokenizer import StreamingDetokenizer
from merino_edge.runtime.ends import Ends
from merino_edge.runtime.engine import Logits, TokenIds
from merino_edge.runtime.grammar import Constraint, Grammar
from merino_edge.runtime.logprobs import LogprobRecorder
from merino_edge.runtime.prompt_ids import as_ids
from merino_edge.runtime.sampling import Sampler
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative.drafter import Drafter, Proposer
from merino_edge.runtime.turns import PromptPiece, Step
from merino_edge.tokenizer import Tokenizer

# stop: an end token or a stop string; length: max_tokens; context: the cache is full.
FinishReason = Literal["stop", "length", "context", "cancelled"]
# JSON keys that `generate --json` and the server print. Other programs read them, so they keep their first names.
WRITTEN_NAMES = {"drafted_tokens": "guessed_tokens", "accepted_tokens": "right_guesses"}
OWN_ENDS = Ends()  # the model's own end tokens, from the first token on


@dataclass
class Statistics:
    """Counts and times of one answer. Times are those of the engine and the sampler, without the reader's."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens found in the cache
    generated_tokens: int = 0  # sampled tokens, including the end token
    drafted_tokens: int = 0  # draft tokens that were run
    accepted_tokens: int = 0  # draft tokens that were then sampled
    prompt_ms: float = 0.0
    first_token_ms: float | None = None  # from the start to the first sampled token
    decode_ms: float = 0.0  # all tokens after the first

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Speed of the prefill, without reused tokens; None if nothing was run."""
        return _rate(self.prompt_tokens - self.reused_tokens, self.prompt_ms)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed after the first token; None if there is only one."""
        return _rate(self.generated_tokens - 1, self.decode_ms)

    def to_dict(self) -> dict[str, Any]:
        """All fields and both rates, as JSON prints them."""
        rates = {name: getattr(self, name) for name in ("prompt_tokens_per_second", "decode_tokens_per_second")}
        fields = {WRITTEN_NAMES.get(name, name): value for name, value in asdict(self).items()}
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in {**fields, **rates}.items()}


def _rate(tokens: int, elapsed_ms: float) -> float | None:
    return tokens / elapsed_ms * 1e3 if tokens > 0 and elapsed_ms > 0 else None


class Generation(Iterator[str]):
    """An answer that is being generated; see `generate`. `close()` or setting `cancel` ends it within one token."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        *,
        stop: Sequence[str],
        cancel: threading.Event,
        constraint: Constraint | None,
        drafter: Drafter | None,
        continues: bool,
        ends: Ends,
        recorder: LogprobRecorder | None,
        show_special: bool,
    ) -> None:
        self.tokens: list[int] = []  # sampled ids, with those of a stop string, without the end token
        self.finish_reason: FinishReason | None = None  # None while running, and after an error
        self.statistics = Statistics(prompt_tokens=len(prompt_ids))
        self.seed = sampler.seed
        self._session, self.prompt_ids, self._sampler = session, prompt_ids, sampler
        self._prompt_number: int | None = None  # which of the session's prompts this is, once it has run
        self._eos, self._max_tokens, self._cancel = ends.ids(tokenizer.chat.eos_token_ids), max_tokens, cancel
        before = prompt_ids if continues else ()
        self._detokenizer = StreamingDetokenizer(tokenizer, stop, before, show_special=show_special)
        self._ends, self._own_eos, self._recorder = ends, tokenizer.chat.eos_token_ids, recorder
        self._constraint, self._drafter = constraint, drafter
        # How many of the largest logits a step needs; None if it needs the whole row.
        whole_row = session.topk_engine is None or constraint is not None or drafter is not None
        whole_row = whole_row or recorder is not None or ends.forbids_some
        self._required_topk = None if whole_row else sampler.sampling.required_topk
        self._pieces = self._released()

    @property
    def text(self) -> str:
        """All pieces so far, joined."""
        return self._detokenizer.text

    @property
    def meets_form(self) -> bool:
        """Whether the answer so far is a whole one of its grammar; True where there is none."""
        return self._constraint is None or self._constraint.is_met

    def __next__(self) -> str:
        self._require_newest()
        while not isinstance(item := next(self._pieces), str):
            item.run()
        return item

    def advance(self) -> str | Step | PromptPiece | None:
        """The next piece of text, or what must run before it: run that, then call again. None: the answer has ended.

        For whoever drives several answers. `use` may give this one a session before the first call.
        """
        self._require_newest()
        return next(self._pieces, None)

    def use(self, session: Session) -> None:
        """Take another session of the same model. Only an answer that has not begun may do so."""
        self._session = session

    def _require_newest(self) -> None:
        """Raise EngineInUseError where the session has run another prompt since: the cache is not this answer's."""
        if self._prompt_number is not None and self._prompt_number != self._session.prompts:
            raise EngineInUseError("a newer answer has begun in this session", "read one to its end before the next")

    def close(self) -> None:
        """End the answer. `text` and `tokens` keep what has been generated."""
        self.finish_reason = self.finish_reason or "cancelled"
        self._pieces.close()

    def _released(self) -> Generator[str | Step | PromptPiece, None, None]:
        """What `_run` gives. After that the answer keeps no session alive, which would keep its engine from others."""
        try:
            yield from self._run()
        finally:
            self._prompt_number = None
            del self._session

    def _run(self) -> Generator[str | Step | PromptPiece, None, None]:
        if self._recorder is not None:
            yield from self._recorder.score(self._session, self.prompt_ids, self._cancel)
        if self._max_tokens == 0:  # only the prompt's probabilities are asked for
            self.finish_reason = "cancelled" if self._cancel.is_set() else "length"
            return
        first_logits, draft = (yield from self._prefill()), list[int]()
        rows = None if first_logits is None else first_logits[None]  # [1 + len(draft), V]
        ids: TokenIds | None = None  # [N] where rows are the candidates [1, N]
        while rows is not None:
            # Row i is the logits after i draft tokens. It is valid only if all of those were accepted.
            for row, drafted in zip_longest(rows, draft):
                token = self._sample(row, ids)
                if piece := self._take(token):
                    yield piece
                if self.finish_reason or token != drafted or self._cancel.is_set():
                    break
                self._session.accept(token)
                self.statistics.accepted_tokens += 1
            if self.finish_reason:
                break
            rows, ids, draft = yield from self._step(token)
        self.finish_reason = self.finish_reason or "cancelled"
        if rest := self._detokenizer.finish():
            yield rest

    def _take(self, token: int) -> str:
        """Add a sampled token, return the text that is now certain, and set `finish_reason` if the answer ends."""
        if token in self._eos:
            self.finish_reason = "stop"
            return ""
        self.tokens.append(token)
        if self._drafter is not None:
            self._drafter.push(token)
        piece = self._detokenizer.push(token)
        complete = self._constraint is not None and self._constraint.push(token)
        if complete or self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        elif len(self._session.ids) == self._session.engine.max_positions:
            self.finish_reason = "context"
        return piece

    def _prefill(self) -> Generator[PromptPiece, None, Logits | None]:
        began, reused = perf_counter(), self._session.first_to_run(self.prompt_ids)
        logits = yield from self._session.prefill_pieces(self.prompt_ids, self._cancel)
        self._prompt_number = self._session.prompts
        if logits is not None and self._drafter is not None:
            self._drafter.begin(self.prompt_ids, self._cancel)
        self.statistics.reused_tokens = reused
        self.statistics.prompt_ms = _since_ms(began)
        return logits

    def _sample(self, logits: Logits, ids: TokenIds | None) -> int:
        began, unmasked = perf_counter(), logits
        if self._constraint is not None:
            logits = self._constraint.masked(logits)
        if self._ends.forbids_some:
            logits = self._ends.masked(logits, self._own_eos, len(self.tokens))
        # At this point the session holds the prompt and all tokens so far.
        token = self._sampler(logits, self._session.ids, self.tokens)
        if ids is not None:
            token = int(ids[token])
        if self._recorder is not None:
            self._recorder.record(unmasked, token)
        statistics, elapsed_ms = self.statistics, _since_ms(began)
        if statistics.first_token_ms is None:
            statistics.first_token_ms = statistics.prompt_ms + elapsed_ms
        else:
            statistics.decode_ms += elapsed_ms
        statistics.generated_tokens += 1
        return token

    def _step(self, token: int) -> Generator[Step, None, tuple[Logits | None, TokenIds | None, list[int]]]:
        """Run `token` and draft tokens after it. Returns (logits [1 + N, V], None, draft tokens).

        With a top-k engine it returns (logits [1, N], their ids [N], no draft); the logits are None if cancelled.
        """
        if self._cancel.is_set():
            return None, None, []
        self._require_newest()
        draft: list[int] = []
        began = perf_counter()
        if self._drafter is not None:
            engine = self._session.engine
            room = min(
                engine.max_positions - len(self._session.ids), engine.max_rows, self._max_tokens - len(self.tokens)
            )
            draft = self._drafter.draft(room - 1)
        began_step = perf_counter()
        topk = None if self._sampler.repeats(self.tokens) else self._required_topk
        step = Step(self._session, token, draft, topk)
        yield step
        if self._drafter is not None:
            self._drafter.record_step(1 + len(draft), perf_counter() - began_step)
        self.statistics.drafted_tokens += len(draft)
        self.statistics.decode_ms += _since_ms(began)
        return step.rows, step.ids, draft


def _since_ms(began: float) -> float:
    return (perf_counter() - began) * 1e3


def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int = 256,
    *,
    stop: Sequence[str] | str = (),
    cancel: threading.Event | None = None,
    grammar: Grammar | None = None,
    proposer: Proposer | None = None,
    continues: bool = True,
    ends: Ends = OWN_ENDS,
    recorder: LogprobRecorder | None = None,
    show_special: bool = False,
) -> Generation:
    """Start an answer to `prompt_ids`. Nothing runs before the first `next`.

    `grammar` restricts the answer to a form. `proposer` turns on speculative decoding: its draft tokens are run where
    that saves time (merino_edge.runtime.speculative.drafter). Every token is still sampled from the model's logits.
    The answer is the same with and without drafts where steps of one and of several tokens round alike. At fp32 they
    agree to a millionth of a probability. At int4 ONNX Runtime's kernels do not.

    Where the answer `continues` the prompt, its text begins with the space that follows the prompt. The answer of a
    chat does not: some tokenizers (SentencePiece) begin every text with a space, which is left out.

    `ends` says which tokens end the answer. `recorder` gets the probabilities of its tokens, and of the prompt's where
    it wants them: with `max_tokens` 0 those only. With `show_special` the text has special tokens, such as those that
    begin a tool call.

    Raises InputError where the prompt is empty, is longer than the context or has ids outside the vocabulary. It also
    raises InputError where `max_tokens` or `stop` is out of its limits. The answer raises EngineInUseError where
    another session has the engine, or where this session has run another prompt since.
    """
    engine, prompt_ids, stop = session.engine, as_ids(prompt_ids), [stop] if isinstance(stop, str) else stop
    if not prompt_ids:
        raise InputError("the prompt is empty", "give at least one character")
    if len(prompt_ids) > engine.max_positions:
        raise ContextLengthError(
            f"the prompt has {len(prompt_ids)} tokens, the context of this bundle is {engine.max_positions}",
            "shorten it, or export again with a larger --context",
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < engine.vocab_size:
        raise InputError(f"the prompt has token ids outside 0 to {engine.vocab_size - 1}", "use the bundle's tokenizer")
    scores = recorder is not None and recorder.of_prompt
    limits.check_range("max_tokens", max_tokens, 0 if scores else 1, limits.MAX_NEW_TOKENS)
    ends.check(engine.vocab_size)
    return Generation(
        session,
        tokenizer,
        prompt_ids,
        Sampler(sampling, end_ids=tokenizer.chat.eos_token_ids, guards=grammar is None),
        max_tokens,
        stop=stop,
        cancel=cancel or threading.Event(),
        constraint=None if grammar is None else grammar.begin(),
        drafter=Drafter(proposer) if proposer is not None and engine.max_rows > 1 else None,
        continues=continues,
        ends=ends,
        recorder=recorder,
        show_special=show_special,
    )
