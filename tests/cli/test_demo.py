"""The demo, reduced: it goes on after Ctrl-C to the same artefacts, and ends with a page of two boards."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.made_once import MadeOnce
from helpers.warm_python import run_merino
from merino_edge import artefact, checkpoint
from merino_edge.cli import demo_models, demo_report
from merino_edge.cli.console import stderr
from merino_edge.cli.demo_steps import STATE, Steps
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.verdict import Verdict
from merino_edge.search.builtin_spaces import DEMO

FEW = """{"kind": "space", "schema_version": 2, "name": "few", "base": "demo", "blocks": 1, "widths": [64, 128],
"ffn_ratios": [1], "layers": [1, 2], "embedding_widths": 64, "vocabularies": [{"size": 1024}], "contexts": 128}"""


def command(merino: tuple[str, ...], folder: Path, space: Path) -> list[str]:
    options = ["--minutes", "0.01", "--steps", "20", "--threads", "1"]
    return [*merino, "demo", "--space", str(space), *options, "--out", str(folder)]


@pytest.fixture(scope="module")
def demos(merino: tuple[str, ...], made_once: MadeOnce) -> Path:
    """A demo, `resumed`, that was interrupted in training and went on."""
    pytest.importorskip("torch", reason="a board does not train")

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        space, resumed = folder / "few.json", folder / "resumed"
        space.write_text(FEW)
        process = subprocess.Popen(command(merino, resumed, space), stdout=-1, stderr=-1, text=True)
        while not (resumed / "checkpoint/state/state.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        (folder / "interrupted.json").write_text(json.dumps([process.returncode, out, err]))
        done = subprocess.run(command(merino, resumed, space), capture_output=True, text=True, check=True)
        (folder / "resumed.txt").write_text(done.stdout + done.stderr)

    return made_once("demos", make)


def test_ctrl_c_keeps_what_is_done(demos: Path) -> None:
    code, out, err = json.loads((demos / "interrupted.json").read_text())
    assert (code, out) == (130, "") and "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.fullmatch(r"merino-edge: interrupted; \d steps are done and stay in .*; the same command goes on", last)
    assert re.search(r"about \d+ minutes on \d+ cores", err)


def test_resumed_equals_uninterrupted(demos: Path, tmp_path: Path) -> None:
    resumed, printed = demos / "resumed", (demos / "resumed.txt").read_text()
    assert "profile: kept" in printed
    (train,) = re.findall(r"^\$ merino-edge (train .*) --continue$", printed, re.MULTILINE)
    assert train.endswith(f"--out {resumed / 'checkpoint'}")
    run_merino(*train.split()[:-1], tmp_path / "checkpoint")
    demo_models.write_rival(resumed / "architecture.json", tmp_path / "checkpoint", tmp_path / "by-hand")
    for name in ("checkpoint", "by-hand"):
        first, second = checkpoint.load(resumed / name), checkpoint.load(tmp_path / name)
        assert first.training.get("step") == second.training.get("step")
        assert first.weights.keys() == second.weights.keys()
        assert all((first.weights[key] == second.weights[key]).all() for key in first.weights)


def test_a_third_run_keeps_everything(demos: Path, merino: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(demos / "resumed", folder)
    done = subprocess.run(command(merino, folder, demos / "few.json"), capture_output=True, text=True, check=True)
    state = json.loads((folder / STATE).read_text())
    assert done.stderr.count(": kept") == len(state["steps"]) and "$ merino-edge" not in done.stderr
    assert state == json.loads((demos / "resumed" / STATE).read_text())


def test_the_summary_and_the_page(demos: Path) -> None:
    folder = demos / "resumed"
    summary = artefact.read_json(folder / "summary.json", "demo")
    here, board = summary["boards"]
    assert not here["estimated"] and here["verdict"]["word"] and board["estimated"]
    for index, each in enumerate(summary["boards"]):
        assert each["predicted_ms"][index] <= each["budget_ms"] and each["prices"]
        a = json.loads((folder / demo_report.MODELS[index]).read_text())["architecture"]
        assert each["model"]["blocks"] == a["blocks"]
    found, rival = summary["speeds"]
    assert (found["model"], rival["model"]) == ("found", "by hand") and found["score"] >= rival["score"]
    assert found["predicted_tokens_per_s"] == pytest.approx(1e3 / here["predicted_ms"][0])
    low, high = found["measured_within"]
    assert 0 < low <= found["measured_tokens_per_s"] <= high
    page = (folder / "index.html").read_text()
    assert "{{" not in page and "://" not in page and page.count("data:image/png;base64,") == 2
    assert board["name"] in page and ", estimated" in page and here["name"] in page
    assert f"{found['measured_tokens_per_s']:,.0f} (" in page and "stories keep their names" in page
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["speeds"] == summary["speeds"]


def documented(**changes: Any) -> dict[str, Any]:
    """A small summary."""
    block = {"width": 64, "layers": 2, "ffn_width": 128, "shared": False}
    model = {"id": "a", "blocks": [block], "parameters": 1_000_000, "score": 5.0}
    board = {"name": "<Board>", "estimated": False, "verdict": None, "budget_ms": 2.0, "prices": ["a < b"]}
    speed = {"predicted_tokens_per_s": 500.0, "predicted_within": None, "measured_tokens_per_s": 444.0}
    return {
        "boards": [{**board, "model": model, "predicted_ms": [1.0, 2.0]}] * 2,
        "speeds": [{**model, "model": "found", **speed, "measured_within": [100.0, 500.0], "spoiled": True}],
        "spoiled": ["other work took 60 % of the cores meanwhile and spoiled the measured speeds"],
        "threads": 1,
        "loss_before": 8.0,
        "loss_after": 1.0,
        "training_steps": 40,
        "parity": [{}],
        "story": {"text": "</script><b>", "draws": 20, "draws_that_keep_names": 0, "keeps_names": False, "seed": 0},
        "steps": {"train": 60.0},
        **changes,
    }


def test_a_spoiled_figure_is_said_to_be_one(tmp_path: Path) -> None:
    document = documented()
    demo_report.write_page(document, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "444 (100 to 500) (spoiled)" in page and "Not to be trusted: other work took 60 %" in page
    assert "<Board>" not in page.split("<script")[0] and "&lt;Board&gt;" in page and "a &lt; b" in page
    assert page.count("</script>") == 1  # a story cannot end the element
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(demo_report.terminal(document, tmp_path))
    text = console.export_text()
    assert "444 tokens/s measured (spoiled)" in text and "not to be trusted" in text


@pytest.mark.parametrize(("share", "apart", "verdict", "lines"), [
    (0.0, 0.0, "good", 0), (0.6, 0.0, "good", 2), (0.0, 0.5, "good", 1), (0.0, 0.0, "do not use", 1),
])  # fmt: skip
def test_what_spoils_a_figure(
    share: float, apart: float, verdict: Any, lines: int, tmp_path: Path, write_table: Callable[..., LatencyTable]
) -> None:
    table = replace(write_table(DEMO), verdict=Verdict(verdict, ("because",)))
    run = Steps(tmp_path, {}, stderr())
    run.records = {"bench": {"other_load": share}, "threads": {"other_load": None}}
    speed: dict[str, Any] = {"model": "found", "measured_tokens_per_s": 100.0}
    speed["measured_within"] = [100 * (1 - apart / 2), 100 * (1 + apart / 2)]
    found = demo_report._spoiled(table, run, [speed])
    assert len(found) == lines and speed["spoiled"] == (share > 0.25 or apart > 0.3)
