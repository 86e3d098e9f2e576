"""`merino-edge bench BUNDLE`: measures how fast a bundle runs here, with the cases and options of llama-bench.

`--output` chooses a table, Markdown, CSV or one JSON object a line. `--json`, or json, prints one object:

    results     one for each case: test, tokens_per_second, mean, sd, min, max, p50_ms, p95_ms and p99_ms (of a decode
                step, or of a whole prompt up to the first token), energy_mj_per_token, gb_per_second (weights and
                KV cache that decode reads), roofline_percent, samples
    comparison  with --against: one for each case
    and         load_ms, load_memory_mb (how far the machine's free memory fell), peak_memory_mb (this process's),
                notes, the settings, the bundles (with their threads) and the versions"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli.bundle_options import Cpu

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.bench import Case, Result
    from merino_edge.runtime.engine import Engine

COLUMNS = {  # of every form but JSON: (heading, digits)
    "bundle": ("bundle", None),
    "test": ("test", None),
    "tokens_per_second": ("tok/s", 1),
    "sd": ("sd", 1),
    "p50_ms": ("p50 ms", 3),
    "p95_ms": ("p95 ms", 3),
    "p99_ms": ("p99 ms", 3),
    "energy_mj_per_token": ("mJ/token", 2),
    "gb_per_second": ("GB/s", 1),
    "roofline_percent": ("roof %", 0),
}
BUSY_LOAD = 0.5  # load average of the last minute, above which a note is printed


class Form(str, Enum):
    table = "table"
    md = "md"
    markdown = "markdown"
    csv = "csv"
    json = "json"
    jsonl = "jsonl"


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="MODEL", help="Bundle folder, or what `run` takes.")],
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens", "-p", metavar="N[,N...]", help="Prompt lengths in tokens, such as 64,512; 0 for none."
        ),
    ] = "64",
    new_tokens: Annotated[
        str,
        typer.Option("--new-tokens", "-n", metavar="N[,N...]", help="Numbers of tokens to decode; 0 for none."),
    ] = "128",
    depth: Annotated[
        str,
        typer.Option(
            "--depth", "-d", metavar="N[,N...]", help="Cache positions that are filled before, such as 0,512."
        ),
    ] = "0",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="Measured repetitions, after one warm-up.")
    ] = 5,
    against: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Another bundle, measured in alternation and compared."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", help="CPU threads. [default: as tuned by build, else all cores]"),
    ] = None,
    cpu: Cpu = False,
    no_cuda_graphs: Annotated[
        bool, typer.Option("--no-cuda-graphs", help="Run TensorRT engines without CUDA graphs.")
    ] = False,
    output: Annotated[
        Form, typer.Option("--output", "-o", case_sensitive=False, help="Form of the output.")
    ] = Form.table,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the speed and memory of a bundle.

    It measures time to first token, prefill speed, decode speed and peak memory, with the cases of llama-bench.
    """
    from merino_edge.cli.bundle_options import open_bundle
    from merino_edge.cli.console import print_json, progress, stderr
    from merino_edge.jetson.device.energy import EnergyMeter
    from merino_edge.jetson.device.sensors import Sensors, moved
    from merino_edge.runtime import bench as runtime
    from merino_edge.runtime.memory import MemoryWatch, peak_memory_mb

    prompts, steps = ([count for count in _counts(text) if count] for text in (prompt_tokens, new_tokens))
    cases = runtime.cases(prompts, steps, _counts(depth))
    notes = _load_notes()
    sensors = Sensors()
    with contextlib.ExitStack() as stack:
        began = perf_counter()
        opened: dict[str, Bundle] = {}
        engines: dict[str, Engine] = {}
        with MemoryWatch() as watch:
            for path in (bundle, *([against] if against else [])):
                engine, _, loaded = open_bundle(path, threads, cpu=cpu, cuda_graphs=not no_cuda_graphs)
                name = loaded.path.name if loaded.path.name not in engines else str(loaded.path)
                engines[name], opened[name] = stack.enter_context(contextlib.closing(engine)), loaded
        load_ms = 1e3 * (perf_counter() - began) / len(engines)
        notes += [line for engine in engines.values() if (line := getattr(engine, "placement_warning", ""))]
        bar = stack.enter_context(progress())
        task = bar.add_task("measuring", total=repetitions * len(cases) * len(engines), note="")
        before = sensors.read()
        results = runtime.bench(engines, cases, repetitions, lambda: bar.advance(task))
        notes += moved(before, sensors.read())
        threads_of = {name: getattr(engine, "threads", None) for name, engine in engines.items()}  # None: on a GPU
        energy = _energy_mj(engines, cases, EnergyMeter.of())
        memory_mb = peak_memory_mb()
    rows = [
        {
            "bundle": name,
            **result.to_dict(),
            **_read_rate(result, opened[name], threads_of[name]),
            "energy_mj_per_token": energy[name, case],
        }
        for name, bundle_results in results.items()
        for case, result in zip(cases, bundle_results, strict=True)
    ]
    comparison = _comparison(results)
    if as_json or output == Form.json:
        loading = {"load_ms": load_ms, "load_memory_mb": watch.taken_bytes / 1e6}
        cards = {name: {**loaded.card(), "threads": threads_of[name]} for name, loaded in opened.items()}
        memory = {"peak_memory_mb": memory_mb, "versions": _versions(), "bundles": cards}
        settings = {"repetitions": repetitions, **loading}
        print_json({"results": rows, "comparison": comparison, **settings, **memory, "notes": notes})
        return
    _print(rows, output)
    say = stderr().print
    where = ", ".join(
        dict.fromkeys("on a GPU" if count is None else f"{count} threads" for count in threads_of.values())
    )
    say(
        f"{where}, {repetitions} repetitions, load {load_ms:.0f} ms and "
        f"{watch.taken_bytes / 1e6:.0f} MB of the machine's memory, peak memory {memory_mb:.0f} MB"
    )
    for line in comparison:
        spread, p_value = f"{line['low']:.2f} - {line['high']:.2f}", f"{line['p_value']:.3f}"
        say(f"{line['test']}: {line['ratio']:.2f} times as fast ({spread}), p {p_value}")
    for note in notes:
        say(f"note: {note}")


