"""What `merino-edge profile` measures: its options as a request, checked before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture
    from merino_edge.jetson.profiler.profiler import Request
    from merino_edge.latency.measurement import Mode
    from merino_edge.latency.table import LatencyTable


def make_request(
    begun: dict[str, Any],
    out: Path,
    *,
    backend: str | None,
    space: str | None,
    precision: str | None,
    threads: int | None,
    lengths: str | None,
    minutes: float | None,
    only: str | None,
    also: str | None,
    like: Path | None,
    share: float | None,
) -> Request:
    """What to measure: from the options, else from `begun` (the header of the unfinished table), else the defaults."""
    import re

    from merino_edge import limits
    from merino_edge.counts import check_precision
    from merino_edge.errors import InputError
    from merino_edge.jetson.profiler.backends import backend_named
    from merino_edge.jetson.profiler.profiler import Request
    from merino_edge.jetson.profiler.time_budget import DEFAULT_MINUTES
    from merino_edge.latency.transfer import DEFAULT_SHARE
    from merino_edge.search import space_file
    from merino_edge.search.builtin_spaces import SPACES, load_space

    full = None if like is None else _full_table(like, share, described=(space, lengths, only))
    if full is None and share is not None:
        raise InputError("--share says how much of a full table is measured", "add: --like FULL.jsonl")
    if full is not None:
        begun = {
            **{name: full.header[name] for name in ("space", "precision", "threads") if name in full.header},
            **begun,
        }
    if space is None and begun:
        search_space = space_file.from_dict(begun.get("space"), str(out), SPACES)
    else:
        search_space = load_space("paper" if space is None else space)
    precision = begun.get("precision", "fp32") if precision is None else precision
    check_precision(precision)
    threads = begun.get("threads", 1) if threads is None else threads
    limits.check_range("threads", threads, 1, len(os.sched_getaffinity(0)))
    usual_minutes = DEFAULT_MINUTES if full is None else LIKE_MINUTES
    minutes = begun.get("minutes", usual_minutes) if minutes is None else minutes
    if not 0 < minutes <= limits.MAX_MINUTES:
        raise InputError(f"--minutes is {minutes}", f"give a positive number up to {limits.MAX_MINUTES}")
    if only is not None:
        try:
            re.compile(only)
        except re.error as error:
            raise InputError(
                f"--only {only!r} is no regular expression ({error})", "write it as 'layer decode'"
            ) from None
    name = begun.get("backend", "cpu") if backend is None else backend

    def find(
        table: LatencyTable, mode: Mode, count: int, seconds: float, without: Collection[Architecture]
    ) -> Sequence[Architecture]:
        from merino_edge.search.found_models import found_models

        return found_models(search_space, table, mode, count=count, seconds=seconds, without=without)

    return Request(
        space=search_space,
        space_document=space_file.to_dict(search_space),
        precision=precision,
        threads=threads,
        backend=backend_named(ALIASES.get(name, name)),
        minutes=minutes,
        lengths=parse_lengths(lengths),
        only=only,
        also=begun.get("also", []) if also is None else parse_public(also),
        find=find,
        like=full,
        share=DEFAULT_SHARE if share is None else share,
    )


def _full_table(path: Path, share: float | None, described: tuple[str | None, ...]) -> LatencyTable:
    """The table that --like names. Raises InputError where it cannot be followed, ArtefactError where it is damaged."""
    from merino_edge.errors import InputError
    from merino_edge.latency.table_file import load_table

    if any(value is not None for value in described):
        raise InputError(
            "--like takes space and lengths from the full table", "leave out --space, --lengths and --only"
        )
    if share is not None and not 0 < share < 1:
        raise InputError(f"--share is {share}", "give a number between 0 and 1")
    table = load_table(path)
    if table.transferred:
        raise InputError(
            f"{path} is itself transferred from {table.header['transferred']['from']}", "give a full table"
        )
    if table.verdict is not None and table.verdict.is_unfit:
        raise InputError(f"the verdict on {path} is {table.verdict}", "measure it again: merino-edge profile")
    if "space" not in table.header:
        raise InputError(f"{path} does not say which space it covers", "measure it again: merino-edge profile")
    return table


LIKE_MINUTES = 5.0  # the usual time of a profile that follows a full table
ALIASES = {"cpu": "onnxruntime-cpu", "cuda": "onnxruntime-cuda", "torch": "torch-cpu"}


def parse_public(text: str) -> list[str]:
    """opt-125m,gpt2 -> their names. Raises InputError for a name of no preset."""
    from merino_edge.presets import preset

    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        preset(name)
    return names


def parse_lengths(text: str | None) -> list[int] | None:
    """64,256 -> [64, 256]. Raises InputError."""
    from merino_edge import limits
    from merino_edge.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"--lengths {text!r} is no list of lengths", "write it as 64,256,1024")
    return [limits.check_range("--lengths", int(part), 1, limits.MAX_POSITIONS) for part in parts]
