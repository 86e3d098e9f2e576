"""`merino-edge doctor`: describes the machine, as a block to paste when asking for help. The exit code is always 0.

The block has the device, its sensors, the versions of packages, what each verb lacks, and findings of known problems.
`--json` prints merino_edge.jetson.doctor.doctor.examine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

SENSORS = {
    "power_source": "power source",
    "power_mw": "power [mW]",
    "temperature_c": "temperature [C]",
    "clock_mhz": "clock [MHz]",
    "throttle_events": "throttle events",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe this machine and what each verb still needs."""
    from merino_edge.cli import console
    from merino_edge.jetson.doctor.doctor import examine

    found = examine()
    if as_json:
        console.print_json(found)
    else:
        console.print_line("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from merino_edge.cli.console import UNKNOWN, plain

    yield f"merino-edge {found['merino_edge']}, {found['python']}"
    device = {name: plain(value) for name, value in found["device"].items()}
    unread = [name.replace("_", " ") for name, text in device.items() if text == UNKNOWN]
    for name, text in device.items():
        if text != UNKNOWN:
            yield f"  {name.replace('_', ' '):<16} {text}"
    if unread:
        yield f"  {UNKNOWN:<16} {', '.join(unread)}"
    yield "sensors"
    for name, title in SENSORS.items():
        yield f"  {title:<16} {plain(found['sensors'][name], 'none can be read')}"
    yield "packages"
    yield "  " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items())
    for title in ("verbs", "optional"):
        yield title
        width = max(map(len, found[title]))
        for name, state in found[title].items():
            yield f"  {name:<{width}}  " + (
                "ok" if state["ok"] else f"needs {', '.join(state['missing'])}: {state['fix']}"
            )
    yield "known traps" if found["traps"] else "known traps: none found"
    for trap in found["traps"]:
        yield f"  {trap['name']}: {trap['found']}"
        yield f"    {trap['advice']}"
        yield f"    ({trap['source']})"
