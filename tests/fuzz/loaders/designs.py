"""What designs and searches read: architectures, spaces, tables, results, fronts, certificates, boards."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from fuzz.draft import Draft, Files, Loader, sign_file, text
from fuzz.honest import TINY, content, written
from fuzz.json_changes import canonical, put, sha256, sign
from fuzz.watch import Silent
from rich.console import Console

from helpers import linear_table
from helpers.formula_table import write_formula_table
from helpers.recorded_boards import JETPACK7, LINES, board_files
from merino_edge import architecture, artefact
from merino_edge.architecture import Block
from merino_edge.cli import console
from merino_edge.cli import show as shown
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.device.nvpmodel import power_modes
from merino_edge.jetson.device.sensors import Sensors
from merino_edge.jetson.device.tegrastats import parse_line
from merino_edge.jetson.profiler.comparison import compare
from merino_edge.latency.step import Step
from merino_edge.latency.table_file import load_table
from merino_edge.search import pareto_report, space_file
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import DEMO, load_space
from merino_edge.search.pareto import KIND, SCHEMA_VERSION, pareto_front
from merino_edge.search.reference_models import references
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import parse_score
from merino_edge.search.space import Vocabulary

SPACE = dataclasses.replace(
    DEMO,
    name="tiny",
    blocks=(1, 2),
    widths=(32, 64),
    ffn_ratios=(1, 2),
    layers=(1, 2),
    shared=(False, True),
    embedding_widths=(32,),
    vocabularies=(Vocabulary(300, 1.9),),
    contexts=(64,),
    least_embedding=0,
)


@functools.cache
def _console(**options: bool) -> Console:
    return Console(file=Silent(), width=80, highlight=False, markup=False, **options)


def show(path: Path) -> None:
    """What everybody does first. One console prints for all: to make one takes longer than to load most artefacts."""
    console.stdout = _console
    shown.show(path, None, False)


COVERED = dataclasses.replace(linear_table.MODEL, blocks=(Block(32, 2, 1, 1, 64), Block(64, 3, 2, 2, 256)))


# --- architectures and spaces ----------------------------------------------------------------------


def _seal_architecture(made: Draft) -> None:
    if "a.json" not in made.written:
        document = made.structure("a.json")
        if isinstance(document, dict) and (text_of := canonical(document.get("architecture"))) is not None:
            put(document, ("id",), sha256(text_of)[:12])
        sign(document)


def _write_space(folder: Path) -> None:
    artefact.write_json(folder / "s.json", space_file.KIND, space_file.to_dict(SPACE), space_file.SCHEMA_VERSION)


def _use_space(folder: Path) -> None:
    space = load_space(str(folder / "s.json"))
    show(folder / "s.json")
    space.architecture(space.sample(Random(0)))


# --- tables ----------------------------------------------------------------------------------------


def _write_table(folder: Path) -> None:
    lines = [m for m in linear_table.measurements() if m.what != "repeat" and m.shape.get("width", 0) < 128][:40]
    device = {"name": "Board", "compatible": ["a,b"], "cores": 4, "gpu": {"max_mhz": 918.0}}
    content = linear_table.table_text(lines, finished=False, device=device, backend="onnxruntime-cpu", threads=1)
    from merino_edge.latency.measurement import add_checksum

    figures = {"models": 4, "mape_percent": 1.5, "max_percent": 3.0, "bias_percent": 0.1, "kendall_tau": 0.9}
    more: list[dict[str, Any]] = [
        {"what": "conditions", "moment": "before", "clock_mhz": {"gpu": 918.0}, "moved": ["clock 1 to 2"],
         "other_load": {"of_measured": 0.1, "of_all": 0.2, "busiest": [["python", 0.5]]}},
        {"what": "faces", "decode": {"faces": [[0.0, 0.001, 0.1]], "alternatives": [[0]]}},
        {"what": "validation", "decode": {**figures, "low_percent": -2.0, "high_percent": 2.0, "found": figures},
         "prefill": figures, "verdict": {"word": "good", "reasons": []}},
    ]  # fmt: skip
    (folder / "t.jsonl").write_text(content + "".join(add_checksum(line) + "\n" for line in more))
    load_table(folder / "t.jsonl", unfinished=True)


def _seal_table(made: Draft) -> None:
    if "t.jsonl" in made.written:
        return
    lines = made.structure("t.jsonl")
    for number, line in enumerate(lines if isinstance(lines, list) else ()):
        sign(line, 16 if number else 64)


def _use_table(folder: Path) -> None:
    path = folder / "t.jsonl"
    show(path)
    table = load_table(path, unfinished=True)
    assert table.warnings is not None and table.winners_curse("decode") is not None
    compare(table, table)
    table.model_interval(COVERED, Step("decode", 64))


# --- results, fronts, certificates -----------------------------------------------------------------


def _config(folder: Path, *, with_table: bool) -> SearchConfig:
    table = write_formula_table(folder, SPACE, "int8") if with_table else None
    limits: dict[str, float] = {"flops": 1e9, "weight_mb@int4": 10.0}
    if table is not None:
        limits["decode_ms@64"] = 50.0
    return SearchConfig(SPACE, Budget.of(limits), parse_score("effective"), "int8", table)


def _write_result(folder: Path, *, with_table: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        result = run_search(_config(Path(scratch), with_table=with_table))
        architecture.save(folder / "a.json", result.architecture, **result.document())


def _use_result(folder: Path) -> None:
    path = folder / "a.json"
    show(path)
    _, document = architecture.load(path)
    SearchConfig.of(document, str(path)).problem()


def _use_certificate(folder: Path) -> None:
    from merino_edge.cli import verify

    verify.verify(folder / "a.json", None, False)


def _write_front(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(Path(scratch), with_table=True)
        front = pareto_front(config.problem(), Metric.parse("decode_ms@64"), 3)
        public = references(front.metric, config.score, front.problem.cost_model)[:2]
        artefact.write_json(folder / "f.json", KIND, pareto_report.to_document(front, config, public), SCHEMA_VERSION)


def _use_front(folder: Path) -> None:
    show(folder / "f.json")


# --- boards ----------------------------------------------------------------------------------------

BOARD = "jetpack7-orin-nano-super"


def _board() -> Files:
    files = {path: content.encode() for path, content in board_files(BOARD).items()}
    files["tegrastats"] = "\n".join((JETPACK7, *LINES[-2:])).encode()
    return files


def _use_board(folder: Path) -> None:
    card = device_card(folder)
    json.dumps(card, allow_nan=False)
    power_modes(folder)
    sensors = Sensors(folder)
    sensors.read()
    for line in content(folder / "tegrastats").decode(errors="replace").splitlines():
        parse_line(line)


_BOARD_TEXT = text("0", "MHz", ":", "/", "off", "<", ">", "kB", "@", "%", "mW", "C", "NAME=", "POWER_MODEL", "nvidia,")

LOADERS = (
    Loader(
        "architecture",
        functools.partial(written, lambda folder: architecture.save(folder / "a.json", TINY)),
        lambda folder: show(folder / "a.json"),
        seal=_seal_architecture,
    ),
    Loader("space", functools.partial(written, _write_space), _use_space, seal=lambda made: sign_file(made, "s.json")),
    Loader("table", functools.partial(written, _write_table), _use_table, seal=_seal_table),
    Loader(
        "result",
        functools.partial(written, functools.partial(_write_result, with_table=True)),
        _use_result,
        seal=_seal_architecture,
    ),
    Loader(
        "certificate",
        functools.partial(written, functools.partial(_write_result, with_table=False)),
        _use_certificate,
        seal=_seal_architecture,
    ),
    Loader("front", functools.partial(written, _write_front), _use_front, seal=lambda made: sign_file(made, "f.json")),
    Loader(
        "board",
        _board,
        _use_board,
        codecs=dict.fromkeys(_board(), _BOARD_TEXT),
        refuses=False,
    ),
)
