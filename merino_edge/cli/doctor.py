"""`merino-edge doctor`: the machine, the versions, and what each verb lacks, as a block to paste. Exit code 0 always.

`--json` prints merino_edge.jetson.doctor.examine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe this machine and what is missing for each verb."""
    from merino_edge.cli import console
    from merino_edge.jetson.doctor import examine

    found = examine()
    if as_json:
        console.print_json(found)
    else:
        console.print_line("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"merino-edge {found['merino_edge']}, {found['python']}"
    for name, value in found["device"].items():
        yield f"  {name.replace('_', ' '):<12} {_plain(value)}"
    yield "packages"
    yield "  " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items())
    for title in ("verbs", "optional"):
        yield title
        width = max(map(len, found[title]))
        for name, state in found[title].items():
            yield f"  {name:<{width}}  " + (
                "ok" if state["ok"] else f"needs {', '.join(state['missing'])}: {state['fix']}"
            )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "unknown"
    return " ".join(map(str, value)) or "unknown" if isinstance(value, list) else str(value)
