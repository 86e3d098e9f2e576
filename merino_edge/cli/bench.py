"""`merino-edge bench BUNDLE`: how fast a bundle runs on this machine. A table or one JSON object on stdout.

JSON: the medians `decode_tokens_per_second`, `prefill_tokens_per_second`, `first_token_ms`; `peak_memory_mb`;
`spread` (min, max, sd) and `samples` of each; the settings, the bundle and the versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.bench import Bench

QUANTITIES = {
    "first_token_ms": ("time to first token", "ms"),
    "prefill_tokens_per_second": ("prefill", "tok/s"),
    "decode_tokens_per_second": ("decode", "tok/s"),
}


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 128,
    repetitions: Annotated[int, typer.Option(help="Measured runs, after one warm-up.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run the graph on the CPU, whatever engines there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure time to first token, prefill and decode speed, and memory of a bundle."""
    from contextlib import closing

    from merino_edge.cli.console import print_json, progress
    from merino_edge.cli.opening import open_bundle
    from merino_edge.runtime.bench import bench as measure

    engine, _, opened = open_bundle(bundle, threads, cpu)
    with closing(engine), progress() as bar:
        task = bar.add_task("measuring", total=repetitions, note="")
        result = measure(engine, prompt_tokens, new_tokens, repetitions, lambda: bar.advance(task))
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repetitions": repetitions,
        "threads": threads,
    }
    if as_json:
        print_json(_document(result, opened, settings))
    else:
        _print_table(result, opened, settings)


def _document(result: Bench, opened: Bundle, settings: dict[str, int]) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    measured = {name: getattr(result, name) for name in QUANTITIES}
    packages = ("onnxruntime", "numpy", "tokenizers")
    return {
        **{name: measurement.median for name, measurement in measured.items()},
        "peak_memory_mb": result.peak_memory_mb,
        "spread": {name: measurement.spread() for name, measurement in measured.items()},
        "samples": {name: measurement.samples for name, measurement in measured.items()},
        **settings,
        "bundle": opened.card(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _print_table(result: Bench, opened: Bundle, settings: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{opened.path.name} {opened.precision}, {settings['threads']} threads, "
        f"{settings['prompt_tokens']} + {settings['new_tokens']} tokens, {settings['repetitions']} runs",
        title_justify="left",
    )
    for heading in ("", "median", "min", "max", "sd", "unit"):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    for name, (label, unit) in QUANTITIES.items():
        measurement = getattr(result, name)
        cells = (measurement.median, *measurement.spread().values())
        table.add_row(label, *("-" if cell is None else f"{cell:.1f}" for cell in cells), unit)
    table.add_row("peak memory", f"{result.peak_memory_mb:.0f}", "", "", "", "MB")
    Console(highlight=False).print(table)
