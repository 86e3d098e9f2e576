"""Synthetic corpora: batched equals one by one equals the runtime; a resumed run ends with the same bytes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.architectures import TWO_WIDTHS as A
from helpers.warm_python import warm_merino
from merino_edge import artefact, checkpoint, output
from merino_edge.checkpoint import Checkpoint
from merino_edge.data import bpe
from merino_edge.data.corpus import prepare
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.distillation import prompts, synthetic_corpus
from merino_edge.distillation.synthetic_corpus import Plan, rejection_reason, write
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.batched_generation import BatchedGenerator, SamplingParams, distribution, sample
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.pytorch.model import Model
from merino_edge.runtime import sampling
from merino_edge.runtime.generation import generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

PLAN = Plan(count=70, max_tokens=12, batch=4, seed=3)
ASKED = {
    "kind": "prompts",
    "schema_version": 1,
    "templates": ["Tell me about {animal}.", "Is {animal} as big as {animal:2}?", "Say {word}."],
    "slots": {"animal": ["a cat", "a dog", "an owl", "a small fish"], "word": ["hello", "good night"]},
    "system": "Be brief.",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A teacher with random weights, whose answers differ and end at all lengths."""
    folder = tmp_path_factory.mktemp("teacher") / "c"
    backend = bpe.train_tokenizer([tiny_stories(seed=1, stories=40)], A.vocab_size)
    weights = Model(A, seed=1).to_weights()
    weights["embedding.weight"] *= 20
    chat = bpe.chat_format(conversations=True)
    chat = dataclasses.replace(chat, eos_token_ids=(*chat.eos_token_ids, *range(100, 160)))  # or hardly any would end
    checkpoint.save(folder, A, weights, tokenizer_json=backend.to_str(), chat=chat, training={"source": "test"})
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "asked.json"
    path.write_text(json.dumps(ASKED))
    return path


@pytest.fixture(scope="module")
def uninterrupted(teacher: Checkpoint, asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("uninterrupted") / "c.jsonl"
    assert write(teacher, prompts.load(asked), out, PLAN)["finished"]
    return out


def batched(teacher: Checkpoint) -> BatchedGenerator:
    return BatchedGenerator(Model.from_weights(A, teacher.weights), torch.float32, torch.device("cpu"))


def randoms(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([5, i]) for i in range(count)]


# --- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_greedy_batches_equal_single_answers_and_the_runtimes(teacher: Checkpoint, penalty: float) -> None:
    tokenizer = Tokenizer.load(teacher.path)
    random = np.random.default_rng(0)
    asked = np.concatenate([np.full((24, 3), 7), random.integers(3, 400, (24, 5))], axis=1).tolist()
    ends = [int(token) for token in random.choice(400, 60, replace=False)]  # so many that answers end everywhere
    tokenizer = Tokenizer(tokenizer.backend, dataclasses.replace(tokenizer.chat, eos_token_ids=tuple(ends)))
    model, greedy = batched(teacher), SamplingParams(temperature=0, frequency_penalty=penalty)
    together = model.generate(asked, greedy, max_tokens=20, end_token_ids=ends, generators=randoms(24))
    computed = model.computed_tokens
    alone = [
        model.generate([ids], greedy, max_tokens=20, end_token_ids=ends, generators=randoms(1))[0] for ids in asked
    ]
    assert together == alone and model.computed_tokens == 2 * computed  # of rows that had ended nothing was computed
    engine = TorchEngine(Model.from_weights(A, teacher.weights))
    for ids, answer in zip(asked, together, strict=True):
        how = Sampling(greedy=True, frequency_penalty=penalty)
        by_runtime = generate(Session(engine), tokenizer, ids, how, max_tokens=20)
        list(by_runtime)
        assert tuple(by_runtime.tokens) == answer.ids
        assert answer.ended == (by_runtime.finish_reason == "stop")
    assert len({len(answer.ids) for answer in together}) > 3


def test_a_context_that_is_full_ends_the_answer(teacher: Checkpoint) -> None:
    (answer,) = batched(teacher).generate(
        [[5] * 60], SamplingParams(), max_tokens=100, end_token_ids=(), generators=randoms(1)
    )
    assert (len(answer.ids), answer.ended) == (A.max_positions - 60 + 1, False)
    with pytest.raises(InputError, match="65 tokens"):
        batched(teacher).generate([[5] * 65], SamplingParams(), max_tokens=1, end_token_ids=(), generators=randoms(1))
    with pytest.raises(InputError, match="differ in length"):
        batched(teacher).generate(
            [[5], [5, 6]], SamplingParams(), max_tokens=1, end_token_ids=(), generators=randoms(2)
        )


@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 2999, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.0])
def test_the_distribution_is_the_runtimes(top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) * 3
    logits[3:] = logits[3:].bfloat16().float()  # many ties
    of = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
    found, likely = distribution(logits, SamplingParams(**of))  # type: ignore[arg-type]
    for row in range(len(logits)):
        ids, probabilities = sampling.distribution(logits[row].numpy(), Sampling(**of))  # type: ignore[arg-type]
        expected = np.zeros(3000)
        expected[ids] = probabilities
        ours = np.zeros(3000)
        ours[found[row].numpy()] = likely[row].numpy()
        assert np.abs(ours - expected).max() < 1e-12
        assert ((ours > 0) == (expected > 0)).all()


