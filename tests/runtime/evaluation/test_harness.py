"""An engine gives the harness the same scores as the harness's own Hugging Face backend, item by item."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation_sets import write_sets
from helpers.one_row_graph import one_row
from helpers.same_engine import SameEngine
from merino_edge import checkpoint
from merino_edge.cli.main import main
from merino_edge.convert.import_model import import_model
from merino_edge.data.bpe import END_OF_TEXT, END_OF_TEXT_ID, train_tokenizer
from merino_edge.errors import InputError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.pytorch.model import Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tokenizer import Tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from merino_edge.runtime.evaluation import harness
from merino_edge.runtime.evaluation.harness import EngineLM, differences, resampled, value_of
from merino_edge.runtime.evaluation.tasks import MERINO14, harness_task, parse_task_names

POSITIONS = 48  # fewer than most prompts of the sets have


def nothing(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A Llama of random weights with a byte-level tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("pretrained")
    backend = train_tokenizer((file.read_text() for file in sorted(data.rglob("*.jsonl"))), 400)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=POSITIONS,
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def imported(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_model(pretrained, path)
    return path


@pytest.fixture(scope="session", params=["pytorch", "onnxruntime", "one row"])
def model(request: pytest.FixtureRequest, imported: Path) -> Any:
    """The harness's model over each engine. `one row` is a graph that returns one row of logits, as older bundles."""
    source = checkpoint.load(imported)
    a, weights = source.architecture, source.weights
    if request.param == "pytorch":
        engine: Any = TorchEngine(Model.from_weights(a, weights))
    else:
        lowering = "ort" if request.param == "onnxruntime" else "native"
        graph = to_bytes(build_model(a, weights, "fp32", POSITIONS, "onnxruntime", lowering=lowering))
        graph = one_row(graph) if request.param == "one row" else graph
        engine = OnnxEngine(graph, a, POSITIONS, threads=1)
    with closing(engine):
        yield EngineLM(engine, Tokenizer.load(imported), nothing)


@pytest.fixture(scope="session")
def reference(pretrained: Path) -> Any:
    pretrained_model = transformers.LlamaForCausalLM.from_pretrained(pretrained).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(pretrained)
    return HFLM(pretrained=pretrained_model, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=POSITIONS)


@pytest.mark.parametrize("name", MERINO14)
def test_every_item_scores_as_with_the_harnesss_own_backend(name: str, model: Any, reference: Any, data: Path) -> None:
    result, expected = (
        evaluate(lm, {name: harness_task(name, data)}, bootstrap_iters=0, log_samples=True) for lm in (model, reference)
    )
    ours, theirs = (
        {sample["doc_id"]: sample["filtered_resps"] for sample in outcome["samples"][name]}
        for outcome in (result, expected)
    )
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for item, responses in theirs.items():
        for got, wanted in zip(ours[item], responses, strict=True):
            if isinstance(wanted, tuple):
                assert got[1] == wanted[1]
            np.testing.assert_allclose(np.ravel(got)[0], np.ravel(wanted)[0], rtol=1e-4, atol=1e-3)
    values = {key: value for key, value in expected["results"][name].items() if key.endswith(",none")}
    for key, value in values.items():
        if isinstance(value, float):
            np.testing.assert_allclose(result["results"][name][key], value, rtol=1e-3)


def test_greedy_answers_are_the_harnesss_own(model: Any, reference: Any) -> None:
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text, dict(options)), number)
        for number, text in enumerate(("It rained", "Who " * 60))
    ]
    assert model.generate_until(requests) == reference.generate_until(requests, disable_tqdm=True)


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=70), st.lists(st.integers(0, 9), min_size=1, max_size=40)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_score_does_not_depend_on_earlier_requests(model: Any, pairs: list[tuple[list[int], list[int]]]) -> None:
    together = [model.log_likelihood(*pair) for pair in pairs]
    for pair, (total, greedy) in zip(pairs, together, strict=True):
        fresh = EngineLM(SameEngine(model._session.engine), model._tokenizer, nothing)
        alone, also = fresh.log_likelihood(*pair)
        np.testing.assert_allclose(total, alone, rtol=1e-5, atol=1e-4)
        assert greedy == also


def test_a_continuation_longer_than_the_context_is_refused(model: Any) -> None:
    assert model.log_likelihood([1], [2] * POSITIONS)[0] < 0
    with pytest.raises(InputError, match=f"{POSITIONS + 1} tokens"):
        model.log_likelihood([1], [2] * (POSITIONS + 1))


# --- reports ---


