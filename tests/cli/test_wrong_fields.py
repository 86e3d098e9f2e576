"""Every kind of artefact with a wrong value in a field, hashed anew: it is read and shown, or refused with a type.

What reads an artefact runs here too: a search from a result, batches of a corpus, a comparison of tables. A change may
be harmless, so what passes is not judged; an error of another type than ours fails the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.linear_table import MODEL, table_text
from helpers.small_spaces import SMALL
from helpers.wrong_values import changes, refusal, write, write_lines
from merino_edge import architecture, artefact, bundle, checkpoint, forms
from merino_edge.cli.show import show
from merino_edge.data import corpus
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.distillation.forms import TeacherLogits, WrittenCorpus
from merino_edge.distillation.prompts import load as load_prompts
from merino_edge.jetson.profiler.comparison import compare
from merino_edge.jetson.profiler.plan import Axes
from merino_edge.latency.measurement import Measurement
from merino_edge.latency.table_file import load_table
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.evaluation.forms import Report
from merino_edge.search import pareto_report, space_file
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import load_space
from merino_edge.search.forms import Front
from merino_edge.search.pareto import pareto_front
from merino_edge.search.reference_models import references
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import parse_score
from merino_edge.training.config import TrainingConfig
from merino_edge.training.forms import State, Study, Trained
from merino_edge.training.recipe import load as load_recipe
from merino_edge.weights import random_weights

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40
SHA256 = "0123456789abcdef" * 4
CHANGES = 80  # of each kind


def shown(path: Path) -> None:
    show(path, as_json=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        show(path)
    assert "\x1b" not in printed.getvalue()  # no text of an artefact steers the terminal
    assert len(printed.getvalue()) < 200_000


def tolerated(use: Callable[[], object]) -> bool:
    """Whether the use refuses with a typed error of one line."""
    line = refusal(use)
    assert "\n" not in line and len(line) < 5_000
    return bool(line)


def check_all(document: dict[str, Any], file: Path, uses: list[Callable[[], object]], seed: int = 0) -> None:
    write(file, document)
    for use in uses:
        use()  # the honest one passes
    refused = 0
    for what, other in changes(document, CHANGES, seed):
        write(file, other)
        for use in uses:
            try:
                refused += tolerated(use)
            except Exception as error:
                raise AssertionError(f"{file.name} with {what}: {type(error).__name__}: {error}") from error
    assert refused  # something was refused, so the values do reach the readers


@pytest.mark.parametrize("kind", [None, ["a"], {"a": 1}, 3, "", "poem", "x" * 100_000])
def test_a_kind_that_is_none_is_not_shown(tmp_path: Path, kind: Any) -> None:
    file = tmp_path / "a.json"
    write(file, {"schema_version": 1, "kind": kind})
    assert "no artefact that can be shown" in refusal(lambda: show(file))


# --- kinds that are one file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def table_lines() -> list[dict[str, Any]]:
    """The lines of a table with everything that a table can have."""
    errors = {"models": 8, "mape_percent": 2.5, "p95_percent": 4.0, "max_percent": 5.0, "bias_percent": -0.5}
    errors |= {"kendall_tau": 0.9, "low_percent": -4.0, "high_percent": 5.0, "visits_apart_percent": 1.0}
    found = {key: value for key, value in errors.items() if key != "visits_apart_percent"}
    verdict = {"word": "usable", "reasons": ["decode is 9.0 % off"]}
    device = {"name": "a board", "power_mode": "MAXN", "compatible": ["nvidia,x"], "gpu": {"sm_count": 8}}
    transferred = {"from": "t.jsonl", "sha256": SHA256, "device": "another", "precision": "fp32", "threads": 1}
    lines = [json.loads(line) for line in table_text().splitlines()][:-1]
    lines[0] |= {"device": device, "backend": "onnxruntime-cpu", "threads": 1, "estimated": False, "minutes": 5.0}
    lines[0] |= {"reference": {"ffn": "relu", "ratio": 4, "decode": 16, "prefill": 16}, "cache_buckets": 16}
    lines[0] |= {"transferred": {**transferred, "estimated": False, "measured": 3, "entries": 9}}
    lines[1] |= {"yardsticks": {"decode warm": 0.3, "decode cold": 0.5}, "visit": 0}
    load = {"of_measured": 0.05, "of_all": 0.02, "busiest": [["make", 0.1]]}
    lines.append({"what": "conditions", "moment": "after", "moved": ["the clock fell"], "other_load": load})
    whole = Measurement("found", "decode", 16, {"architecture": MODEL.to_dict()}, (5.0, 5.1, 5.2), repetition=1)
    lines += [whole.to_line(), dataclasses.replace(whole, repetition=0).to_line()]
    lines.append({"what": "faces", "decode": {"faces": [[0.0, 0.0, 0.1], [0.5, 0.1, 0.0]], "alternatives": [[0, 1]]}})
    both = {"decode": {**errors, "found": found}, "prefill": errors}
    lines.append({"what": "validation", **both, "verdict": verdict})
    return lines


def test_latency_tables(tmp_path: Path, table_lines: list[dict[str, Any]], capsys: Any) -> None:
    honest, file = tmp_path / "honest.jsonl", tmp_path / "t.jsonl"
    write_lines(honest, table_lines)
    like = load_table(honest)

    def used() -> None:
        table = load_table(file)
        assert table.model_ms(MODEL, "decode") >= 0
        compare(table, like)
        Axes.from_header(table.header)
        str((table.warnings, table.winners_curse("decode"), len(table.unstable)))

    write_lines(file, table_lines)
    used()
    shown(file)
    refused = 0
    for number in (0, 0, 0, 1, 2, len(table_lines) // 2, -5, -4, -3, -2, -1, -1):
        for what, other in changes(table_lines[number], CHANGES // 5, number + 40):
            lines = list(table_lines)
            lines[number] = other
            write_lines(file, lines)
            for use in (used, lambda: shown(file)):
                try:
                    refused += tolerated(use)
                except Exception as error:
                    raise AssertionError(f"line {number} with {what}: {type(error).__name__}: {error}") from error
    assert refused > 100


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    path = tmp_path_factory.mktemp("table") / "t.jsonl"
    path.write_text(table_text())
    space = dataclasses.replace(
        SMALL,
        name="linear",
        blocks=(1, 2),
        widths=(32, 64, 128),
        ffn_ratios=(1, 4),
        layers=(1, 2),
        ffn=("relu",),
        embedding_widths=(64,),
        vocabularies=tuple(dataclasses.replace(v, size=100) for v in SMALL.vocabularies),
        contexts=(64,),
        model=MODEL,
    )
    budget = Budget.of({"parameters": 400_000.0})
    return SearchConfig(space, budget, parse_score("effective"), "fp32", load_table(path))


def test_search_results(tmp_path: Path, config: SearchConfig, capsys: Any) -> None:
    result, file = run_search(config), tmp_path / "r.json"
    document = architecture.save(file, result.architecture, **result.document())

    def used() -> None:
        SearchConfig.of(architecture.load(file)[1], "r.json")

    check_all(document, file, [used, lambda: shown(file)])


def test_fronts(tmp_path: Path, config: SearchConfig, capsys: Any) -> None:
    front = pareto_front(config.problem(), Metric.parse("decode_ms"), 4)
    found = references(front.metric, config.score, front.problem.cost_model)
    fields = json.loads(json.dumps(pareto_report.to_document(front, config, found)))
    file = tmp_path / "f.json"

    def paged() -> None:
        document = artefact.read_json(file, "pareto_front", form=Front)
        pareto_report.page(document, tmp_path / "f.html")

    check_all(artefact.add_envelope("pareto_front", fields), file, [lambda: shown(file), paged])
    assert (tmp_path / "f.html").is_file()


def test_spaces(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "s.json"
    document = artefact.add_envelope("space", space_file.to_dict(SMALL), space_file.SCHEMA_VERSION)
    check_all(document, file, [lambda: load_space(str(file)).size, lambda: shown(file)])


def test_architectures(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "a.json"
    by_hand = {"score": {"total": 12.5}, "table": {"name": "t"}, "certificate": {"groups": []}, "space": {"form": {}}}
    document = architecture.save(file, MODEL, **by_hand, more_tables=[{}], engines=[], parity=[], files={"a": "b"})
    check_all(document, file, [lambda: architecture.load(file), lambda: shown(file)])


@pytest.mark.parametrize("name", ["recipe", "prompts"])
def test_handwritten_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / "h.json"
    if name == "recipe":
        fields = {"about": "a", "corpus": ["a.txt"], "vocab_size": 512, "config": {"steps": 5, "precision": "fp32"}}
        check_all(artefact.add_envelope("recipe", fields), file, [lambda: load_recipe(file)])
        return
    group = {"share": 2, "system": "s", "asked": "{prompt} now", "templates": ["{animal} and {animal:2}"]}
    fields = {"groups": [group, {"templates": ["x"]}], "slots": {"animal": ["a", "b"]}, "unwanted": ["c"], "about": "d"}

    def used() -> None:
        prompts = load_prompts(file)
        for i in range(20):
            prompts.prompt(0, i)

    check_all(artefact.add_envelope("prompts", fields), file, [used])


# --- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["text", "conversations"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    if request.param == "text":
        (folder / "a.txt").write_text(TEXT)
    else:
        line = {"messages": [{"role": "user", "content": TEXT[:30]}, {"role": "assistant", "content": TEXT[30:80]}]}
        (folder / "a.jsonl").write_text((json.dumps(line) + "\n") * 60)
    source = folder / ("a.txt" if request.param == "text" else "a.jsonl")
    corpus.prepare([source], 400, folder / "c", shard_tokens=500)
    return folder / "c"


def trained_on(folder: Path) -> None:
    loaded = corpus.load(folder)
    loaded.batch(0, 4, 8)
    loaded.validation(4, 8)


def test_corpora(prepared: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "c"
    shutil.copytree(prepared, folder)
    document = artefact.read_json(folder / "corpus.json", "corpus", 2)
    check_all(document, folder / "corpus.json", [lambda: trained_on(folder), lambda: shown(folder)])
    write(folder / "corpus.json", document)
    record = artefact.add_envelope("verified", {"header_sha256": document["sha256"], "files": {"a": [1, 2]}})
    for what, other in changes(record, 30):
        write(folder / "verified.json", other)
        trained_on(folder)  # a record is a help, not a need
        assert what


def test_shards_that_their_header_vouches_for(prepared: Path, tmp_path: Path) -> None:
    """Other bytes in a shard or a list of conversations, with hashes made anew: never endless, never outside."""
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / f"c{number}"
        shutil.copytree(prepared, folder)
        (folder / "verified.json").unlink(missing_ok=True)
        document = artefact.read_json(folder / "corpus.json", "corpus", 2)
        file = folder / rng.choice(sorted(p.name for p in folder.glob("*.bin")))
        data = np.frombuffer(file.read_bytes(), np.uint8).copy()
        at = int(rng.integers(0, len(data) - 8))
        data[at : at + 8] = rng.choice([0, 1, 127, 255], 8)
        content = data.tobytes() + bytes(8 * int(rng.integers(0, 2)))
        file.write_bytes(content)
        stem, _, which = file.stem.partition("-")
        if which:
            document["shards"][int(which)][f"{stem}_sha256"] = artefact.sha256_bytes(content)
        else:
            document["conversations_sha256"] = artefact.sha256_bytes(content)
        write(folder / "corpus.json", document)
        tolerated(lambda folder=folder: trained_on(folder))


def test_checkpoints(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("safetensors")
    folder, small = tmp_path / "c", dataclasses.replace(MODEL, vocab_size=300)
    tokenizer = train_tokenizer(iter([TEXT]), 300).to_str()
    about = {"source": {"name": "x", "format": "gguf"}, "history": [[1, 2.0]], "validation_loss": 2.0, "engines": []}
    weights = random_weights(small)
    checkpoint.save(folder, small, weights, tokenizer_json=tokenizer, chat=chat_format(), training=about)
    document = artefact.read_json(folder / "training.json", "checkpoint")
    uses = [lambda: checkpoint.load(folder), lambda: shown(folder)]
    check_all(document, folder / "training.json", uses)


def test_bundles(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "lamb"
    shutil.copytree(bundle.PACKAGED / "lamb", folder)
    document = artefact.read_json(folder / "manifest.json", "bundle")
    engine = {
        "library": "tensorrt",
        "version": "10.3",
        "capability": "8.7",
        "context": 512,
        "bytes": 5,
        "file": "chat.json",
    }
    document["engines"] = [{**engine, "machine": {"name": "a", "power_mode": "MAXN"}}]
    document["tunings"] = [{"cpu": "x", "cores": 4, "threads": 2, "spinning": True}]
    check_all(document, folder / "manifest.json", [lambda: bundle.load(folder).card(), lambda: shown(folder)])


# --- documents that other modules read -------------------------------------------------------------


def documents() -> Iterator[tuple[str, dict[str, Any], Callable[[Any], object]]]:
    settings = dataclasses.asdict(TrainingConfig())
    figures = {"validation_loss_before": 3.0, "validation_loss": 2.0, "train_seconds": 5.0, "history": [[1, 3.0]]}
    state = {"file": "step-1.safetensors", "file_sha256": SHA256, "step": 1, "architecture_id": "a", "figures": figures}
    state |= {"corpus_sha256": SHA256, "start_sha256": None, "teacher_sha256": None, "config": settings}

    def resumed(document: Any) -> None:
        forms.check(document, State, "state.json")
        TrainingConfig.of(document["config"], "state.json")

    yield "training state", state, resumed
    study = {"space": None, "architectures": [MODEL.to_dict()], "names": ["a"], "seeds": [0, 1], "config": settings}

    def studied(document: Any) -> None:
        forms.check(document, Study, "study.json")
        shapes = [architecture.Architecture.from_dict(shape) for shape in document["architectures"]]
        TrainingConfig.of(document["config"], "study.json")
        assert [a.id for a in shapes]

    yield "study", {**study, "corpus_sha256": SHA256}, studied
    yield "trained", {"validation_loss": 2.0}, lambda d: f"{forms.read(d, Trained, 'x').validation_loss:.3f}"
    logits = {"teacher_sha256": SHA256, "corpus_sha256": SHA256, "vocab_size": 300, "tokens": 50, "top_k": 8}
    shard = {"tokens": 50, "logs_sha256": SHA256, "ids_sha256": SHA256}
    logits |= {"window": 64, "stride": 32, "batch": 8, "precision": "fp32", "shards": [shard], "finished": True}
    yield "stored logits", logits, lambda d: forms.check(d, TeacherLogits, "logits.json")
    written = {"teacher": {"name": "t"}, "licence": None, "prompts": {}, "options": {}, "batches": 1, "samples": 2}
    written |= {
        "finished": False,
        "dropped": {"empty": 1},
        "kept": 1,
        "tokens": 5,
        "bytes": 9,
        "content_sha256": SHA256,
    }
    yield "written corpus", written, lambda d: forms.check(d, WrittenCorpus, "c.json")
    task = {"items": 2, "items_sha256": SHA256, "per_item": {"acc": [1.0, 0], "word_perplexity": [[-1.5, 3], [-2, 4]]}}
    task |= {"metrics": {"acc": {"value": 0.5, "stderr": None}}}
    of_text = {"text_sha256": SHA256, "stride": 4, "tokens": 9, "words": 5, "bytes": 30, "per_window": [[-3.5, 4]]}
    yield "evaluation", {"tasks": {"ptb": task}, "perplexity": of_text}, lambda d: forms.check(d, Report, "r.json")
    cache = {"model": SHA256, "tokens": [1, 2], "dtype": "float32", "shapes": [[2, 32]], "arrays_sha256": SHA256}

    def line(document: Any) -> object:
        sealed = artefact.add_envelope("prompt_cache", document)
        return prompt_cache._header(json.dumps(sealed).encode(), "p.cache")

    yield "prompt cache", cache, line


@pytest.mark.parametrize(("name", "document", "use"), list(documents()), ids=[name for name, *_ in documents()])
def test_forms(name: str, document: dict[str, Any], use: Callable[[Any], object]) -> None:
    use(document)
    refused = 0
    for what, other in changes(document, 5 * CHANGES):
        try:
            refused += tolerated(lambda other=other: use(other))
        except Exception as error:
            raise AssertionError(f"{name} with {what}: {type(error).__name__}: {error}") from error
    assert refused
