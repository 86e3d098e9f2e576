from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.search_verb import merino, written
from helpers.small_spaces import MIXED, SMALL
from helpers.warm_python import warm_merino, warm_python
from merino_edge import architecture
from merino_edge.cli import search
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable
from merino_edge.presets import preset
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import DEMO, PAPER
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import counting

WriteTable = Callable[..., LatencyTable]


def test_search_writes_what_it_prints_and_proves_it(tmp_path: Path, write_table: WriteTable) -> None:
    found = {"models": 10, "mape_percent": 25.0, "bias_percent": 25.0, "low_percent": -9.0, "high_percent": 9.0}
    table = write_table(DEMO, precision="int8", decode={"low_percent": -10.0, "high_percent": 20.0, "found": found})
    out, png = tmp_path / "a.json", tmp_path / "a.png"
    budgets = ["--decode-ms", 3.0, "--decode-ms", "3.5@256", "--params", "2.5M", "--peak-mb", "9@128"]
    done = merino("--space", "demo", "--table", table.path, *budgets, "--plot", png, "--json", "--out", out)
    document = json.loads(done.stdout)
    a, saved = architecture.load(out)
    assert saved == document
    assert document["budgets"] == {"decode_ms@64": 3.0, "decode_ms@256": 3.5, "peak_mb@128": 9.0, "parameters": 2.5e6}
    costs = document["costs"]
    assert all(costs[key] <= limit for key, limit in document["budgets"].items())
    assert costs["parameters"] == a.parameters and costs["flops"] == a.flops()
    assert costs["decode_ms@256"] == table.model_cost(a, Step("decode", 256))
    assert document["intervals"] == {
        key: [costs[key] * 0.9, costs[key] * 1.2] for key in ("decode_ms@64", "decode_ms@256")
    }
    assert document["expected"] == {key: pytest.approx(costs[key] / 1.25) for key in document["intervals"]}
    assert costs["weight_mb@int8"] == pytest.approx(a.weight_bytes("int8") / 1e6) and document["precision"] == "int8"
    assert document["score"]["total"] == counting().total(a) == document["certificate"]["bound"]
    assert document["score"]["shared_layer"] == 0.1 and document["score"]["exit_power"] == 0.75
    claim = {"version": 1, "bound": document["score"]["total"], "gap_percent": 0.0, "architectures": DEMO.size}
    assert {key: document["certificate"][key] for key in claim} == claim
    assert {"too_dear", "groups"} <= set(document["certificate"])
    assert document["choices"]["vocabulary"] == {
        "size": 4096,
        "bytes_per_token": DEMO.vocabularies[0].bytes_per_token,
        "tokenizer": "byte-level BPE",
    }
    assert (document["solver"], document["solver_options"], document["space"]["name"]) == ("exact", {}, "demo")
    assert document["table"]["sha256"] == table.sha256 and document["table"]["header"]["estimated"]
    assert png.read_bytes().startswith(b"\x89PNG") and "estimated" in done.stderr
    printed = " ".join(done.stderr.split())
    assert f"none of the {DEMO.size:,} architectures of space demo within the budgets scores above" in printed
    assert "gap 0 %" in printed


