"""What `merino-edge profile` prints: the plan, the compilation, warnings, and the result with its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.latency.table import LatencyTable

NANO_ENGINE_SECONDS = (20, 60)  # reports of engines of small models, by TensorRT on the board


def print_plan(screen: Console, grid: dict[str, Any], probes: int, eta_seconds: float) -> None:
    for name, values in grid.items():
        screen.print(f"{name.replace('_', ' ')}: {values}", highlight=False)
    screen.print(f"{probes} probes, about {eta_seconds / 60:.1f} min")


def print_compiling(screen: Console, engines: int, seconds: float) -> None:
    least, most = (engines * each / 60 for each in NANO_ENGINE_SECONDS)
    screen.print(
        f"{engines} engines to compile first, once: about {seconds / 60:.1f} min "
        f"(an Orin Nano takes 20 to 60 s for each: {least:.0f} to {most:.0f} min)",
        soft_wrap=True,
    )


def print_warnings(screen: Console, lines: list[str]) -> None:
    for line in lines:
        screen.print(f"warning: {line}", soft_wrap=True, highlight=False, markup=False)


def print_result(screen: Console, table: LatencyTable, seconds: float) -> None:
    from merino_edge.latency.table import slower_percent
    from merino_edge.latency.verdict import largest_load

    unstable, failed = len(table.unstable), table.failed
    screen.print(
        f"{len(table.measurements)} entries in {seconds:.0f} s, {unstable} unstable (median known to less than 2.5%)"
    )
    for m in failed[:3]:
        screen.print(f"failed: {m.mode} of {m.what} {dict(m.shape)}: {m.failed}", soft_wrap=True, markup=False)
    if len(failed) > 3:
        screen.print(f"and {len(failed) - 3} more failed")
    for line in table.moved:
        screen.print(f"warning: while measuring, {line}", soft_wrap=True)
    for mode, figures in table.validation.items():
        if not figures:
            screen.print(f"{mode}: no whole model could be compared")
            continue
        tau = figures["kendall_tau"]
        screen.print(
            f"{mode}: predicted against {figures['models']} whole models measured: "
            f"MAPE {figures['mape_percent']:.1f}%, p95 {figures['p95_percent']:.1f}%, "
            f"max {figures['max_percent']:.1f}%, Kendall tau {'-' if tau is None else f'{tau:.2f}'}",
            soft_wrap=True,
        )
        if found := figures.get("found"):
            slower = slower_percent(found["bias_percent"])
            screen.print(
                f"        and {found['models']} that searches found with it: MAPE {found['mape_percent']:.1f}%, "
                f"{abs(slower):.1f}% {'slower' if slower > 0 else 'faster'} than predicted on average",
                soft_wrap=True,
            )
        if (apart := figures.get("visits_apart_percent")) is not None:
            screen.print(
                f"        repetitions of one model are {apart:.1f}% from their median: that is the machine's noise"
            )
    if load := largest_load(table.conditions):
        named = ", ".join(f"{name} {cores:.2f}" for name, cores in load["busiest"]) or "none that is seen from here"
        screen.print(
            f"other programs used {100 * load['of_measured']:.0f}% of the cores that were measured on and "
            f"{100 * load['of_all']:.0f}% of all; cores kept busy: {named}",
            soft_wrap=True,
            markup=False,
        )
    if table.transferred:
        screen.print(table.transferred, soft_wrap=True, markup=False)
    if table.verdict is not None:
        screen.print(f"verdict: {table.verdict}", soft_wrap=True, markup=False)
    if not table.finished:
        screen.print(f"unfinished; go on with: merino-edge profile --continue --out {table.path}", soft_wrap=True)