def test_equal_draws_choose_what_the_runtime_chooses() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(2)) * 2
    of = {"temperature": 0.9, "top_k": 30, "top_p": 0.9}
    sampler, random = sampling.Sampler(Sampling(**of, seed=11)), np.random.default_rng(11)  # type: ignore[arg-type]
    for _ in range(300):
        ours = sample(logits, SamplingParams(**of), torch.tensor([random.random()], dtype=torch.float64))  # type: ignore[arg-type]
        assert int(ours) == sampler(logits[0].numpy(), [])


def test_a_row_draws_the_same_whoever_is_beside_it(teacher: Checkpoint) -> None:
    asked = np.random.default_rng(1).integers(3, 400, (9, 6)).tolist()
    model = batched(teacher)
    together = model.generate(asked, SamplingParams(), max_tokens=10, end_token_ids=(1,), generators=randoms(9))
    others = model.generate(
        [asked[4], asked[1]],
        SamplingParams(),
        max_tokens=10,
        end_token_ids=(1,),
        generators=[randoms(5)[4], randoms(2)[1]],
    )
    assert others == [together[4], together[1]]


# --- the corpus ------------------------------------------------------------------------------------


def test_the_corpus_holds_what_was_asked_and_said(uninterrupted: Path, teacher: Checkpoint, asked: Path) -> None:
    header = artefact.read_json(uninterrupted.with_suffix(".json"), synthetic_corpus.KIND)
    lines = [json.loads(line) for line in uninterrupted.read_text().splitlines()]
    assert header["samples"] == PLAN.count and header["kept"] == len(lines) > 5
    assert header["kept"] + sum(header["dropped"].values()) == PLAN.count and header["dropped"]["cut off"] > 5
    assert header["content_sha256"] == artefact.sha256_file(uninterrupted)
    assert header["teacher"]["checkpoint_sha256"] == teacher.training["sha256"]
    found = prompts.load(asked)
    for line in lines:
        user, assistant = line["messages"]
        assert user == {"role": "user", "content": found.prompt(PLAN.seed, line["sample"]).user}
        assert assistant["role"] == "assistant" and assistant["content"].strip()
    corpus = prepare([uninterrupted], 400, uninterrupted.parent / "corpus")
    assert corpus.header["conversations"] == len(lines)


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_run_cut_short_ends_with_the_same_bytes(
    teacher: Checkpoint, asked: Path, uninterrupted: Path, tmp_path: Path, after: int
) -> None:
    def stop(header: dict[str, Any], computed: int) -> None:
        if header["batches"] == after:
            raise KeyboardInterrupt

    out = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(teacher, prompts.load(asked), out, PLAN, on_batch=stop)
    with open(out, "ab") as file:
        file.write(b'{"messages": [{"role": "us')  # as a kill between two writes leaves it
    write(teacher, prompts.load(asked), out, PLAN)
    assert out.read_bytes() == uninterrupted.read_bytes()
    assert out.with_suffix(".json").read_bytes() == uninterrupted.with_suffix(".json").read_bytes()


def test_other_options_are_not_continued(teacher: Checkpoint, asked: Path, uninterrupted: Path) -> None:
    found, before = prompts.load(asked), uninterrupted.read_bytes()
    for plan, named in (
        (dataclasses.replace(PLAN, seed=4), "seed is 4"),
        (dataclasses.replace(PLAN, count=71), "count is 71"),
        (dataclasses.replace(PLAN, sampling=SamplingParams(0.5)), "temperature is 0.5"),
    ):
        with pytest.raises(InputError, match=named):
            write(teacher, found, uninterrupted, plan)
    other = dataclasses.replace(teacher, training={**teacher.training, "sha256": "0" * 64})
    with pytest.raises(InputError, match="checkpoint_sha256"):
        write(other, found, uninterrupted, PLAN)
    with pytest.raises(InputError, match="licence is MIT"):
        write(teacher, found, uninterrupted, PLAN, licence="MIT")
    assert uninterrupted.read_bytes() == before


