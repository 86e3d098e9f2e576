"""The proof of an exact search as JSON: what a certificate holds beside the bound (docs/certificate.md).

Each group of programs has classes of subproblems that differ only in depth. A subproblem has a line of text:

    BOUND: PRICE PRICE ...; PRICE PRICE ...

or "-" where other classes hold its models.
The prices are Lagrange multipliers, one for each sum. The first vector gives the bound. A subproblem that label setting
solved has up to four vectors, which bound partial models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from merino_edge.search.exact.dominance import ProgramGroup
from merino_edge.search.exact.relaxation import DIGITS
from merino_edge.search.exact.subproblem import Subproblem
from merino_edge.search.space import Space


def to_dict(
    space: Space, groups: Sequence[ProgramGroup], too_dear: Sequence[int], subproblems: Sequence[Subproblem]
) -> dict[str, Any]:
    """The proof. Subproblems of one class stand together, in the order of their depths."""
    depths = range(space.blocks[0] * space.layers[0], space.blocks[-1] * space.layers[-1] + 1)
    by_group: dict[int, dict[tuple[object, ...], list[Subproblem]]] = {id(group): {} for group in groups}
    for one in subproblems:
        by_group[id(one.group)].setdefault((one.first, one.last, one.band), []).append(one)
    return {
        "too_dear": _spell(too_dear),
        "groups": [
            {
                "programs": _spell(group.numbers),
                "classes": [_class(space, depths, members) for members in by_group[id(group)].values()],
            }
            for group in groups
        ],
    }


def _class(space: Space, depths: range, members: Sequence[Subproblem]) -> dict[str, Any]:
    one, by_depth = members[0], {member.depth: member for member in members}
    low, high = one.band
    return {
        "first": [space.widths[one.first[0]], space.widths[one.first[-1]]],
        "last": [space.widths[one.last[0]], space.widths[one.last[-1]]],
        "activation": [low, high if math.isfinite(high) else None],
        "tried": [member.depth for member in members if member.tried],
        "tasks": [_line(by_depth[depth]) if depth in by_depth else "-" for depth in depths],
    }


def _line(subproblem: Subproblem) -> str:
    rows = subproblem.multipliers if subproblem.tried else subproblem.multipliers[:1]
    vectors = "; ".join(" ".join(f"{price:.{DIGITS}g}" for price in row) for row in rows)
    bound = f"{subproblem.proven:.12g}" if math.isfinite(subproblem.proven) else "none"
    return f"{bound}: {vectors}"


def _spell(numbers: Sequence[int]) -> str:
    return " ".join(map(str, sorted(numbers)))
