"""`merino-edge doctor`: describes the machine, as a block to paste when asking for help. The exit code is always 0.

The block has the device, its sensors, the versions of packages, which features work, what each verb lacks, and findings
of known problems.
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

    report = examine()
    if as_json:
        console.print_json(report)
    else:
        console.print_line("\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    from merino_edge.cli.console import UNKNOWN, plain

    yield f"merino-edge {report['merino_edge']}, {report['python']}"
    device = {name: plain(value) for name, value in report["device"].items()}
    unread = [name.replace("_", " ") for name, text in device.items() if text == UNKNOWN]
    for name, text in device.items():
        if text != UNKNOWN:
            yield f"  {name.replace('_', ' '):<16} {text}"
    if unread:
        yield f"  {UNKNOWN:<16} {', '.join(unread)}"
    yield "sensors"
    for name, title in SENSORS.items():
        yield f"  {title:<16} {plain(report['sensors'][name], 'none can be read')}"
    yield "packages"
    yield "  " + ", ".join(f"{name} {version or '-'}" for name, version in report["packages"].items())
    yield "features"
    for name, feature in report["features"].items():
        yield f"  {name:<24} {'on ' if feature['on'] else 'off'}  {plain(feature['why'])}"
    for title in ("verbs", "optional"):
        yield title
        width = max(map(len, report[title]))
        for name, state in report[title].items():
            yield f"  {name:<{width}}  " + (
                "ok" if state["ok"] else f"needs {', '.join(state['missing'])}: {state['fix']}"
            )
    yield "findings" if report["traps"] else "findings: none"
    for finding in report["traps"]:
        yield f"  {finding['name']}: {finding['found']}"
        yield f"    {finding['advice']}"
        yield f"    ({finding['source']})"