def test_a_file_that_is_not_the_headers_is_refused(teacher: Checkpoint, asked: Path, tmp_path: Path) -> None:
    def stop(header: dict[str, Any], computed: int) -> None:
        if header["kept"]:
            raise KeyboardInterrupt

    out = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(teacher, prompts.load(asked), out, PLAN, on_batch=stop)
    out.write_bytes(b"x" + out.read_bytes()[1:])
    with pytest.raises(ArtefactError, match="altered"):
        write(teacher, prompts.load(asked), out, PLAN)
    out.with_suffix(".json").unlink()
    with pytest.raises(OutputError, match="exists"):
        write(teacher, prompts.load(asked), out, PLAN)
    with pytest.raises(OutputError, match=r"\.jsonl"):
        write(teacher, prompts.load(asked), tmp_path / "c.txt", PLAN)


def test_two_at_once_are_refused(
    teacher: Checkpoint, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = tmp_path / "c.jsonl", prompts.load(asked)
    with open(tmp_path / ".c.jsonl.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(output, "PATIENCE_S", 0.0)
        with pytest.raises(OutputError, match=f"being written by process {os.getpid()}"):
            write(teacher, found, out, PLAN)
    assert write(teacher, found, out, PLAN)["finished"]  # whoever was ended holds nothing


def test_plain_prompts_are_continued(teacher: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Once upon\n\nOne day\n")
    plan = dataclasses.replace(PLAN, count=40, plain=True)
    write(teacher, prompts.load(tmp_path / "p.txt"), tmp_path / "c.jsonl", plan)
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert lines and all(line["text"].startswith(["Once upon", "One day"][line["sample"] % 2]) for line in lines)


def test_faults() -> None:
    eight = "one two three four five six seven eight"
    assert rejection_reason(f"{eight} nine.", ended=True) is None
    assert rejection_reason(f"{eight} and {eight.upper()}", ended=True) == "repeats itself"
    assert rejection_reason("Hello", ended=False) == "cut off" and rejection_reason(" \n", ended=True) == "empty"
    assert (
        rejection_reason("I am a Robot.", ended=True, unwanted=["robot"]) == "unwanted words"
        and rejection_reason("a\ufffd", ended=True) == "broken characters"
    )


def test_the_verb_killed_at_any_moment_goes_on(
    teacher: Checkpoint, asked: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.jsonl"
    command = [warm_merino(), "distill", "generate", str(teacher.path)]
    command += ["--prompts", str(asked)]
    command += ["--out", str(out), "--count", "70", "--max-tokens", "12", "--batch", "4", "--seed", "3"]
    command += ["--precision", "fp32", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0 and "answers kept" in done.stderr, done.stderr
    assert out.read_bytes() == uninterrupted.read_bytes()


# --- prompts ---------------------------------------------------------------------------------------


def test_slots_are_filled_by_seed_and_number(asked: Path) -> None:
    found = prompts.load(asked)
    said = [found.prompt(0, i).user for i in range(200)]
    assert said == [found.prompt(0, i).user for i in range(200)] != [found.prompt(1, i).user for i in range(200)]
    assert len(set(said)) == 4 + 4 * 3 + 2 and {found.prompt(0, i).system for i in range(9)} == {"Be brief."}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"templates": ["{ghost}"]}, "'ghost'"),
        ({"templates": ["{word:3}"]}, "wants 3"),
        ({"templates": ["a } b"]}, "brace"),
        ({"templates": []}, "no list of texts"),
        ({"groups": [{"templates": ["a"]}]}, "not one of templates and groups"),
        ({"slots": []}, "slots"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"system": 3}, "system"),
        ({"kind": "recipe"}, "is a training recipe, not a file of prompts"),
        ({"asked": "no slot"}, "asked"),
    ],
)
def test_prompts_that_say_nothing_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**ASKED, **change}))
    with pytest.raises(ArtefactError, match=words):
        prompts.load(tmp_path / "p.json")


def test_the_packages_prompts() -> None:
    found = prompts.load("children")
    said = {found.prompt(0, i).user for i in range(3000)}
    assert len(said) > 1800 and all("{" not in text for text in said)
    assert sum(len(values) for values in found.slots.values()) > 800
    with pytest.raises(InputError, match="children"):
        prompts.load("childrn")
