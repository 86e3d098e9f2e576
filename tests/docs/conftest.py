"""What pages suppose to stand in a reader's folder. All of it is small, so that a page runs in seconds."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.evaluation_sets import write_sets
from helpers.small_bundle import Weights, lively_weights
from merino_edge import architecture, bundle, checkpoint
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.export.graph import build_model, to_bytes

VOCAB_SIZE = 320


@pytest.fixture(scope="session")
def edge_table(merino: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency table of the space `edge` at int4: estimated, in place of the one that a board measures."""
    path = tmp_path_factory.mktemp("edge") / "board.jsonl"
    options = [
        "--board",
        "orin-nano-8gb",
        "--mode",
        "25W",
        "--space",
        "edge",
        "--precision",
        "int4",
        "--out",
        str(path),
    ]
    subprocess.run([*merino, "estimate", *options], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def long_bundle(make_bundle: Callable[..., Path], small_model: tuple[Architecture, Weights]) -> Path:
    """A small bundle with room for a prompt of 512 tokens and more."""
    return make_bundle(small_model[1], context=1024)


@pytest.fixture(scope="session")
def corpus_txt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(tiny_stories(stories=100))
    return path


@pytest.fixture(scope="session")
def talk_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, one a line."""
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    lines = []
    for number, story in enumerate(tiny_stories(stories=60).split("\n")):
        messages = [{"role": "user", "content": f"Story {number}?"}, {"role": "assistant", "content": story or "No."}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_model: tuple[Architecture, Weights]) -> Checkpoint:
    """Random weights in layers that are all alike, with a tokenizer of stories and a chat template."""
    path = tmp_path_factory.mktemp("plain") / "checkpoint"
    tokenizer = train_tokenizer(iter([tiny_stories(stories=100)]), VOCAB_SIZE)
    a = replace(small_model[0], vocab_size=VOCAB_SIZE)
    checkpoint.save(
        path,
        a,
        lively_weights(a),
        tokenizer_json=tokenizer.to_str(),
        chat=chat_format(),
        training={"source": "random"},
    )
    return checkpoint.load(path)


@pytest.fixture(scope="session")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory, plain_checkpoint: Checkpoint) -> Path:
    """`plain_checkpoint` at fp32, as an export would write it."""
    folder, a = tmp_path_factory.mktemp("plain-bundle"), plain_checkpoint.architecture
    (folder / "model.onnx").write_bytes(to_bytes(build_model(a, plain_checkpoint.weights, "fp32", a.max_positions)))
    for name in ("tokenizer.json", "chat.json"):
        shutil.copy(plain_checkpoint.path / name, folder)
    bundle.write_manifest(folder, a, "fp32", "onnxruntime", a.max_positions)
    return folder


@pytest.fixture(scope="session")
def model_json(tmp_path_factory: pytest.TempPathFactory, plain_checkpoint: Checkpoint) -> Path:
    """The architecture of `plain_checkpoint`, as a search would write it."""
    path = tmp_path_factory.mktemp("model") / "model.json"
    architecture.save(path, plain_checkpoint.architecture)
    return path


@pytest.fixture(scope="session")
def evaluation_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of evaluation sets that MERINO_DATA names."""
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def text_xz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt.xz"
    path.write_bytes(lzma.compress(tiny_stories(stories=4).encode()))
    return path
