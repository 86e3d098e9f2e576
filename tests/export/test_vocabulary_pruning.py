"""A pruned head gives the logits of its tokens unchanged, and never says another token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from helpers.random_model import random_model
from helpers.tiny_checkpoint import TINY
from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.counts import PRECISIONS
from merino_edge.errors import InputError
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.parity import TEXT
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.export.vocabulary_pruning import pruned_vocab
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

KEPT = np.array([0, 3, 4, 17, 100, 101, 250, 299])
UNTIED = dataclasses.replace(TINY, tied_head=False)


def test_a_text_keeps_its_tokens_and_every_byte_and_every_special_token(tiny_checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint.path)
    word = next(token for token in tokenizer.encode(TEXT) if len(tokenizer.decode([token])) > 2)
    token_ids = pruned_vocab(tokenizer, iter([tokenizer.decode([word])]), TINY.vocab_size)
    assert word in token_ids and (np.diff(token_ids) > 0).all()
    special = [token for token in range(TINY.vocab_size) if token in tokenizer.backend.get_added_tokens_decoder()]
    assert set(special) | set(tokenizer.chat.eos_token_ids) <= set(token_ids)
    assert len(token_ids) < TINY.vocab_size
    anything = "žluťoučký 🐏\x00"  # no token of it is a word of the text
    spelled = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    spelled.model = tokenizers.models.BPE(
        vocab={token: i for token, i in tokenizer.backend.get_vocab().items() if i in set(token_ids)}, merges=[]
    )
    assert spelled.decode(spelled.encode(anything).ids) == anything


def test_a_text_without_text_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="empty"):
        pruned_vocab(Tokenizer.load(tiny_checkpoint.path), iter([""]), TINY.vocab_size)


@pytest.mark.parametrize("a", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pruned_logits_are_those_of_the_full_head(a: Architecture, precision: str, lowering: str) -> None:
    target, weights = Target.named("onnxruntime", precision, lowering), random_model(a)
    tokens = np.array([5, 200, 7, 8])
    stored = store(a, weights, target)
    full, pruned = (
        OnnxEngine(to_bytes(build_stored(a, form, target, 32)), a, 32, 1).forward(tokens, 0)
        for form in (stored, stored.with_pruned_vocab(KEPT))
    )
    assert pruned.shape == full.shape and (np.delete(pruned, KEPT) == -np.inf).all()
    np.testing.assert_allclose(pruned[KEPT], full[KEPT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("a", [TINY, UNTIED], ids=["tied", "untied"])
def test_it_compiles(a: Architecture, precision: str) -> None:
    pytest.importorskip(tensorrt_library.RTX)
    target = Target.named("rtx", precision)
    model = build_stored(a, store(a, random_model(a), target).with_pruned_vocab(KEPT), target, 32)
    assert build_engine(tensorrt_library.RTX, to_bytes(model), 32, "SM86").plan


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "kept.txt"
    path.write_text(TEXT[:300])
    return path


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_an_exported_bundle_says_only_what_was_kept(
    tiny_checkpoint: Checkpoint, tmp_path: Path, text: Path, precision: str
) -> None:
    target, out = Target.named("onnxruntime", precision), tmp_path / "b"
    bundle = write_bundle(
        tiny_checkpoint,
        out,
        ExportOptions(target, 160, keep_vocab=text),
        lambda graph, n: OnnxEngine(graph, TINY, n, 1),
    )
    vocabulary = bundle.manifest["vocabulary"]
    assert 256 < vocabulary["kept"] < vocabulary["of"] == TINY.vocab_size and vocabulary["decode_ms"] > 0
    checks = {check["check"]: check["value"] for check in bundle.manifest["parity"]}
    assert checks["left_out_kl"] > 0
    assert sorted(p.name for p in out.iterdir()) == sorted([*bundle.manifest["files"], "manifest.json"])
    engine, tokenizer, _ = open_engine(out)
    token_ids = set(pruned_vocab(tokenizer, iter([TEXT[:300]]), TINY.vocab_size))
    session = Session(engine)
    said = [
        token
        for seed in range(8)
        for token in token_ids_of(
            generate(session, tokenizer, tokenizer.encode("The"), Sampling(2.0, 0, 1.0, seed=seed), 60)
        )
    ]
    assert len(set(said)) > 50 and set(said) <= token_ids


def token_ids_of(generation: Iterator[str]) -> list[int]:
    for _ in generation:
        pass
    return generation.tokens  # type: ignore[attr-defined, no-any-return]
