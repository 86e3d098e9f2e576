"""Perplexity of a text equals what PyTorch computes in the same windows, and each token is scored once."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.random_model import random_model
from merino_edge import checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.cli.main import main
from merino_edge.data.bpe import END_OF_TEXT_ID, chat_format, train_tokenizer
from merino_edge.errors import InputError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.pytorch.model import Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tokenizer import ChatFormat, Tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from merino_edge.runtime.evaluation.harness import ROWS, EngineLM
from merino_edge.runtime.evaluation.perplexity import (
    UNITS,
    differences,
    perplexity,
    read_text,
    window_and_stride,
    windows,
)

TEXT = "The fox ran over the hill, and the hedgehog said: naïve!\n\nNobody knew why 17 owls had come.  \n" * 6
BACKEND = train_tokenizer(iter([TEXT[:40]]), 300)
IDS = BACKEND.encode(TEXT).ids
CONTEXT = 48
A = Architecture(
    300, CONTEXT, 64, 16, (Block(64, 2, 4, 2, 48),), norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=16,
    bias="none",
)  # fmt: skip
WEIGHTS = random_model(A)
TOKENIZER = Tokenizer(BACKEND, chat_format())


def nothing(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module", params=["pytorch", "onnxruntime"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "pytorch":
        engine: Any = TorchEngine(Model.from_weights(A, WEIGHTS))
    else:
        graph = to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT, "onnxruntime", lowering="ort"))
        engine = OnnxEngine(graph, A, CONTEXT, threads=1)
    with closing(engine):
        yield engine


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def by_pytorch(model: Model, ids: list[int], before: int, window: int, stride: int) -> list[list[float]]:
    """Each window run whole by the plain module: [sum of log p, tokens]."""
    line, per_window, start = [before, *ids], [], 0
    while start < len(ids):
        end = min(len(ids), start + (stride if start else window))
        with torch.no_grad():
            log_p = model(torch.tensor([line[max(0, end - window) : end]]))[0].double().log_softmax(-1)  # [T, V]
        scored = torch.tensor(ids[start:end])
        per_window.append([float(log_p[-len(scored) :].gather(1, scored[:, None]).sum()), len(scored)])
        start = end
    return per_window


@pytest.mark.parametrize(("window", "stride"), [(None, None), (CONTEXT, CONTEXT), (32, 5), (32, 32), (7, 2), (1, 1)])
def test_values_are_those_of_pytorch_in_the_same_windows(
    engine: Any, file: Path, window: int | None, stride: int | None
) -> None:
    entry = perplexity(file, engine, TOKENIZER, window=window, stride=stride, on_step=nothing)
    size, step = entry["window"], entry["stride"]
    assert (size, step) == (window or CONTEXT, stride or CONTEXT // 2)
    expected = by_pytorch(Model.from_weights(A, WEIGHTS), IDS, END_OF_TEXT_ID, size, step)
    np.testing.assert_allclose(entry["per_window"], expected, rtol=1e-5)
    nats = -sum(total for total, _ in expected)
    assert (entry["tokens"], entry["words"], entry["bytes"]) == (len(IDS), len(TEXT.split()), len(TEXT.encode()))
    for metric, value in {
        "token_perplexity": math.exp(nats / len(IDS)),
        "word_perplexity": math.exp(nats / len(TEXT.split())),
        "bits_per_byte": nats / len(TEXT.encode()) / math.log(2),
    }.items():
        assert entry["metrics"][metric]["value"] == pytest.approx(value, rel=1e-4)
        assert entry["metrics"][metric]["stderr"] > 0


def test_a_stride_of_the_context_is_the_harnesss_rolling_log_likelihood(engine: Any, file: Path) -> None:
    entry = perplexity(file, engine, TOKENIZER, window=None, stride=CONTEXT, on_step=nothing)
    rolling = EngineLM(engine, TOKENIZER, nothing).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    )
    assert sum(total for total, _ in entry["per_window"]) == pytest.approx(rolling[0], rel=1e-9)


def test_a_window_of_several_steps_is_scored_the_same(tmp_path: Path, file: Path) -> None:
    a = dataclasses.replace(A, max_positions=2 * ROWS + 9)
    model = Model.from_weights(a, WEIGHTS)
    expected = by_pytorch(model, IDS, END_OF_TEXT_ID, a.max_positions, ROWS + 3)
    entry = perplexity(file, TorchEngine(model), TOKENIZER, window=None, stride=ROWS + 3, on_step=nothing)
    np.testing.assert_allclose(entry["per_window"], expected, rtol=1e-5)
    assert entry["per_window"][0][1] > ROWS


@given(count=st.integers(1, 90), window=st.integers(1, 20), data=st.data())
def test_each_token_is_scored_once_with_the_longest_context_that_fits(
    count: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    ids, at = list(range(1, count + 1)), 0
    for number, (context_ids, scored) in enumerate(windows(ids, 0, window, stride)):
        assert scored == ids[at : at + len(scored)]
        assert (
            context_ids == [0, *ids][at + 1 - len(context_ids) : at + 1]
        )  # the tokens directly before the scored ones
        assert len(context_ids) + len(scored) == (min(window, count) + 1 if number == 0 else window + 1)
        assert len(context_ids) == 1 if number == 0 else len(context_ids) >= window - stride + 1
        at += len(scored)
    assert at == count


@given(windows_of_text=st.integers(1, 6), window=st.integers(1, 20))
def test_a_stride_of_the_window_is_disjoint_windows(windows_of_text: int, window: int) -> None:
    ids = list(range(1, windows_of_text * window + 1))
    disjoint = [([start], ids[start : start + window]) for start in range(0, len(ids), window)]
    assert list(windows(ids, 0, window, window)) == disjoint


def test_a_compressed_text_is_the_same_text(engine: Any, file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert read_text(packed) == TEXT
    plain, unpacked = (
        perplexity(path, engine, TOKENIZER, window=40, stride=20, on_step=nothing) for path in (file, packed)
    )
    for key in ("text_sha256", "bytes", "words", "tokens", "window", "stride"):
        assert plain[key] == unpacked[key]
    np.testing.assert_allclose(plain["per_window"], unpacked["per_window"], rtol=1e-6)


def test_the_bos_token_comes_first_and_is_not_scored(file: Path) -> None:
    model = Model.from_weights(A, WEIGHTS)
    tokenizer = Tokenizer(BACKEND, ChatFormat((2,), 1))
    entry = perplexity(file, TorchEngine(model), tokenizer, window=32, stride=16, on_step=nothing)
    assert entry["tokens"] == len(IDS)
    np.testing.assert_allclose(entry["per_window"], by_pytorch(model, IDS, 1, 32, 16), rtol=1e-5)


# --- comparing -------------------------------------------------------------------------------------


def _report(shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    per_window = [[-50.0 - 7 * (n % 3) - shift, 20] for n in range(30)]
    entry = {"text_sha256": "t", "stride": 20, "window": 20, "tokens": 600, "words": 400, "bytes": 2400}
    return {"perplexity": {**entry, "per_window": per_window, **changes}}


def test_two_reports_of_one_text_and_stride_are_compared_window_by_window() -> None:
    same = differences(_report(), _report())
    assert [row["metric"] for row in same] == list(UNITS)
    assert [(row["difference"], row["low"], row["high"]) for row in same] == [(0, 0, 0)] * 3
    worse = differences(_report(1.0), _report())
    assert worse[2]["difference"] == pytest.approx(30 / 2400 / math.log(2))
    assert all(0 < row["low"] <= row["difference"] <= row["high"] for row in worse)
    for other in ({"text_sha256": "u"}, {"stride": 10}):
        assert differences(_report(), _report(**other)) == []
    assert differences(_report(), {"tasks": {}}) == differences({"tasks": {}}, _report()) == []


def test_other_windows_have_no_interval_and_other_tokenizers_no_value_per_token() -> None:
    one = _report(window=600, per_window=[[-1710.0, 600]])
    assert [(row["difference"], row["low"]) for row in differences(one, _report())] == [
        (pytest.approx(0), None)
    ] * 3  # fmt: skip
    fewer = _report(tokens=450, per_window=[[-57.0, 15]] * 30)
    rows = differences(fewer, _report())
    assert [row["metric"] for row in rows] == ["word_perplexity", "bits_per_byte"]
    assert [row["difference"] for row in rows] == [pytest.approx(0)] * 2


# --- refusals and the command ----------------------------------------------------------------------


def test_windows_and_strides_are_refused_with_their_bounds() -> None:
    assert (window_and_stride(48, None, None), window_and_stride(48, 10, None), window_and_stride(1, None, None)) == (
        (48, 24),
        (10, 5),
        (1, 1),
    )
    for window, stride, word in ((49, None, "window is 49"), (0, None, "window is 0"), (8, 9, "stride is 9")):
        with pytest.raises(InputError, match=word):
            window_and_stride(48, window, stride)


def test_a_token_that_the_model_cannot_generate_is_refused(file: Path) -> None:
    class Silent(TorchEngine):
        def forward_rows(self, tokens: Any, start: int, rows: int) -> Any:
            logits = super().forward_rows(tokens, start, rows)
            logits[:, IDS[3]] = -np.inf
            return logits

    with pytest.raises(InputError, match=r"cannot generate; .*--keep-vocab"):
        perplexity(file, Silent(Model.from_weights(A, WEIGHTS)), TOKENIZER, window=None, stride=None, on_step=nothing)


def test_the_command_reports_compares_and_refuses(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MERINO_DATA", raising=False)
    ckpt, report = tmp_path / "ckpt", tmp_path / "report.json"
    checkpoint.save(
        ckpt, A, WEIGHTS, tokenizer_json=str(BACKEND.to_str()), chat=chat_format(), training={"source": "random"}
    )

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["merino-edge", "evaluate", str(ckpt), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    text = ("--perplexity", file, "--threads", 1)
    code, out, _ = run(*text, "--out", report)
    assert code == 0 and out.count("\n") == 1 and out.startswith("perplexity     token_perplexity")
    assert f"text.txt: {len(IDS)} tokens, windows of {CONTEXT}, stride {CONTEXT // 2}" in out
    written = json.loads(report.read_text())
    assert written["tasks"] == {} and written["perplexity"]["stride"] == CONTEXT // 2
    code, out, _ = run(*text, "--against", report, "--json")
    assert [row["difference"] for row in json.loads(out)["comparison"]] == [0, 0, 0]
    assert run(*text, "--against", report)[1].count("+0.00") == 9
    assert run(*text, "--window", 40, "--stride", CONTEXT // 2, "--against", report)[1].count("no interval") == 3
    assert "has none of these" in run(*text, "--stride", 9, "--against", report)[2]
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "torn.xz").write_bytes(lzma.compress(TEXT.encode())[:60])
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    for refused, expected in (
        (("--perplexity", tmp_path / "none"), "cannot read"),
        (("--perplexity", tmp_path), "cannot read"),
        (("--perplexity", tmp_path / "empty"), "has no words"),
        (("--perplexity", tmp_path / "torn.xz"), "is not a text"),
        (("--perplexity", tmp_path / "picture"), "is not a text"),
        ((*text, "--window", CONTEXT + 1), "window is 49"),
        ((*text, "--stride", 0), "stride is 0"),
        (("--stride", 4), "--perplexity FILE"),
        ((*text, "--tasks", "rte"), "MERINO_DATA"),
    ):
        code, out, err = run(*refused)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert expected in err
