"""Distillation: losses equal plain formulas, stored equals live, resumed equals uninterrupted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.warm_python import warm_merino
from merino_edge import architecture, artefact, checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import Checkpoint
from merino_edge.data import corpus as data
from merino_edge.data.corpus import Corpus
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.distillation import teacher_logits
from merino_edge.distillation.teacher_logits import TeacherLogits, write_teacher_logits
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer
from merino_edge.training.config import TrainingConfig
from merino_edge.training.loss import TopK, distillation_loss
from merino_edge.training.teacher import LiveTeacher, StoredTeacher, load
from merino_edge.training.train import train
from merino_edge.training.trainer import Trainer

A = Architecture(400, 64, 24, 8, (Block(24, 1, 3, 1, 48),), ffn="swiglu", norm="rmsnorm", positions="learned")
LARGE = dataclasses.replace(A, embedding_width=48, blocks=(Block(48, 2, 6, 6, 96),))
CONFIG = TrainingConfig(steps=12, batch=4, sequence=24, micro_batch=3, learning_rate=1e-2, warmup=2, precision="fp32")
TAUGHT = dataclasses.replace(CONFIG, teacher_weight=0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.txt"
    path.write_text(tiny_stories(seed=2, stories=120))
    return path


@pytest.fixture(scope="module")
def teacher(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("teacher") / "c"
    train(LARGE, [source], out, dataclasses.replace(CONFIG, steps=250, batch=16, micro_batch=16))
    return checkpoint.load(out)


@pytest.fixture(scope="module")
def corpus(source: Path, teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    data.prepare([source], 400, folder, Tokenizer.load(teacher.path))
    return data.load(folder)


# --- the divergence --------------------------------------------------------------------------------


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, 30, (2, 7))
    targets[0, :3] = data.IGNORED
    return torch.randn(2, 7, 30, requires_grad=True), torch.randn(2, 7, 30) * 2, targets


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_pytorchs(temperature: float) -> None:
    student, teacher, targets = logits_and_targets()
    learned = targets != data.IGNORED
    q, p = ((logits[learned] / temperature).log_softmax(-1) for logits in (student, teacher))
    for direction, plain in (
        ("forward", F.kl_div(q, p, reduction="sum", log_target=True)),
        ("reverse", F.kl_div(p, q, reduction="sum", log_target=True)),
    ):
        found = distillation_loss(student, teacher, targets, temperature, direction)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(temperature**2 * plain.item(), rel=1e-5)
        (ours,) = torch.autograd.grad(found, student, retain_graph=True)
        (theirs,) = torch.autograd.grad(temperature**2 * plain, student, retain_graph=True)
        assert (ours - theirs).abs().max() < 1e-5
    assert float(distillation_loss(teacher, teacher, targets)) == pytest.approx(0, abs=1e-6)


def kl(p: torch.Tensor, q: torch.Tensor, direction: str) -> float:
    """The divergence of distributions [N, V], summed, in nats."""
    of, other = (p, q) if direction == "forward" else (q, p)
    return (of * (of / other).log()).sum().item()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("k", [1, 5, 29, 30])
def test_the_largest_and_one_bucket_for_the_rest(k: int, direction: Any) -> None:
    student, teacher, targets = logits_and_targets()
    learned = targets != data.IGNORED
    logs, ids = teacher.log_softmax(-1).topk(k, -1)
    found = distillation_loss(student, TopK(logs, ids), targets, 1.0, direction)
    q, p = (logits[learned].double().softmax(-1) for logits in (student, teacher))  # [N, V]
    whole = kl(p, q, direction)
    p, q = p.gather(-1, ids[learned]), q.gather(-1, ids[learned])
    if k < 30:
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))
    bucketed = kl(p, q, direction)
    assert found.item() == pytest.approx(bucketed, rel=1e-4)
    # A bucket can only hide differences. In float64: float32 rounds the smallest rest by more than it hides.
    assert bucketed <= whole * (1 + 1e-12)
    (gradient,) = torch.autograd.grad(found, student)
    assert gradient.isfinite().all()


# --- what is stored --------------------------------------------------------------------------------


def test_what_is_stored_is_what_the_teacher_expects(teacher: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    """Each token's prediction comes from the first window that has it, with at least window - stride tokens before."""
    write_teacher_logits(teacher, corpus, tmp_path / "l", top_k=8, window=32, stride=12, batch=3, shard_values=1000)
    stored, model = TeacherLogits(tmp_path / "l"), Model.from_weights(LARGE, teacher.weights)
    assert len(stored.header["shards"]) > 3 and sum(s["tokens"] for s in stored.header["shards"]) == len(corpus.tokens)
    n = len(corpus.tokens)
    for at in (0, 31, 32, 33, 43, 44, 100, n // 2, n - 2, n - 1):
        start = 0 if at < 32 else -(-(at - 31) // 12) * 12
        tokens = torch.from_numpy(corpus.tokens.window(start, at + 1).astype(np.int64))
        with torch.no_grad():
            expected = model(tokens[None])[0, -1].log_softmax(-1).topk(8)
        logs, ids = stored.rows(np.array([at]), 1)
        assert logs[0, 0] == pytest.approx(expected.values.numpy(), abs=1e-2)
        assert set(ids[0, 0][:3]) <= set(expected.indices.tolist())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_of_the_vocabulary_stored_equals_live(
    teacher: Checkpoint, corpus: Corpus, tmp_path: Path, direction: Any
) -> None:
    write_teacher_logits(teacher, corpus, tmp_path / "l", top_k=400, window=24, stride=24)
    live, stored = LiveTeacher(teacher), StoredTeacher(TeacherLogits(tmp_path / "l"))
    starts = np.arange(0, 24 * 20, 24)  # where its windows begin
    rows = np.stack([corpus.tokens.window(start, start + 25) for start in starts]).astype(np.int64)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    student = Model(A, seed=5)
    gradients, losses = [], []
    for one in (live, stored):
        one.prepare(A, corpus, TAUGHT, torch.device("cpu"))
        student.zero_grad()
        loss = distillation_loss(student(inputs), one.predict(inputs, starts, bf16=False), targets, 1.0, direction)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


def test_an_interrupted_teacher_goes_on(teacher: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    def stop(done: int, now: int) -> None:
        if done > 1000:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"top_k": 4, "window": 32, "shard_values": 800}
    write_teacher_logits(teacher, corpus, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_logits(teacher, corpus, tmp_path / "l", **options, on_tokens=stop)
    with pytest.raises(ArtefactError, match="unfinished"):
        TeacherLogits(tmp_path / "l")
    with pytest.raises(InputError, match="top_k is 5"):
        write_teacher_logits(teacher, corpus, tmp_path / "l", **{**options, "top_k": 5})
    write_teacher_logits(teacher, corpus, tmp_path / "l", **options)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "l" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(OutputError, match="is a checkpoint, which"):
        write_teacher_logits(teacher, corpus, teacher.path, **options)
    path = tmp_path / "l" / "logs-00001.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"ab")
    with pytest.raises(ArtefactError, match="logs-00001"):
        TeacherLogits(tmp_path / "l")


# --- training --------------------------------------------------------------------------------------


def test_a_taught_student_is_ahead_of_one_on_its_own(teacher: Checkpoint, corpus: Corpus) -> None:
    """A taught student is better over three seeds, by far more than the seeds differ."""
    config = dataclasses.replace(CONFIG, steps=60, batch=4, micro_batch=4)
    gains = []
    for seed in range(3):
        losses = []
        for weight in (0.0, 0.9):
            c = dataclasses.replace(config, seed=seed, teacher_weight=weight)
            trainer = Trainer(A, corpus, c, teacher=LiveTeacher(teacher) if weight else None)
            for _ in range(c.steps):
                trainer.train_step()
            losses.append(trainer.validation_loss())
        gains.append(losses[0] - losses[1])
    assert min(gains) > 0.1, gains


def test_micro_batches_add_up_with_a_teacher(teacher: Checkpoint, corpus: Corpus) -> None:
    gradients = []
    for micro_batch in (4, 1):
        config = dataclasses.replace(TAUGHT, micro_batch=micro_batch, temperature=2.0, direction="reverse")
        trainer = Trainer(A, corpus, config, teacher=LiveTeacher(teacher))
        trainer.train_step()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("kind", ["live", "stored"])
def test_a_taught_run_that_was_stopped_ends_with_the_same_bits(
    teacher: Checkpoint, corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    if kind == "stored":
        write_teacher_logits(teacher, corpus, tmp_path / "l", top_k=16)
    taught = load(teacher.path if kind == "live" else tmp_path / "l")
    whole, out = tmp_path / "whole", tmp_path / "c"
    assert train(A, [corpus.folder], whole, TAUGHT, teacher=taught).finished
    asked = iter(range(1, 20))
    train(A, [corpus.folder], out, TAUGHT, teacher=taught, should_stop=lambda: next(asked) == 5)
    for other in (None, LiveTeacher(dataclasses.replace(teacher, training={"sha256": "0" * 64}))):
        with pytest.raises(InputError, match="another teacher"):
            train(A, [corpus.folder], out, TAUGHT, teacher=other, resume=True)
    assert train(A, [corpus.folder], out, TAUGHT, teacher=taught, resume=True).finished
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert checkpoint.load(out).training["teacher_sha256"] == taught.sha256


def test_a_teacher_that_cannot_teach_is_refused(
    teacher: Checkpoint, corpus: Corpus, source: Path, tmp_path: Path
) -> None:
    other = data.prepare([source], 380, tmp_path / "other")
    with pytest.raises(InputError, match="vocabulary of 400, the model 380"):
        Trainer(dataclasses.replace(A, vocab_size=380), other, TAUGHT, teacher=LiveTeacher(teacher))
    with pytest.raises(InputError, match="another tokenizer"):
        Trainer(A, other, TAUGHT, teacher=LiveTeacher(teacher))
    with pytest.raises(InputError, match="another tokenizer"):
        write_teacher_logits(teacher, other, tmp_path / "l")
    write_teacher_logits(teacher, corpus, tmp_path / "l", top_k=2)
    stored = load(tmp_path / "l")
    with pytest.raises(InputError, match="another corpus"):
        Trainer(A, other, TAUGHT, teacher=stored)
    with pytest.raises(InputError, match=r"temperature is 2\.0"):
        Trainer(A, corpus, dataclasses.replace(TAUGHT, temperature=2.0), teacher=stored)
    with pytest.raises(InputError, match="teacher without a weight"):
        Trainer(A, corpus, CONFIG, teacher=stored)
    with pytest.raises(InputError, match="teacher that there is not"):
        Trainer(A, corpus, TAUGHT)


@pytest.mark.parametrize("change", [{"teacher_weight": 1.1}, {"temperature": 0.0}, {"direction": "up"}])
def test_impossible_values(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        TrainingConfig(**change)


def test_the_verbs(teacher: Checkpoint, corpus: Corpus, tmp_path: Path) -> None:
    architecture.save(tmp_path / "A.json", A)
    merino = [warm_merino()]
    words = ["distill", "logits", str(teacher.path), "--corpus", str(corpus.folder)]
    words += ["--out", str(tmp_path / "l"), "--json"]
    done = subprocess.run([*merino, *words], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["top_k"] == 64, done.stderr
    words = ["train", str(tmp_path / "A.json"), "--corpus", str(corpus.folder), "--out", str(tmp_path / "c")]
    words += ["--steps", "3", "--batch", "2", "--sequence", "24", "--teacher", str(tmp_path / "l")]
    done = subprocess.run([*merino, *words, "--direction", "reverse"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = artefact.read_json(tmp_path / "c" / "training.json", "checkpoint")
    assert record["config"]["teacher_weight"] == 0.5 and record["config"]["direction"] == "reverse"
    header = artefact.read_json(tmp_path / "l" / teacher_logits.HEADER, teacher_logits.KIND)
    assert record["teacher_sha256"] == header["sha256"]
