"""The verdict on a latency table: good, usable, or do not use, by limits that are stated here.

It is given from the validation alone: how far predictions are from whole models that were measured on the same device,
and which other load there was. So a table that was measured before there were verdicts gets one when it is read.

| verdict | errors of the predictions, in each mode | other load |
|---|---|---|
| good | mean at most GOOD_MAPE_PERCENT, none above GOOD_MAX_PERCENT | at most MAX_OF_MEASURED, MAX_OF_ALL |
| usable | mean at most USABLE_MAPE_PERCENT, and a bound around every prediction | any |
| do not use | anything else, or nothing to compare with in any mode | any |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from merino_edge.latency.measurement import MODES

Word = Literal["good", "usable", "do not use"]
WORDS: tuple[Word, ...] = get_args(Word)

# Quiet machines gave means of 2.2 to 7.0 % in two minutes, and of 1.1 to 5.5 % in longer profiles (docs/benchmarks.md).
GOOD_MAPE_PERCENT, GOOD_MAX_PERCENT = 8.0, 30.0
USABLE_MAPE_PERCENT = 15.0
# Shares of the cores that other programs took meanwhile: of those that were measured on, and of all.
MAX_OF_MEASURED, MAX_OF_ALL = 0.1, 0.25


@dataclass(frozen=True)
class Verdict:
    """What a table is good for, and why it is not better."""

    word: Word
    reasons: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether nothing needs to be said."""
        return self.word == "good"

    @property
    def is_unfit(self) -> bool:
        """Whether the table is not to be used."""
        return self.word == "do not use"

    def __str__(self) -> str:
        return self.word + (f": {'; '.join(self.reasons)}" if self.reasons else "")

    def to_dict(self) -> dict[str, Any]:
        """{"word": "usable", "reasons": [...]}."""
        return {"word": self.word, "reasons": list(self.reasons)}

    @staticmethod
    def from_dict(value: Any) -> Verdict:
        """Raises KeyError, TypeError or ValueError where `value` is not of `to_dict`'s form."""
        word, reasons = value["word"], tuple(value["reasons"])
        if word not in WORDS or not all(isinstance(reason, str) for reason in reasons):
            raise ValueError
        return Verdict(word, reasons)


def judge(validation: Mapping[str, Any], conditions: Iterable[Mapping[str, Any]] = ()) -> Verdict:
    """The verdict on a table with this validation by mode, and these lines on its conditions."""
    judged = [_judge_mode(mode, validation.get(mode) or {}) for mode in MODES]
    found = {f"{mode} of found models": (validation.get(mode) or {}).get("found") for mode in MODES}
    judged += [_judge_mode(name, figures) for name, figures in found.items() if figures]
    if not any(validation.get(mode) for mode in MODES):
        judged = [Verdict("do not use", ("no whole model could be compared",))]
    if (load := largest_load(conditions)) is not None:
        judged.append(_judge_load(load))
    word = max((verdict.word for verdict in judged), key=WORDS.index)
    return Verdict(word, tuple(reason for verdict in judged for reason in verdict.reasons))


def largest_load(conditions: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The largest load by other programs (OtherLoad) among these lines of a table; None where none tells."""
    loads = [line["other_load"] for line in conditions if line.get("other_load")]
    return max(loads, key=lambda load: (load["of_measured"], load["of_all"]), default=None)


def _judge_mode(mode: str, figures: Mapping[str, Any]) -> Verdict:
    mean, largest = figures.get("mape_percent"), figures.get("max_percent")
    if mean is None:
        return Verdict("usable", (f"{mode} was compared with no whole model",))
    if mean > USABLE_MAPE_PERCENT:
        return Verdict("do not use", (f"{mode} is {mean:.1f} % off on average, beyond {USABLE_MAPE_PERCENT:g} %",))
    if "low_percent" in figures and figures["low_percent"] is None:
        return Verdict("do not use", (f"{mode} was predicted as no time at all for a model",))
    if mean > GOOD_MAPE_PERCENT:
        return Verdict("usable", (f"{mode} is {mean:.1f} % off on average, beyond {GOOD_MAPE_PERCENT:g} %",))
    if largest is not None and largest > GOOD_MAX_PERCENT:
        return Verdict("usable", (f"{mode} is up to {largest:.0f} % off, beyond {GOOD_MAX_PERCENT:g} %",))
    return Verdict("good")


def _judge_load(load: Mapping[str, Any]) -> Verdict:
    named = ", ".join(f"{name} ({cores:.2f} cores)" for name, cores in load.get("busiest", ()))
    programs = f": {named}" if named else ""
    for where, share, most in (
        ("the cores that were measured on", load["of_measured"], MAX_OF_MEASURED),
        ("all cores", load["of_all"], MAX_OF_ALL),
    ):
        if share > most:
            reason = f"others used {100 * share:.0f} % of {where}, beyond {100 * most:g} %{programs}"
            return Verdict("usable", (reason,))
    return Verdict("good")
