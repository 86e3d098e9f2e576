"""The verbs `show`, `doctor` and `profile`: what they print, and their refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.linear_table import table_text
from helpers.looks_like import looks_like
from helpers.smallest_graph import SMALLEST_GRAPH
from helpers.warm_python import run_merino as merino
from helpers.warm_python import warm_merino
from merino_edge import architecture, atomic, bundle, checkpoint, engine_store
from merino_edge.architecture import Architecture, Block
from merino_edge.cli import show
from merino_edge.data import corpus_writer
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.distillation import synthetic_corpus, teacher_logits
from merino_edge.latency.measurement import add_checksum
from merino_edge.latency.table_file import load_table
from merino_edge.tokenizer import ChatFormat
from merino_edge.training import study_runs
from merino_edge.weights import random_weights

TINY = Architecture(
    vocab_size=32, max_positions=16, embedding_width=32, head_dim=16, blocks=(Block(32, 2, 2, 1, 48, shared=True),)
)
TOKENIZER = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


def refused(*arguments: object, code: int, says: str) -> None:
    done = merino(*arguments, code=code)
    assert not done.stdout and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def space_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = {
        "schema_version": 2,
        "name": "tiny",
        "base": "demo",
        "blocks": 1,
        "widths": 32,
        "ffn_ratios": [1, 2],
        "layers": [1, 2, 3, 4],
        "embedding_widths": 32,
        "vocabularies": 64,
        "contexts": 16,
    }
    path = tmp_path_factory.mktemp("space") / "space.json"
    path.write_text(json.dumps({"kind": "space", **document}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artefact of each kind but a latency table."""
    folder = tmp_path_factory.mktemp("artefacts")
    architecture.save(folder / "a.json", TINY, score={"total": 12.5}, seed=3)
    checkpoint.save(
        folder / "checkpoint",
        TINY,
        random_weights(TINY),
        tokenizer_json=TOKENIZER,
        chat=ChatFormat(),
        training={"source": "random\x1b[31m"},
    )
    with atomic.new_folder(folder / "bundle", "bundle") as new:
        for name in bundle.REQUIRED_FILES:
            (new / name).write_bytes(SMALLEST_GRAPH)
        bundle.write_manifest(new, TINY, "int8", "onnxruntime", 16)
    return folder


PROFILE = ("profile", "--device", "cpu", "--minutes", 0.01, "--precision", "int8", "--exit-zero")