def test_a_report_equals_itself_and_differs_from_a_worse_one() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.5).astype(float).tolist()
    worse = [value * (rng.random() < 0.8) for value in right]
    sums = [[-float(n), int(n)] for n in rng.integers(5, 50, 40)]

    def report(accuracy: list[float], items: str = "same") -> dict[str, Any]:
        per_item = {"acc": accuracy, "word_perplexity": sums}
        return {"tasks": {"rte": {"items_sha256": items, "per_item": per_item}}}

    same = differences(report(right), report(right))
    assert [(row["difference"], row["low"], row["high"]) for row in same] == [(0, 0, 0)] * 2
    assert same[1]["value"] == pytest.approx(np.e)
    row = differences(report(right), report(worse))[0]
    assert 0 < row["low"] < row["difference"] < row["high"] < 0.2
    assert differences(report(right), report(right, "other")) == []


@given(st.lists(st.booleans(), min_size=30, max_size=80))
@settings(max_examples=20, deadline=None)
def test_bootstrap_samples_spread_as_the_formula_says(correct: list[bool]) -> None:
    values = np.array(correct, float)
    assert resampled("acc", values).std() == pytest.approx(values.std() / np.sqrt(len(values)), abs=0.01)
    assert value_of("acc", values) == pytest.approx(values.mean())


# --- sets and the command ---


# The harness splits WikiText-2 into 62 pages: two lines within its 60 articles look like headings.
PUBLISHED = {"pubmedqa": 500, "hellaswag": 10042, "logiqa": 651, "wikitext2": 62, "winogrande": 1267, "boolq": 3270}


@pytest.mark.parametrize(("name", "items"), PUBLISHED.items())
def test_the_real_sets_have_their_published_numbers_of_items(name: str, items: int) -> None:
    if "MERINO_DATA" not in os.environ:
        pytest.skip("needs the sets (MERINO_DATA)")
    assert len(MERINO14[name].read(Path(os.environ["MERINO_DATA"]))) == items


def test_names_of_tasks() -> None:
    assert parse_task_names("rte,merino14") == ["rte", *(name for name in MERINO14 if name != "rte")]
    with pytest.raises(InputError, match="no task 'mmlu'"):
        parse_task_names("rte,mmlu")


def test_the_command_reports_compares_and_refuses(
    imported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MERINO_DATA", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["merino-edge", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    report = tmp_path / "report.json"
    options = (imported, "--data", data, "--tasks", "rte,wikitext2", "--threads", 1)
    code, out, err = run(*options, "--out", report)
    assert code == 0 and "mean accuracy" in out and "word_perplexity" in out and "(4 items" in out
    written = json.loads(report.read_text())
    assert set(written["tasks"]) == {"rte", "wikitext2"} and written["tasks"]["rte"]["items"] == 4
    assert run(*options, "--out", report)[0] == 6
    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_harness", None)  # nothing is left to evaluate
        assert run(*options, "--out", report, "--continue")[0] == 0
    assert json.loads(report.read_text()) == written
    other = shutil.copytree(data, tmp_path / "other")
    items = other / "eval" / "superglue_rte_val.jsonl"
    items.write_text(items.read_text().replace("rain", "snow"))
    again = shutil.copy(report, tmp_path / "again.json")
    assert run(imported, "--data", other, *options[3:], "--out", again, "--continue")[0] == 0
    tasks = json.loads(again.read_text())["tasks"]  # the items of one task are others, so it alone is evaluated again
    assert tasks["wikitext2"] == written["tasks"]["wikitext2"]
    assert tasks["rte"]["items_sha256"] != written["tasks"]["rte"]["items_sha256"]
    code, _, err = run(*options, "--limit", 2, "--out", report, "--continue")
    assert code == 2 and "began with another limit" in err
    code, out, _ = run(*options, "--against", report, "--json", "--limit", 4)
    assert [row["difference"] for row in json.loads(out)["comparison"]] == [0, 0, 0, 0]
    assert run(*options, "--against", report)[1].count("+0.00") == 12
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "superglue_rte_val.jsonl").write_text('{"premise": "It rained."}\n')
    for refused, exit_code, expected in (
        ((imported, "--tasks", "rte"), 2, "set MERINO_DATA"),
        ((imported, "--data", data, "--tasks", "mmlu"), 2, "there is no task 'mmlu'"),
        ((imported, "--data", tmp_path, "--tasks", "boolq"), 2, "cannot read"),
        ((imported, "--data", tmp_path, "--tasks", "rte"), 2, "has another form than its task reads"),
        ((tmp_path, "--data", data), 3, "manifest.json"),
        ((imported, "--data", data, "--limit", 0), 2, "limit is 0"),
        ((imported, "--data", data, "--against", imported / "chat.json"), 3, "chat.json"),
    ):
        code, out, err = run(*refused)
        assert (code, out, err.count("\n")) == (exit_code, "", 1), err
        assert expected in err
