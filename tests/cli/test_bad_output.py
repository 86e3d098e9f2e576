"""Every verb that writes: into unwritable folders, onto full disks, and where a file is in the way."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.made_once import MadeOnce
from helpers.small_disk import fill, small_disk
from helpers.stranger import ORIN_NANO, Refused, profile, run, train
from merino_edge import artefact, bundle
from merino_edge.latency.table_file import load_table


def writers(good: Path, out: Path) -> dict[str, tuple[object, ...]]:
    return {
        "search": ("search", "--space", good / "space.json", "--out", out),
        "pareto": ("pareto", "--space", good / "space.json", "--against", "flops", "--points", 3, "--out", out),
        "profile": profile(good / "space.json", out),
        "estimate": ("estimate", *ORIN_NANO, "--space", good / "space.json", "--quick", "--out", out),
        "train": train(good / "a.json", good, out),
        "export": ("export", good / "checkpoint", "--threads", 1, "--out", out),
        "import": ("import", good / "llama", "--out", out),
        "demo": ("demo", "--out", out),
    }


VERBS = list(writers(Path(), Path()))


@pytest.fixture(scope="session")
def llama(good: Path, made_once: MadeOnce) -> Path:
    """A Hugging Face folder to import."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(folder: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder)
        (folder / "tokenizer.json").write_text((good / "checkpoint/tokenizer.json").read_text())

    return made_once("good/llama", make)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("verb", VERBS)
def test_unwritable_places(good: Path, tmp_path: Path, refused: Refused, verb: str) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "out", Path("/proc/sys/out"), tmp_path / ("long" * 99)):
        line = refused(*writers(good, out)[verb])
        assert "merino-edge: cannot write" in line or "File name too long" in line


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_disk(good: Path, disk: Path, refused: Refused, verb: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "(Read-only file system)" in refused(*writers(good, disk / "out")[verb])


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(
    "verb", [verb for verb in VERBS if verb != "demo"]
)  # demo makes its folder before it is refused
def test_a_full_disk(good: Path, disk: Path, refused: Refused, verb: str) -> None:
    fill(disk)
    assert "cannot write" in refused(*writers(good, disk / "out")[verb])
    assert "free the disk" in refused("search", "--plot", disk / "a.png", "--out", disk / "a.json")


def test_a_disk_that_fills_while_training_and_exporting(good: Path, disk: Path, refused: Refused) -> None:
    size = sum(file.stat().st_size for file in (good / "bundle").iterdir())
    fill(disk, size)  # a page or two less than it needs
    for verb in ("export", "train"):
        assert "cannot write" in refused(*writers(good, disk / "out")[verb])
    (disk / "most").unlink()
    assert run(*writers(good, disk / "out")["export"]) == 0
    kept = artefact.sha256_file(disk / "out/manifest.json")
    fill(disk)
    assert "cannot write" in refused(*writers(good, disk / "out")["export"], "--precision", "fp16")
    assert artefact.sha256_file(disk / "out/manifest.json") == kept and bundle.load(disk / "out")


@pytest.mark.usefixtures("hasty_clock")
def test_a_disk_that_fills_while_profiling(good: Path, disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The measurements so far stay, and profiling continues when there is room."""
    fill(disk, 4096)
    profile = writers(good, disk / "table.jsonl")["profile"]
    assert run(*profile) == 6 and "free the disk" in capfd.readouterr().err
    begun = {m.key for m in load_table(disk / "table.jsonl", unfinished=True).measurements}
    (disk / "most").unlink()
    assert run(*profile, "--continue") == 0
    finished = load_table(disk / "table.jsonl")
    assert begun < {m.key for m in finished.measurements} and finished.validation


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("verb", VERBS)
def test_what_stands_in_the_way_stays(good: Path, tmp_path: Path, refused: Refused, verb: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("precious")
    if verb == "demo":
        for name in ("checkpoint", "bundle"):
            (home / name).mkdir()
            (home / name / "letter.txt").write_text("precious")
        (home / "corpus.txt").mkdir()  # so that it ends before minutes of work
    assert "home" in refused(*writers(good, home)[verb])
    assert all(letter.read_text() == "precious" for letter in home.rglob("letter.txt"))
    device = Path("/dev/null")
    assert "/dev/null" in refused(*writers(good, device)[verb])
    assert device.is_char_device()


def test_stdout_may_be_full(good: Path, merino: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*merino, "show", good / "a.json", "--json"], stdout=full, stderr=-1, text=True)
    assert done.returncode == 1 and done.stderr.startswith("merino-edge: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_reader_may_leave(good: Path, merino: tuple[str, ...]) -> None:
    command = subprocess.list2cmdline([*merino, "show", str(good / "a.json"), "--json"])
    done = subprocess.run(["bash", "-c", f"{command} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(subprocess.run(["bash", "-c", command], capture_output=True).stdout)["kind"] == "architecture"
