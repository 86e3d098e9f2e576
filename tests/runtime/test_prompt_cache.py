"""Prompt cache files: a loaded cache equals a run prompt, and all other files are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from helpers.fake_driver import FakeDriver
from helpers.small_bundle import Weights
from merino_edge import artefact, bundle
from merino_edge.architecture import Architecture
from merino_edge.cli.main import main
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.engine import CacheEngine, Engine
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.generation import generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then the lazy dog"


@pytest.fixture
def cache_file(engine: Engine, tokenizer: Tokenizer, bundle_path: Path, tmp_path: Path) -> Path:
    session = Session(engine)
    session.prefill(tokenizer.encode(TEXT))
    prompt_cache.save(tmp_path / "cache", session, len(session.ids), bundle.load(bundle_path))
    return tmp_path / "cache"


@pytest.fixture
def other(bundle_path: Path) -> Iterator[Session]:
    """A session of another engine with an empty cache."""
    opened, _, _ = open_engine(bundle_path, threads=1)
    yield Session(opened)
    opened.close()


@pytest.mark.parametrize("more", ["", " sleeps"])
def test_an_answer_from_a_loaded_cache_is_the_one_from_a_run_prompt(
    cache_file: Path, other: Session, engine: Engine, tokenizer: Tokenizer, bundle_path: Path, more: str
) -> None:
    ids, greedy = tokenizer.encode(TEXT + more), Sampling(greedy=True)
    expected = generate(Session(engine), tokenizer, ids, greedy, 30)
    text = "".join(expected)
    assert prompt_cache.load(cache_file, other, bundle.load(bundle_path)) == len(tokenizer.encode(TEXT))
    generation = generate(other, tokenizer, ids, greedy, 30)
    assert "".join(generation) == text and generation.tokens == expected.tokens
    assert generation.statistics.reused_tokens >= len(tokenizer.encode(TEXT)) - 2


def test_a_cache_longer_than_the_first_bucket_is_saved_too(
    other: Session, engine: Engine, bundle_path: Path, tmp_path: Path
) -> None:
    ids = np.random.default_rng(0).integers(engine.vocab_size, size=300).tolist()
    session, opened = Session(engine), bundle.load(bundle_path)
    expected = session.prefill(ids)
    assert expected is not None
    expected = expected.copy()
    prompt_cache.save(tmp_path / "long", session, 300, opened)
    assert prompt_cache.load(tmp_path / "long", other, opened) == 300
    got = other.prefill(ids)
    assert got is not None
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["native", "primitive"])
def test_tensorrt_and_onnx_runtime_read_each_others_files(
    gpu: FakeDriver, small_model: tuple[Architecture, Weights], bundle_path: Path, tmp_path: Path, lowering: str
) -> None:
    """The graph of a bundle for TensorRT, on TensorRT over the strict driver and on a CPU."""
    (a, weights), target = small_model, Target.named("rtx", "fp16", lowering)
    stored = store(a, weights, target)
    graphs = {count: to_bytes(build_stored(a, stored, target, a.max_positions, count)) for count in (64, 150, 320)}
    opened, ids = bundle.load(bundle_path), np.random.default_rng(0).integers(a.vocab_size, size=200).tolist()
    engines: dict[str, Callable[[], CacheEngine]] = {
        "tensorrt": lambda: TensorRtEngine("any", graphs, a),
        "cpu": lambda: OnnxEngine(graphs[320], a, 320, 1),
    }
    files, logits = {}, []
    for name, open_one in engines.items():
        with closing(open_one()) as engine:
            session = Session(engine)
            session.prefill(ids[:-20])
            logits.append(np.copy(session.prefill(ids)))
            prompt_cache.save(tmp_path / name, session, 180, opened)
            files[name] = engine.read_cache(180)
    for ours, theirs in zip(*files.values(), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0, atol=0.02)
    for name, reader in itertools.product(files, engines):
        with closing(engines[reader]()) as engine:
            session = Session(engine)
            assert prompt_cache.load(tmp_path / name, session, opened) == 180
            for written, read in zip(files[name], engine.read_cache(180), strict=True):
                np.testing.assert_array_equal(written, read)
            run = monitored_tokens(engine)
            got = session.prefill(ids)
            assert sum(run) == 200 - engine.prompt_grid
            np.testing.assert_allclose(got, logits[0], rtol=0, atol=0.01 * np.abs(logits[0]).max())


def monitored_tokens(engine: CacheEngine) -> list[int]:
    """The number of tokens of every step that the engine runs from now on."""
    run: list[int] = []
    forward = engine.forward
    engine.forward = lambda tokens, start: (run.append(len(tokens)), forward(tokens, start))[1]  # type: ignore[method-assign]
    return run


def test_an_engine_without_a_readable_cache_is_refused(engine: Engine, bundle_path: Path, tmp_path: Path) -> None:
    class Plain:
        forward, prompt_grid = staticmethod(engine.forward), 4

    session = Session(Plain())  # type: ignore[arg-type]
    session.prefill([1, 2, 3])
    with pytest.raises(UnsupportedError, match="cannot save its cache"):
        prompt_cache.save(tmp_path / "cache", session, 3, bundle.load(bundle_path))
    assert not list(tmp_path.iterdir())


def altered(path: Path, **changes: object) -> None:
    """Change the header and update its hash."""
    line, _, data = path.read_bytes().partition(b"\n")
    own = ("kind", "schema_version", "tool_version", "sha256")
    header = {name: value for name, value in json.loads(line).items() if name not in own} | changes
    stamped = artefact.add_envelope(prompt_cache.KIND, {k: v for k, v in header.items() if v is not None})
    path.write_bytes(artefact.canonical_json(stamped).encode() + b"\n" + data)


HARM: dict[str, Callable[[Path], object]] = {
    "truncated or altered": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "truncated": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "is not a prompt_cache artefact": lambda path: path.write_bytes(b"hello"),
    "not a prompt_cache": lambda path: path.write_bytes(b"\xff" * 5000),
    "another model": lambda path: altered(path, model="0"),
    "another shape": lambda path: altered(path, shapes=[[1, 32]]),
    "caches of another": lambda path: altered(path, dtype="float16"),
    "positions of 320": lambda path: altered(path, tokens=list(range(321))),
    "0 positions": lambda path: altered(path, tokens=[]),
    "is not a prompt cache of": lambda path: altered(path, tokens="abc"),
    "not a prompt cache of merino": lambda path: altered(path, shapes=None),
}


@pytest.mark.parametrize("pattern", HARM)
def test_another_file_is_refused_and_the_session_does_not_change(
    cache_file: Path, other: Session, bundle_path: Path, pattern: str
) -> None:
    HARM[pattern](cache_file)
    with pytest.raises(ArtefactError, match=pattern) as refusal:
        prompt_cache.load(cache_file, other, bundle.load(bundle_path))
    assert "\n" not in str(refusal.value) and other.ids == []


def test_the_verb_saves_a_prompt_and_loads_it(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = []
    for _ in "12":
        options = ["--prompt", "hi there", "--greedy", "--max-tokens", "5", "--threads", "1", "--json"]
        command = ["merino-edge", "generate", str(bundle_path), *options, "--prompt-cache", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0]["text"] == documents[1]["text"]
    reused = [document["statistics"]["reused_tokens"] for document in documents]
    assert reused == [0, (documents[0]["prompt_tokens"] - 1) // 2 * 2]