def _counts(text: str) -> list[int]:
    """64,512 -> [64, 512]"""
    from merino_edge.errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is no list of numbers", "write it as 64,512") from None


def _load_notes() -> list[str]:
    load = os.getloadavg()[0]
    return [f"other programs were running (load {load:.1f}), so the speeds are too low"] if load > BUSY_LOAD else []


def _energy_mj(
    engines: Mapping[str, Engine], cases: Sequence[Case], meter: Any
) -> dict[tuple[str, Case], float | None]:
    """The energy per token, by bundle and case, or None where no power sensor can be read.

    It takes one more run of each case, because sampling the power takes processor time.
    """
    from merino_edge.runtime.bench import run_once

    energy: dict[tuple[str, Case], float | None] = {}
    for name, engine in engines.items():
        for case in cases:
            energy[name, case] = None
            if meter is not None:
                with meter.measuring() as used:
                    run_once(engine, case)
                energy[name, case] = None if used.energy_mj is None else used.energy_mj / case.tokens
    return energy


def _read_rate(result: Result, opened: Bundle, threads: int | None) -> dict[str, float | None]:
    """How fast a decode step reads memory: the weights once, and the cache positions in use.

    The roofline share is None for a GPU, because the speed of its memory is not known here.
    """
    from merino_edge.counts import step_bytes
    from merino_edge.runtime.memory import reading_ms

    if result.case.kind == "prefill":
        return {"gb_per_second": None, "roofline_percent": None}
    middle = result.case.depth + result.case.tokens // 2
    read_bytes = step_bytes(opened.architecture, opened.precision, middle)
    share = None if threads is None else 100 * reading_ms(round(read_bytes), threads) * result.median / 1e3
    return {"gb_per_second": read_bytes * result.median / 1e9, "roofline_percent": share}


def _comparison(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from merino_edge.runtime.bench import compare

    if len(results) < 2:
        return []
    pairs = zip(*results.values(), strict=True)
    return [{"test": first.case.name, **asdict(compare(first, second))} for first, second in pairs]


def _versions() -> dict[str, str]:
    import platform

    import numpy
    import onnxruntime  # its package may be onnxruntime-gpu
    import tokenizers

    libraries = (onnxruntime, numpy, tokenizers)
    return {"python": platform.python_version(), **{lib.__name__: str(lib.__version__) for lib in libraries}}


def _print(rows: list[dict[str, Any]], form: Form) -> None:
    if form == Form.jsonl:
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
        return
    columns = {name: column for name, column in COLUMNS.items() if any(row[name] is not None for row in rows)}
    headings = [heading for heading, _ in columns.values()]
    cells = [[_cell(row[name], digits) for name, (_, digits) in columns.items()] for row in rows]
    if form == Form.csv:
        csv.writer(sys.stdout).writerows([headings, *cells])
    elif form in (Form.md, Form.markdown):
        lines = [headings, ["---" if digits is None else "---:" for _, digits in columns.values()], *cells]
        sys.stdout.writelines(f"| {' | '.join(line)} |\n" for line in lines)
    else:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        from merino_edge.cli.console import stdout

        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
        for heading, digits in columns.values():
            table.add_column(heading, justify="left" if digits is None else "right")
        for line in cells:
            table.add_row(*line)
        stdout().print(table)


def _cell(value: Any, digits: int | None) -> str:
    if value is None:
        return "-"
    return str(value) if digits is None else f"{value:.{digits}f}"
