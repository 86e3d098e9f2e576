"""The trainer: a resumed run ends with the bits of an uninterrupted one, and changed options are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import TWO_WIDTHS as A
from helpers.stranger import run
from helpers.warm_python import warm_merino
from merino_edge import architecture, artefact, checkpoint
from merino_edge.data.bpe import END_OF_TEXT
from merino_edge.data.corpus import IGNORED, prepare
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.tokenizer import Tokenizer
from merino_edge.training import loss, state
from merino_edge.training.config import TrainingConfig
from merino_edge.training.train import Outcome, Progress, train
from merino_edge.training.trainer import Diverged, Trainer

CONFIG = TrainingConfig(steps=12, batch=4, sequence=24, micro_batch=3, learning_rate=1e-2, warmup=2)
LONGER = dataclasses.replace(CONFIG, steps=120)  # long enough to be killed in the middle


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.txt"
    path.write_text(tiny_stories(seed=2, stories=60))
    return path


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("uninterrupted") / "c"
    assert train(A, [source], out, CONFIG).finished
    return out


def stop_after(steps: int, source: Path, out: Path, **options: Any) -> Outcome:
    asked = iter(range(1, CONFIG.steps + 1))
    return train(A, [source], out, CONFIG, should_stop=lambda: next(asked) == steps, **options)


def weights_file(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


# --- learning --------------------------------------------------------------------------------------


def test_training_learns_and_says_so(uninterrupted: Path) -> None:
    loaded = checkpoint.load(uninterrupted)
    record = loaded.training
    assert record["validation_loss_before"] == pytest.approx(math.log(A.vocab_size), abs=0.3)
    assert record["validation_loss"] < record["validation_loss_before"] - 0.5
    assert (record["step"], record["tokens"]) == (12, 12 * 4 * 24)
    assert (
        record["config"] == dataclasses.asdict(CONFIG) and record["architecture_id"] == loaded.architecture.id == A.id
    )
    assert [step for step, _ in record["history"]] == list(range(1, 13))
    assert {path.name for path in uninterrupted.iterdir()} == {*checkpoint.FILES, "training.json"}


def test_a_trained_checkpoint_continues_text(uninterrupted: Path) -> None:
    tokenizer = Tokenizer.load(uninterrupted)
    talk = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": " a time"}]
    assert tokenizer.apply_template(talk) == "Once upon a time"
    assert tokenizer.decode(list(tokenizer.chat.eos_token_ids), skip_special_tokens=False) == END_OF_TEXT


def test_micro_batches_add_up_to_the_batch(source: Path, tmp_path: Path) -> None:
    corpus = prepare([source], A.vocab_size, tmp_path / "corpus")
    gradients = []
    for micro_batch in (4, 3, 1):
        trainer = Trainer(A, corpus, dataclasses.replace(CONFIG, micro_batch=micro_batch, precision="fp32"))
        trainer.train_step()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()  # float32 sums in another order


def test_only_matrices_decay(source: Path, tmp_path: Path) -> None:
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "corpus"), CONFIG)
    decayed, kept = trainer.optimizer.groups
    assert decayed["weight_decay"] == CONFIG.weight_decay and kept["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in kept["params"]} == {1}
    assert sum(p.numel() for group in (decayed, kept) for p in group["params"]) == A.parameters


def test_averaged_weights_are_those_of_the_formula(source: Path, tmp_path: Path) -> None:
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "c"), dataclasses.replace(CONFIG, ema=0.75))
    expected = trainer.model.to_weights()
    for _ in range(3):
        trainer.train_step()
        last = trainer.model.to_weights()
        expected = {name: 0.75 * average + 0.25 * last[name] for name, average in expected.items()}
    kept = trainer.kept_weights()
    assert all(kept[name] == pytest.approx(expected[name], abs=1e-6) for name in expected)
    with_average = trainer.validation_loss()
    assert all((trainer.model.to_weights()[name] == last[name]).all() for name in last)  # it was only lent
    trainer.model.load_state_dict({name: torch.from_numpy(value) for name, value in kept.items()})
    trainer.optimizer.average = {}
    assert trainer.validation_loss() == with_average


def test_z_loss_adds_the_squared_normalizer() -> None:
    logits, targets = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    targets[0, :3] = IGNORED
    total, entropy = loss.next_token_loss(logits, targets, z_loss=0.1)
    learned = targets != IGNORED
    by_hand = -logits.log_softmax(-1)[learned].gather(1, targets[learned][:, None]).sum()
    assert entropy == pytest.approx(float(by_hand), rel=1e-6)
    assert float(total - entropy) == pytest.approx(0.1 * float(logits.logsumexp(-1)[learned].square().sum()), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_optimizer_learns(source: Path, tmp_path: Path, optimizer: Any) -> None:
    corpus = prepare([source], A.vocab_size, tmp_path / "corpus")
    trainer = Trainer(A, corpus, dataclasses.replace(CONFIG, optimizer=optimizer, steps=40))
    before = trainer.validation_loss()
    for _ in range(40):
        trainer.train_step()
    assert trainer.validation_loss() < before - 1


# --- beginning with a checkpoint -------------------------------------------------------------------


def test_a_checkpoint_is_tuned_on_conversations(uninterrupted: Path, tmp_path: Path) -> None:
    turns = [("What is a cat?", "An animal."), ("What is red?", "A colour."), ("Say hello.", "Hello, my friend!")] * 40
    roles = ("user", "assistant")
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)]})
        for turn in turns
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    start = checkpoint.load(uninterrupted)
    config = dataclasses.replace(CONFIG, steps=30, learning_rate=3e-3)
    outcome = train(A, [tmp_path / "talk.jsonl"], tmp_path / "tuned", config, start=start)
    assert outcome.training["validation_loss"] < outcome.training["validation_loss_before"] - 1
    assert outcome.training["start_sha256"] == start.training["sha256"]
    tuned, base = Tokenizer.load(tmp_path / "tuned"), Tokenizer.load(uninterrupted)
    assert tuned.backend.to_str() == base.backend.to_str()
    prompt = tuned.apply_template([{"role": "user", "content": "What is red?"}])
    assert prompt == "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\n"
    assert tuned.backend.token_to_id("<|im_end|>") in tuned.chat.eos_token_ids


def test_another_beginning_is_not_continued(source: Path, uninterrupted: Path, tmp_path: Path) -> None:
    start = checkpoint.load(uninterrupted)
    asked = iter(range(1, 20))
    train(A, [source], tmp_path / "c", CONFIG, start=start, should_stop=lambda: next(asked) == 2)
    other = dataclasses.replace(start, training={**start.training, "sha256": "0" * 64})
    with pytest.raises(InputError, match="began with another checkpoint"):
        train(A, [source], tmp_path / "c", CONFIG, start=other, resume=True)


@given(steps=st.integers(1, 2000), warmup=st.integers(0, 2000))
def test_the_learning_rate_rises_then_falls(steps: int, warmup: int) -> None:
    c = TrainingConfig(steps=steps, warmup=min(warmup, steps), learning_rate=0.5)
    rates = [c.learning_rate_at(step) for step in range(steps)]
    peak = max(0, c.warmup - 1)
    assert all(0 < rate <= 0.5 for rate in rates) and rates[min(peak, steps - 1)] == 0.5
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


# --- exact resume ----------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(stop=st.integers(1, 11))
def test_stopped_and_continued_is_uninterrupted(
    source: Path, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory, stop: int
) -> None:
    out = tmp_path_factory.mktemp("stopped") / "c"
    stopped = stop_after(stop, source, out)
    assert not stopped.finished and stopped.training["step"] == stop
    assert checkpoint.load(out).training["step"] == stop  # what there is so far can be exported
    finished = train(A, [source], out, CONFIG, resume=True, save_every=5)
    assert finished.finished and weights_file(out) == weights_file(uninterrupted)
    expected = checkpoint.load(uninterrupted).training
    assert all(finished.training[k] == expected[k] for k in ("validation_loss_before", "validation_loss", "history"))


@pytest.mark.parametrize("change", [{"ema": 0.9}, {"optimizer": "muon"}, {"z_loss": 1e-3, "precision": "bf16"}])
def test_every_option_is_continued_exactly(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    train(A, [source], tmp_path / "whole", config)
    asked = iter(range(1, 20))
    train(A, [source], tmp_path / "parts", config, should_stop=lambda: next(asked) == 7)
    train(A, [source], tmp_path / "parts", config, resume=True)
    assert weights_file(tmp_path / "parts") == weights_file(tmp_path / "whole")


def command(source: Path, folder: Path, *more: str) -> list[str]:
    program = [warm_merino()]
    out = ["--out", str(folder / "c"), "--threads", "1"]
    return [*program, "train", str(folder / "A.json"), "--corpus", str(source), *out, *more]


@pytest.fixture(scope="module")
def longer_weights(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("longer") / "c"
    train(A, [source], out, LONGER)
    return weights_file(out)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued_is_uninterrupted(
    source: Path, longer_weights: bytes, tmp_path: Path, sent: signal.Signals
) -> None:
    architecture.save(tmp_path / "A.json", A)
    options = ["--batch=4", "--sequence=24", "--micro-batch=3", "--learning-rate=0.01", "--warmup=2", "--save-every=10"]
    options += [f"--steps={LONGER.steps}"]
    process = subprocess.Popen(command(source, tmp_path, *options), stderr=subprocess.PIPE, text=True)
    while not state.exists(tmp_path / "c") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert state.load(tmp_path / "c")["step"] < LONGER.steps
    if sent == signal.SIGINT:
        assert (
            process.returncode == 130
            and f"--out {tmp_path / 'c'} --threads 1 --continue" in errors
            and "Traceback" not in errors
        )
    resumed = subprocess.run(
        command(source, tmp_path, "--continue", "--json"), capture_output=True, text=True, check=True
    )
    assert json.loads(resumed.stdout)["config"] == dataclasses.asdict(LONGER)
    assert weights_file(tmp_path / "c") == longer_weights


# --- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(source: Path, tmp_path: Path) -> Path:
    stop_after(2, source, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("changed", ["architecture", "corpus", "config"])
def test_a_changed_training_is_not_continued(source: Path, stopped: Path, changed: str) -> None:
    other = stopped.parent / "other.txt"
    other.write_text(source.read_text() + "More.")
    a = dataclasses.replace(A, ffn="relu") if changed == "architecture" else A
    config = dataclasses.replace(CONFIG, batch=5) if changed == "config" else CONFIG
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    words = "batch is 5, the training began with 4" if changed == "config" else f"the {changed} has changed"
    with pytest.raises(InputError, match=words):
        train(a, [other if changed == "corpus" else source], stopped, config, resume=True)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_an_unfinished_training_is_not_overwritten(source: Path, stopped: Path) -> None:
    with pytest.raises(OutputError, match="add --continue"):
        train(A, [source], stopped, CONFIG)
    with pytest.raises(InputError, match="no unfinished training"):
        train(A, [source], stopped.parent / "elsewhere", CONFIG, resume=True)


@pytest.mark.parametrize("pattern", ["step-*.safetensors", "state.json"])
def test_an_altered_state_is_refused(source: Path, stopped: Path, pattern: str) -> None:
    (path,) = (stopped / "state").glob(pattern)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=path.name):
        train(A, [source], stopped, CONFIG, resume=True)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["step-8.safetensors", "state.json"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(
    source: Path, uninterrupted: Path, tmp_path: Path, name: str
) -> None:
    asked = iter(range(1, 20))
    train(A, [source], tmp_path / "c", CONFIG, save_every=4, should_stop=lambda: next(asked) == 8)
    assert {path.name for path in (tmp_path / "c/state").glob("*-*")} == {"step-4.safetensors", "step-8.safetensors"}
    assert state.load(tmp_path / "c")["step"] == 8 and state.load(tmp_path / "c")["damaged"] is None
    damage(tmp_path / "c/state" / name)
    found = state.load(tmp_path / "c")
    assert found["step"] == 4 and name in found["damaged"]
    train(A, [source], tmp_path / "c", CONFIG, resume=True, save_every=5)
    assert weights_file(tmp_path / "c") == weights_file(uninterrupted)


def test_where_no_state_is_whole_the_model_stays(source: Path, stopped: Path) -> None:
    damage(stopped / "state/state.json")
    with pytest.raises(ArtefactError, match=r"train again with another --out; the model that .* holds stays"):
        train(A, [source], stopped, CONFIG, resume=True)
    assert checkpoint.load(stopped).training["step"] == 2


def test_a_checkpoint_stays_until_its_successor_is_saved(source: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    shutil.copytree(uninterrupted, out)
    (out / "log.jsonl").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def look(p: Progress) -> None:
        if p.step <= 5:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before and p.folder != out
        else:
            assert p.folder == out and state.load(out)["step"] == 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(A, [source], out, CONFIG, save_every=5, on_step=look)
    train(A, [source], out, CONFIG, resume=True)
    assert weights_file(out) == weights_file(uninterrupted) and list(tmp_path.iterdir()) == [out]
    for failing in ([tmp_path / "none.txt"], [source]):
        kept = weights_file(out)
        with pytest.raises((InputError, ZeroDivisionError)):
            train(A, failing, out, CONFIG, on_step=lambda _: 1 // 0)  # type: ignore[arg-type,return-value]
        assert weights_file(out) == kept and list(tmp_path.iterdir()) == [out]


def test_a_training_never_replaces_what_it_begins_with(source: Path, uninterrupted: Path) -> None:
    kept = weights_file(uninterrupted)
    with pytest.raises(OutputError, match="is the checkpoint that the training begins with"):
        train(A, [source], uninterrupted, CONFIG, start=checkpoint.load(uninterrupted))
    assert weights_file(uninterrupted) == kept


def test_smaller_micro_batches_may_go_on(source: Path, stopped: Path) -> None:
    train(A, [source], stopped, dataclasses.replace(CONFIG, micro_batch=2), resume=True)
    assert checkpoint.load(stopped).training["config"]["micro_batch"] == 2


def test_the_verb_says_that_a_training_is_finished(
    source: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    architecture.save(tmp_path / "A.json", A)
    shutil.copytree(uninterrupted, tmp_path / "c")
    words = ["train", tmp_path / "A.json", "--corpus", source, "--out", tmp_path / "c"]
    kept = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert run(*words, "--continue") == 0 and "is finished already, with all" in capfd.readouterr().err
    assert run(*words, "--continue", "--micro-batch", 1, "--json") == 0
    assert json.loads(capfd.readouterr().out)["step"] == CONFIG.steps
    assert run(*words, "--continue", "--steps", 99) == 2 and "steps was" in capfd.readouterr().err
    assert run(*words) == 6 and "is a checkpoint already; add --force" in capfd.readouterr().err
    assert run("train", tmp_path / "c", *words[2:], "--force", "--steps", 2) == 6
    assert run(*words, "--corpus", tmp_path / "none", "--force") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "c").iterdir()} == kept


def test_a_failure_before_the_first_save_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    failing: list[tuple[Path, TrainingConfig, str]] = [
        (tmp_path / "empty.txt", CONFIG, "zero tokens"),
        (source, dataclasses.replace(CONFIG, sequence=65), "longer than the model's 64 positions"),
    ]
    for corpus, config, words in failing:
        with pytest.raises(InputError, match=words):
            train(A, [corpus], tmp_path / "c", config)
        assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(OutputError, match="not an artefact"):
        train(A, [source], tmp_path / "home", CONFIG)


def test_divergence_stops_and_changes_nothing(source: Path, tmp_path: Path) -> None:
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "corpus"), CONFIG)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.final_norm.weight[0] = float("inf")
    before = trainer.model.to_weights()
    with pytest.raises(Diverged, match=r"diverged at step 2 .*first in sequences 0 to 2"):
        trainer.train_step()
    after = trainer.model.to_weights()
    assert trainer.step == 1 and all((before[name] == after[name]).all() for name in before)


def test_a_last_step_that_diverges_is_no_training(source: Path, tmp_path: Path) -> None:
    """No step follows it that would see a loss that is not finite."""
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "corpus"), CONFIG)
    trainer.model.final_norm.weight.data[0] = float("inf")
    with pytest.raises(Diverged, match="validation loss nan"):
        trainer.validation_loss()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_without_all_of_the_optimizer_is_refused(source: Path, tmp_path: Path, optimizer: str) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "corpus"), config)
    trainer.train_step()
    whole = trainer.tensors()
    trainer.restore(whole, 1)
    for name in [name for name in whole if name.startswith(("step.", "exp_avg", "momentum"))][::9]:
        partial = {other: tensor for other, tensor in whole.items() if other != name}
        if name.startswith("momentum"):  # all that Muon keeps of a parameter
            partial[name.replace("momentum_buffer", "velocity")] = whole[name]
        with pytest.raises(ArtefactError, match="saved state is not one of this model"):
            trainer.restore(partial, 1)


def test_divergence_keeps_what_was_saved(source: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, learning_rate=0.9, clip=1e6, precision="fp32", weight_decay=0.9, steps=200)

    def spoil(p: Progress) -> None:
        if p.step == 7:
            raise Diverged("training diverged at step 8 (loss nan)", "train again with a lower --learning-rate")

    with pytest.raises(Diverged, match="c keeps step 5"):
        train(A, [source], tmp_path / "c", config, save_every=5, on_step=spoil)
    assert checkpoint.load(tmp_path / "c").training["step"] == 5 == state.load(tmp_path / "c")["step"]


IMPOSSIBLE = [
    {"steps": 0},
    {"batch": 0},
    {"sequence": -1},
    {"micro_batch": 0},
    {"warmup": 601_000},
    {"learning_rate": float("nan")},
    {"seed": -1},
    {"precision": "fp8"},
    {"precision": ""},
    {"optimizer": "sgd"},
    {"ema": 1.0},
    {"clip": 0.0},
]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_an_impossible_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        TrainingConfig(**change)
    assert "\n" not in str(caught.value)
    assert caught.value.hint and "merino-edge" not in caught.value.hint  # train, study and distill share it


def test_the_verb_refuses_in_one_line(source: Path, tmp_path: Path) -> None:
    architecture.save(tmp_path / "A.json", A)
    (tmp_path / "empty.txt").write_text("")
    result = subprocess.run(command(tmp_path / "empty.txt", tmp_path, "--steps", "2"), capture_output=True, text=True)
    assert result.returncode == InputError.exit_code and result.stdout == ""
    assert "Traceback" not in result.stderr and "zero tokens" in result.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"A.json", "empty.txt"}


def test_a_training_state_that_cannot_be_written_keeps_the_last(source: Path, stopped: Path) -> None:
    head = state.load(stopped)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as good as a full disk
    try:
        with pytest.raises(OutputError, match=r"cannot write .*step-3"):
            state.save(stopped, {**head, "step": 3}, {"weights.x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((stopped / "state").glob("step-3*"))
    assert state.load(stopped) == head and state.load_tensors(stopped, head)
    assert artefact.sha256_file(stopped / "state" / head["file"]) == head["file_sha256"]


def test_a_checkpoint_is_the_trained_model(uninterrupted: Path, source: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(uninterrupted)
    trainer = Trainer(A, prepare([source], A.vocab_size, tmp_path / "corpus"), CONFIG, start=loaded)
    assert trainer.validation_loss() == loaded.training["validation_loss"]