@pytest.fixture(scope="module")
def profiled(space_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with t.jsonl, a measured table, its plot t.png, and done.json, what `profile` printed."""
    folder = tmp_path_factory.mktemp("profiled")
    out, png = folder / "t.jsonl", folder / "t.png"
    done = merino(*PROFILE, "--space", space_file, "--plot", png, "--json", "--out", out)
    (folder / "done.json").write_text(done.stdout)
    return folder


def test_profile_writes_a_table_that_show_explains(space_file: Path, profiled: Path, tmp_path: Path) -> None:
    out, png, arguments = tmp_path / "t.jsonl", profiled / "t.png", (*PROFILE, "--space", space_file)
    planned = json.loads(merino(*arguments, "--dry-run", "--json", "--out", out).stdout)
    assert planned["eta_seconds"] > 0 and not out.exists()
    shutil.copy(profiled / "t.jsonl", out)
    done = json.loads((profiled / "done.json").read_text())
    table = load_table(out)
    assert done["validation"] == table.validation and done["entries"] == len(table.measurements)
    assert planned["probes"] == sum(m.what != "found" for m in table.measurements)
    assert {"mape_percent", "p95_percent", "kendall_tau", "visits_apart_percent"} <= set(done["validation"]["decode"])
    assert png.read_bytes().startswith(b"\x89PNG")

    shown = json.loads(merino("show", out, "--json").stdout)
    assert shown["kind"] == "latency_table" and shown["validation"] == table.validation and shown["finished"]
    text = merino("show", out).stdout
    assert "measured" in text and "int8" in text and "MAPE" in text
    assert table.verdict is not None and done["verdict"] == shown["verdict"] == table.verdict.to_dict()
    assert f"verdict: {table.verdict.word}" in text
    assert merino("profile", "--continue", "--exit-zero", "--out", out).stdout.strip() == str(
        out
    )  # nothing is left to measure; the space comes from its header
    assert load_table(out).measurements == table.measurements
    refused(*arguments, "--out", out, code=6, says="exists; finish it with --continue")
    refused("profile", "--continue", "--threads", 2, "--out", out, code=2, says="another threads")


def test_a_table_that_is_not_to_be_used_says_so_wherever_it_is_used(
    space_file: Path, profiled: Path, tmp_path: Path
) -> None:
    """Its held-out models are told to have taken ten times as long; the table stays, and it is marked."""
    out = Path(shutil.copy(profiled / "t.jsonl", tmp_path))
    lines = []
    for line in out.read_text().splitlines()[:-1]:  # without its conclusion
        body = json.loads(line)
        if body.get("what") == "faces":
            continue
        if body.get("what") == "model" and "chosen_by" not in body:
            body["samples"] = [10 * ms for ms in body["samples"]]
            line = add_checksum({name: value for name, value in body.items() if name != "sha256"})
        lines.append(line)
    out.write_text("\n".join(lines) + "\n")
    says = r"is not to be used: decode is \d+.\d % off on average, beyond 15 %.*; end other programs, then: rm "
    stopped = merino("profile", "--continue", "--out", out, code=9)
    assert re.search(says, stopped.stderr.splitlines()[-1]) and stopped.stdout.strip() == str(out)
    assert merino("profile", "--continue", "--exit-zero", "--out", out).stdout.strip() == str(out)
    found = merino("search", "--space", space_file, "--table", out, "--decode-ms", 1000, "--out", tmp_path / "a.json")
    assert "warning: the verdict on table t.jsonl is do not use: decode is" in " ".join(found.stderr.split())
    front = merino("pareto", "--space", space_file, "--table", out, "--points", 2, "--out", tmp_path / "f.json")
    assert "warning: the verdict on table t.jsonl is do not use" in " ".join(front.stderr.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--like", "full.jsonl", "--space", "demo"), "--like takes space and lengths from the full table"),
        (("--like", "full.jsonl", "--share", 1.5), "--share is 1.5; give a number between 0 and 1"),
        (("--share", 0.2), "--share says how much of a full table is measured; add: --like FULL.jsonl"),
        (("--like", "bad.jsonl"), "the verdict on bad.jsonl is do not use"),
        (("--like", "short.jsonl"), "short.jsonl is itself transferred from full.jsonl; give a full table"),
        (("--also", "opt-126m"), "there is no preset 'opt-126m'"),
    ],
)
def test_a_table_that_cannot_be_followed_is_refused(tmp_path: Path, options: tuple[object, ...], says: str) -> None:
    off = {"what": "validation", "decode": {"mape_percent": 99.0}, "prefill": {}}
    (tmp_path / "full.jsonl").write_text(table_text())
    (tmp_path / "bad.jsonl").write_text(table_text(finished=False, estimated=False) + add_checksum(off) + "\n")
    source = {"from": "full.jsonl", "sha256": "", "device": "a", "precision": "fp32", "estimated": False}
    source |= {"measured": 1, "entries": 2}
    (tmp_path / "short.jsonl").write_text(table_text(transferred=source))
    done = subprocess.run(
        [warm_merino(), "profile", *map(str, options), "--out", "t.jsonl"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "t.jsonl").exists()


def test_ctrl_c_says_how_to_go_on(space_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    command = [warm_merino(), "profile", "--space", str(space_file), "--threads", "1", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out.exists() and '"samples"' in out.read_text()):  # the first batch is measured
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)  # the profile needs the processor
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not stdout
    assert f"merino-edge profile --continue --out {out}" in stderr and "Traceback" not in stderr
    shown = json.loads(merino("show", out, "--json").stdout)
    assert not shown["finished"] and shown["entries"]
    assert "unfinished" in merino("show", out).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--device", "orin"), 8, "unknown backend 'orin'; choose one of onnxruntime-cpu"),
        (("--precision", "fp8"), 2, "there is no precision 'fp8'; choose one of fp32, fp16, int8, int4"),
        (("--threads", 0), 2, "threads is 0"),
        (("--space", "papper"), 2, "papper"),
    ],
)
def test_profile_refuses_in_one_line(tmp_path: Path, arguments: tuple[object, ...], code: int, says: str) -> None:
    refused("profile", *arguments, "--out", tmp_path / "t.jsonl", code=code, says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"), [("a.json", "architecture"), ("checkpoint", "checkpoint"), ("bundle", "bundle")]
)
def test_show_tells_an_artefact_by_its_content(folder: Path, name: str, kind: str) -> None:
    shown = json.loads(merino("show", folder / name, "--json").stdout)
    assert shown["kind"] == kind and shown["architecture"] == TINY.to_dict()
    assert shown["counts"]["parameters"] == TINY.parameters
    text = merino("show", folder / name).stdout
    assert kind in text and "shared" in text and TINY.id in text
    assert "\x1b" not in text  # the text of an artefact cannot steer the terminal


def test_show_prints_no_heads_of_a_convolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (Block(32, 2, 2, 1, 48, convolution=3), *TINY.blocks)
    architecture.save(tmp_path / "a.json", dataclasses.replace(TINY, blocks=blocks))
    show.show(tmp_path / "a.json")
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "32", "2", "-", "-", "48", "own", "3"],
        ["1", "32", "2", "2", "1", "48", "shared", "-"],
    ]


def test_show_lists_the_engines_of_a_bundle_and_where_they_lie(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engine_store.VARIABLE, str(tmp_path / "store"))
    loaded = bundle.load(shutil.copytree(folder / "bundle", tmp_path / "bundle"))
    entry = {"library": "tensorrt", "version": "10.3.0", "capability": "SM87", "context": 16, "bytes": 6}
    loaded = bundle.add_engine(loaded, b"inside", {**entry, "capability": "SM86", "machine": None}, lambda old: False)
    stored = engine_store.add_stored(tmp_path / "store", loaded.graph_sha256(16), b"stored", entry)
    engine_store.add_stored(tmp_path / "store", "0" * 64, b"others", entry)  # of another graph
    shown = json.loads(merino("show", loaded.path, "--json").stdout)
    assert [engine["file"] for engine in shown["engines"]] == [loaded.engines[0]["file"]]
    assert [engine["file"] for engine in shown["stored_engines"]] == [str(stored.path)]
    lines = [line for line in merino("show", loaded.path).stdout.splitlines() if line.startswith("engine ")]
    assert [line.split(": ")[0] for line in lines] == [f"engine {loaded.engines[0]['file']}", f"engine {stored.path}"]
    assert "tensorrt 10.3.0 for SM87, 16 positions" in lines[1]


def test_show_explains_a_space(space_file: Path) -> None:
    assert json.loads(merino("show", space_file, "--json").stdout)["size"] == 8
    assert "space tiny (8 architectures)" in merino("show", space_file).stdout


def test_show_explains_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny_stories(seed=3, stories=20))
    merino("tokenize", tmp_path / "text.txt", "--vocab", 300, "--out", tmp_path / "corpus")
    shown = json.loads(merino("show", tmp_path / "corpus", "--json").stdout)
    assert (shown["kind"], shown["vocab_size"], shown["sources"]) == ("corpus", 300, ["text.txt"])
    assert f"{shown['tokens']}" in merino("show", tmp_path / "corpus").stdout
    header = tmp_path / "corpus" / "corpus.json"
    header.write_text(header.read_text().replace("300", "301"))
    refused("show", tmp_path / "corpus", code=3, says="does not match its own sha256")


def test_show_knows_the_versions_that_are_written() -> None:
    written_now = {m.KIND: m.SCHEMA_VERSION for m in (corpus_writer, study_runs, teacher_logits, synthetic_corpus)}
    assert written_now == {kind: newest for kind, (newest, *_) in show.HEADERS.items()}


def test_show_refuses_what_is_no_artefact(folder: Path, tmp_path: Path) -> None:
    refused("show", tmp_path / "nothing", code=3, says="does not exist")
    refused("show", tmp_path, code=3, says="it has no kind); known: latency_table, architecture")
    for text in (
        "",
        "hello",
        "[1]",
        '{"kind": ["a"]}',
        '{"kind": "poem"}\n{}',
        "{" * 99_999,
        '{"kind": "latency_table"}',
    ):
        (tmp_path / "file").write_text(text)
        refused("show", tmp_path / "file", code=3, says=str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    refused("show", tmp_path / "file", code=3, says="not UTF-8")
    for name, kind in (("config.json", "note"), ("state.json", "training-state")):  # as in CHECKPOINT/state
        other = tmp_path / kind
        other.mkdir()
        (other / name).write_text(f'{{"kind": "{kind}", "schema_version": 1}}')
        refused("show", other, code=3, says="it has no kind); known: latency_table, architecture")
    demo = looks_like("demo_state", tmp_path)
    for path in (demo, demo / "state.json"):
        refused("show", path, code=3, says=f"(its kind is 'demo_state'); run: merino-edge demo --out {demo}")
    (tmp_path / "a.json").write_text((folder / "a.json").read_text().replace("12.5", "13.5"))
    refused("show", tmp_path / "a.json", code=3, says="does not match its own sha256")


def test_doctor_describes_this_machine() -> None:
    found = json.loads(merino("doctor", "--json").stdout)
    assert found["packages"]["numpy"] and found["device"]["cores"] == os.cpu_count()
    assert found["verbs"]["search"] == {"ok": True, "missing": [], "fix": None}
    text = merino("doctor").stdout
    assert f"numpy {found['packages']['numpy']}" in text and all(verb in text for verb in found["verbs"])
