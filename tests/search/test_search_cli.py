from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from merino_edge import architecture
from merino_edge.latency_table import LatencyTable
from merino_edge.search.space import DEMO

WriteTable = Callable[..., LatencyTable]


def merino(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    program = "from merino_edge.cli.main import main; main()"
    command = [sys.executable, "-c", program, "search", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def test_search_writes_what_it_prints(tmp_path: Path, write_table: WriteTable) -> None:
    latencies = write_table(DEMO, precision="int8")
    out, png = tmp_path / "a.json", tmp_path / "a.png"
    done = merino(
        "--space",
        "demo",
        "--table",
        latencies.path,
        "--decode-ms",
        2.5,
        "--params",
        "2.5M",
        "--no-shared",
        "--seed",
        3,
        "--iterations",
        5000,
        "--plot",
        png,
        "--json",
        "--out",
        out,
    )
    document = json.loads(done.stdout)
    a, saved = architecture.load(out)
    assert saved == document
    assert document["budgets"] == {"parameters": 2.5e6, "decode_ms": 2.5}
    assert document["costs"]["parameters"] == a.parameters <= 2.5e6
    assert (
        document["costs"]["decode_ms"] == pytest.approx(latencies.model_ms(a, "decode"))
        and document["costs"]["decode_ms"] <= 2.5
    )
    assert (
        document["costs"]["weight_mb"] == pytest.approx(a.weight_bytes("int8") / 1e6)
        and document["precision"] == "int8"
    )
    assert document["score"]["hyperparameters"] == {
        "alpha_mha": 0.4,
        "alpha_ffn": 0.6,
        "epsilon_squared": 700.0,
        "beta_depth": 1 / 16,
        "effectiveness_power": 1.0,
    }
    assert (document["solver"], document["seed"], document["space"]["name"]) == ("evolution", 3, "demo")
    assert document["table"] == {"sha256": latencies.sha256, "estimated": True}
    assert png.read_bytes().startswith(b"\x89PNG") and "estimated" in done.stderr


def test_search_without_json_prints_the_path_and_repeats_itself(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    for out in (first, second):
        done = merino("--flops", "60G", "--iterations", 2000, "--shared", "--out", out)
        assert done.stdout == f"{out}\n" and "GFLOPs" in done.stderr
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--decode-ms", "5"], 2, "merino-edge profile"),
        (["--params", "1M"], 4, "least possible is 38.94M"),
        (["--params", "many"], 2, "--params 'many'"),
        (["--flops", "nan"], 2, "--flops"),
        (["--space", "house"], 2, "paper, demo"),
        (["--space", "no/such/space.json"], 3, "does not exist"),
        (["--table", "no/such/table.jsonl"], 3, "does not exist"),
        (["--solver", "guess"], 2, "--solver evolution"),
        (["--precision", "int3"], 2, "fp32, fp16, int8, int4"),
        (["--parents", "1000"], 2, "parents is 1000"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = merino(*arguments, "--out", tmp_path / "a.json", code=code)
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = merino("--iterations", 10, "--out", tmp_path / "file" / "a.json", code=6)
    assert "cannot write" in done.stderr and done.stderr.count("\n") == 1


def test_without_matplotlib_there_is_a_note_and_no_plot(tmp_path: Path) -> None:
    """The program is told that matplotlib is not installed, as on a board."""
    program = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
from merino_edge.cli.main import main
main()"""
    command = [sys.executable, "-c", program, "search", "--iterations", "10", "--plot", "a.png", "--out", "a.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and "pip install 'merino-edge[plot]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