def test_evolution_reports_its_distance_from_the_optimum(tmp_path: Path) -> None:
    first, second, exact = (tmp_path / f"{name}.json" for name in ("1", "2", "exact"))
    for out in (first, second):
        options = ("--iterations", 20, "--population", 4, "--parents", 2, "--seed", 3)
        done = merino("--flops", "60G", "--solver", "evolution", *options, "--out", out)
        assert done.stdout == f"{out}\n" and "GFLOPs" in done.stderr
        assert "% higher: none of the" in " ".join(done.stderr.split())
    assert first.read_bytes() == second.read_bytes()
    merino("--flops", "60G", "--out", exact)
    evolved, best = json.loads(first.read_text()), json.loads(exact.read_text())
    gap = 100 * (best["score"]["total"] - evolved["score"]["total"]) / evolved["score"]["total"]
    assert evolved["certificate"]["gap_percent"] == pytest.approx(gap) and gap > 0
    assert evolved["certificate"]["bound"] == best["score"]["total"]
    assert evolved["solver_options"] == {"iterations": 20, "population": 4, "parents": 2, "seed": 3}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--flops", "60G"),
        ("--flops", "60G", "--score", "cut:epsilon_squared=90", "--no-shared"),
        ("--params", "opt-125m", "--solver", "evolution", "--iterations", 500, "--seed", 5),
    ],
)
def test_a_result_reproduces_from_its_json_alone(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    merino(*arguments, "--out", first)
    merino("--from", first, "--out", again)
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("faced", [False, True])
def test_a_result_carries_its_table_and_its_space(
    tmp_path: Path, write_table: WriteTable, write_piecewise: WriteTable, faced: bool
) -> None:
    table = write_piecewise(MIXED, "int4", energy=True) if faced else write_table(MIXED, "int4", energy=True)
    space = written(MIXED, tmp_path)
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    limits = ("--text-ms", "60", "--energy-mj", "12@100", "--first-token-ms", "40@200", "--kv-mb", 3)
    merino("--space", space, "--table", table.path, *limits, "--out", first)
    table.path.unlink()
    space.unlink()
    merino("--from", first, "--out", again)
    assert again.read_bytes() == first.read_bytes()
    table.path.write_text("")  # the fixture's folder is shared


def test_a_users_score_is_used_and_repeated_only_as_it_was(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.py", tmp_path / "a.json"
    mine.write_text("def wide(model, block, depth, cut):\n    return block.width / 64 - 0.01 * depth\n")
    merino("--params", "60M", "--score", f"{mine}:wide", "--out", out)
    document = json.loads(out.read_text())
    assert document["certificate"]["gap_percent"] == 0 and document["score"]["name"] == f"{mine}:wide"
    again = ("--from", out, "--score", f"{mine}:wide")
    merino(*again, "--out", tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == out.read_bytes()
    mine.write_text("def wide(model, block, depth, cut):\n    return block.width / 32\n")
    done = merino(*again, "--out", tmp_path / "c.json", code=2)
    assert "is not what" in done.stderr and not (tmp_path / "c.json").exists()


def test_a_score_of_whole_architectures_is_enumerated_where_it_can_be(tmp_path: Path) -> None:
    mine, space = tmp_path / "mine.py", written(SMALL, tmp_path)
    mine.write_text("def five(a):\n    return -abs(a.layers - 5) + a.parameters * 1e-9\n")
    score, out = f"{mine}:five", tmp_path / "a.json"
    merino("--space", space, "--score", score, "--params", "2M", "--out", out)
    document = json.loads(out.read_text())
    assert document["certificate"]["gap_percent"] == 0 and -1e-2 < document["score"]["total"] < 1e-2
    done = merino("--score", score, "--out", tmp_path / "b.json", code=2)  # 304 million architectures
    assert "too large to try every architecture" in done.stderr and "--solver evolution" in done.stderr
    evolution = ("--solver", "evolution", "--iterations", 300)
    done = merino("--score", score, *evolution, "--out", tmp_path / "b.json")
    assert "nothing is proven" in done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["certificate"]["bound"] is None


def test_a_public_models_name_is_its_own_cost(tmp_path: Path, write_table: WriteTable) -> None:
    table = write_table(PAPER, "fp16")
    out = tmp_path / "a.json"
    merino("--table", table.path, "--decode-ms", "opt-125m@100", "--weight-mb", "gpt2@int4", "--out", out)
    budgets = json.loads(out.read_text())["budgets"]
    assert budgets["decode_ms@100"] == table.model_cost(preset("opt-125m"), Step("decode", 100))
    assert budgets["weight_mb@int4"] == pytest.approx(preset("gpt2").weight_bytes("int4") / 1e6)


def test_a_narrow_first_block_is_warned_of(tmp_path: Path) -> None:
    done = merino("--weight-mb", "48@int4", "--out", tmp_path / "a.json")
    assert "everything passes through 64 of 768 numbers" in " ".join(done.stderr.split())
    done = merino("--weight-mb", "48@int4", "--score", "cut", "--out", tmp_path / "a.json")
    assert "everything passes through" not in done.stderr


def test_stopped_by_the_clock_the_gap_is_said(tmp_path: Path) -> None:
    done = merino("--space", "wide", "--flops", "30G", "--params", "12M", "--score", "flops", "--seconds", 4,
                  "--out", tmp_path / "a.json")  # fmt: skip
    certificate = json.loads((tmp_path / "a.json").read_text())["certificate"]
    assert certificate["gap_percent"] is None or certificate["gap_percent"] > 0
    assert "optimal" not in done.stderr
    again = merino("--from", tmp_path / "a.json", "--out", tmp_path / "b.json", code=2)
    assert "was stopped before it was proven" in again.stderr


def test_prices_are_given_where_they_cost_little_or_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_search(SearchConfig(SMALL, Budget.of({"flops": 1e9}), counting(), "int8"))

    def told(*, priced: bool | None) -> str:
        return "; ".join(search._prices(result, priced=priced, seconds=None))

    assert "would raise the score by" in told(priced=None) and told(priced=False) == ""
    monkeypatch.setattr(search, "UNASKED_SECONDS", -1.0)  # so this search took long
    assert "of 1 used (" in told(priced=None) and told(priced=None).endswith("add --prices")
    assert "would raise" not in told(priced=None) and "would raise the score by" in told(priced=True)


def test_prices_are_said_and_a_flag_leaves_them_out(tmp_path: Path) -> None:
    budget = ("--space", "demo", "--params", "3M", "--out", tmp_path / "a.json")
    assert "3.3 would raise the score by" in merino(*budget, "--prices").stderr
    assert "would raise" not in merino(*budget, "--no-prices").stderr


NONE = str(2**70)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--decode-ms", "5"], 2, "merino-edge profile"),
        (["--params", "1M"], 4, "least possible is 38.94M"),
        (["--params", "5e-324"], 4, "least possible is 38.94M"),
        (["--flops", "1e-300", "--params", "60M"], 4, "meets flops 1e-300 (the least possible is 1.276G)"),
        (["--params", "many"], 2, "--params 'many'"),
        (["--flops", "nan"], 2, "--flops"),
        (["--weight-mb", "40@int3"], 2, "fp32, fp16, int8, int4"),
        (["--kv-mb", "5@-1"], 2, "is no positions"),
        (["--kv-mb", f"5@{NONE}"], 2, "outside 1 to"),
        (["--kv-mb", "5@4096"], 2, "kv_mb@4096 needs 4096 positions, but space paper has contexts up to 2048"),
        (["--params", "60M@3"], 2, "leave @ out"),
        (["--peak-mb", "60@64", "--peak-mb", "90@512"], 2, "peak memory has two budgets; give --peak-mb once"),
        (["--params", "60M", "--params", "70M"], 2, "--params is given twice for parameters"),
        (["--decode-ms", "gpt3"], 2, "'gpt3' is not a positive number"),
        (["--space", "house"], 2, "paper, edge, wide, demo"),
        (["--space", "no/such/space.json"], 3, "does not exist"),
        (["--table", "no/such/table.jsonl"], 3, "does not exist"),
        (["--device", "Orin"], 2, "--device needs a latency table"),
        (["--solver", "guess"], 2, "choose one of exact, evolution"),
        (["--precision", "int3"], 2, "fp32, fp16, int8, int4"),
        (["--target", "orin"], 8, "unknown target 'orin'; choose one of onnxruntime, onnxruntime-cuda, jetpack-6.2"),
        (["--target", "onnxruntime-cuda", "--precision", "fp32"], 8, "has no fp32; choose one of: fp16, int8, int4"),
        (["--target", "onnxruntime-cuda", "--weight-mb", "40@fp32"], 8, "onnxruntime-cuda has no fp32"),
        (["--score", "beauty"], 2, "choose one of paper, calibrated, effective, cut, exit, counting"),
        (["--seconds", "0"], 2, "--seconds is 0"),
        (["--seconds", "nan"], 2, "--seconds is nan"),
        (["--solver", "evolution", "--parents", "1000"], 2, "parents is 1000"),
        (["--parents", "10"], 2, "--parents is an option of the evolution; add: --solver evolution"),
        (["--from", "no/such/result.json"], 3, "does not exist"),
        (["--from", "no/such/result.json", "--flops", "60G"], 2, "leave out every other option but --out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = merino(*arguments, "--out", tmp_path / "a.json", code=code)
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_another_device_is_refused(tmp_path: Path, write_table: WriteTable) -> None:
    table = write_table(DEMO, "int8")
    search = ("--space", "demo", "--table", table.path, "--decode-ms", 3, "--out", tmp_path / "a.json")
    done = merino(*search, "--device", "orin nano", code=2)
    assert "was measured on Formula Board, not on orin nano; measure it there" in done.stderr
    for name in ("formula", "Formula Board", "formula,one"):
        merino(*search, "--device", name)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a search that was proven."""
    path = tmp_path_factory.mktemp("found") / "a.json"
    merino("--flops", "60G", "--out", path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": None}, "does not say how it was found"),
        ({"budgets": {"speed": 1.0}}, "no metric 'speed'"),
        ({"budgets": {"flops": -1.0}}, "budget flops is -1.0"),
        ({"score": {"name": 3}}, "does not say how it was found"),
        ({"budgets": [1.0]}, "does not say how it was found"),
        ({"budgets": {"flops": "60G"}}, "budget flops is '60G'"),
        ({"score": {"name": "effective", "total": 1}}, "is not what"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"solver": "evolution", "solver_options": {"iterations": -1}}, "iterations is -1"),
        ({"solver": "evolution", "solver_options": {"speed": 1}}, "no option 'speed'"),
        ({"solver_options": {"seed": 1}}, "solver exact has no option 'seed'"),
        ({"certificate": {"gap_percent": 0.5}}, "was stopped before it was proven"),
        ({"precision": "int3"}, "fp32, fp16, int8, int4"),
        ({"target": ["rtx"]}, "does not say how it was found"),
        ({"table": {}}, "holds no latency table"),
        ({"budgets": {"flops": 6e9}}, "holds architecture"),
    ],
)
def test_results_that_cannot_be_repeated(found: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    result = Path(shutil.copy(found, tmp_path / "r.json"))
    document = {key: value for key, value in json.loads(result.read_text()).items() if key != "sha256"}
    result.write_text(json.dumps({**document, **change}))
    command = [warm_merino(), "search", "--from", str(result), "--out", str(tmp_path / "b.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (2, 3) and words in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = merino("--flops", "60G", "--out", tmp_path / "file" / "a.json", code=6)
    assert "cannot write" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["search", "pareto"])
def test_without_matplotlib_there_is_a_note_and_no_plot(tmp_path: Path, verb: str) -> None:
    """The program finds no matplotlib, as on a board."""
    program = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
from merino_edge.cli.main import main
main()"""
    more = ["--against", "parameters", "--points", "3"] if verb == "pareto" else []
    command = [warm_python(), "-c", program, verb, *more, "--space", "demo", "--plot", "a.png", "--out", "a.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and "pip install 'merino-edge[plot]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
