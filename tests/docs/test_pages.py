"""Every block of the README and of docs/ runs as it stands, in order, in one folder, and says what is promised.

SETUPS says of each page what stands in the folder before, and what is made shorter than a reader would wait for.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.documented import PageRunner, Ran, commands, commands_outside_blocks, read_blocks, unknown_words
from helpers.warm_python import warm_merino
from merino_edge.latency.table_file import load_table
from merino_edge.search.builtin_spaces import load_space

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "merino_edge/bundles/lamb/README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]
LOGS = ("docs/lab-notes.md", "docs/container-log.md")  # they keep the commands of their day
README_VERBS = {
    *("profile", "estimate", "search", "pareto", "train", "import", "export", "generate", "bench", "show", "doctor"),
    "run",
}
# What takes minutes for a reader, in every page. Nothing else of a command is changed.
SHORTER = {
    "--steps 400 --batch 16 --sequence 128": "--steps 12 --save-every 12 --batch 4 --sequence 32",
    "merino_edge.data.tiny_stories > corpus.txt": "merino_edge.data.tiny_stories | head -n 1200 > corpus.txt",
    "--space demo": "--space few.json",
    "--quick": "--minutes 0.01 --lengths 256",
    "--points 40": "--points 2",
    "-r 7": "-r 2",
    "--repetitions 3": "--repetitions 1",
}
FEW = """{"kind": "space", "schema_version": 2, "name": "few", "base": "demo", "blocks": 1,
"widths": 64, "ffn_ratios": 1, "layers": [1, 2], "embedding_widths": 64}"""
STEPS = "--steps 3 --save-every 3 --batch 4 --sequence 32"
Check = Callable[[str, Path, Sequence[Ran]], None]
MADE: dict[str, Path] = {}  # what SmolLM2 became on an earlier page: it takes a minute


@dataclass(frozen=True)
class Setup:
    """`shorter`: more replacements. `given`: fixtures that stand in the folder under these names. `inline`: which
    commands within sentences run too. `check`: what the page promises of its results. `warm`: the commands start with
    large packages imported (helpers.warm_python)."""

    shorter: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)  # environment variables, from fixtures
    inline: str = "(?!)"
    check: Check | None = None
    warm: bool = True


def check_readme(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    verbs = {shlex.split(one.command)[1] for one in ran if one.command.startswith("merino-edge")}
    assert verbs == README_VERBS
    output = {one.command: one.stdout for one in ran}
    assert "Paris" in next(stdout for command, stdout in output.items() if "capital of France" in command)
    piped = next(stdout for command, stdout in output.items() if command.startswith("echo"))
    assert json.loads(piped)["finish_reason"] in ("stop", "length")
    assert {"table.png", "search.png"} <= {file.name for file in folder.iterdir()}


def check_profiling(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    assert sum(one.command.startswith("merino-edge") for one in ran) >= 6
    assert load_table(folder / "board.jsonl").finished
    assert load_table(folder / "nano.jsonl").estimated
    assert (folder / "board.png").exists() or "--plot board.png" not in text


def check_search(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    searches = [one for one in ran if re.match("merino-edge (search|pareto)", one.command)]
    assert len(searches) >= 4
    (claim,) = re.findall(r"^(?:    )?(score .* scores above .*)$", text, re.MULTILINE)
    assert claim in searches[0].stderr  # the certificate that the page prints
    assert load_space(str(folder / "mine.json")).blocks == (2, 3)
    costs = json.loads(next(one.written for one in searches if "--flops 160G" in one.command))["costs"]
    assert f"{costs['parameters'] / 1e6:.1f} M parameters, {costs['weight_mb@int4']:.1f} MB" in text


# The board's export, of a small checkpoint: that of SmolLM2 is another form of the one that README's laptop runs.
BOARD_EXPORT = {"export smollm2 --out bundles/": "export small-checkpoint --context 64 --out bundles/"}

SETUPS: dict[str, Setup] = {
    # A cache of 64 positions holds what the page generates; the comparison with PyTorch runs through all of it.
    "README.md": Setup(
        shorter={
            **BOARD_EXPORT,
            "--out smollm2-int4 --precision int4": "--out smollm2-int4 --precision int4 --context 64",
            "--max-tokens 40": "--max-tokens 16",
            "--prompt-tokens 64 --new-tokens 64": "--prompt-tokens 16 --new-tokens 16",
        },
        given={"small-checkpoint": "plain_checkpoint"},
        check=check_readme,
    ),
    "docs/api.md": Setup(given={"smollm2.gguf": "smollm2_gguf", "checkpoint": "tiny_checkpoint"}),
    "docs/evaluation.md": Setup(
        shorter={"--window 1024": "--window 64"},
        given={"CKPT": "plain_checkpoint", "BUNDLE": "plain_bundle", "text.txt.xz": "text_xz"},
        variables={"MERINO_DATA": "evaluation_data"},
    ),
    "docs/export.md": Setup(given={"CKPT": "plain_checkpoint", "BUNDLE": "plain_bundle"}),
    "docs/profiling.md": Setup(
        shorter={
            "--space edge --precision int4 --out": "--space edge --precision int4 --minutes 0.01 --lengths 256 --out",
            "--space edge": "--space few.json",
        },
        inline="merino-edge estimate --board [^`]*",
        check=check_profiling,
    ),
    "docs/runtime.md": Setup(given={"smollm2-int4": "long_bundle", "smollm2-int8": "long_bundle"}),
    "docs/search.md": Setup(
        shorter={
            " --prices": " --no-prices",  # tests/cli/test_search.py has them
            "--score calibrated": "--score calibrated --no-prices",
            "--space edge --no-shared --precision int4 --weight-mb 8": "--space mine.json --no-shared --weight-mb 20",
            "--space edge --precision int4 --against": "--space mine.json --precision int4 --against",
            "--space edge --table": "--space mine.json --table",
        },
        given={"board.jsonl": "edge_table"},
        check=check_search,
    ),
    "docs/training.md": Setup(
        shorter={
            "--steps 2000": STEPS,
            "--steps 500": STEPS,
            "--vocab 8192": "--vocab 320",
            "train model.json --corpus corpus ": f"train model.json --corpus corpus {STEPS} ",
            "train student.json --corpus talk ": f"train student.json --corpus talk {STEPS} ",
        },
        given={
            "model.json": "model_json",
            "student.json": "model_json",
            "teacher": "plain_checkpoint",
            "corpus.txt": "corpus_txt",
            "talk.jsonl": "talk_jsonl",
        },
    ),
    # The one page whose commands import everything themselves, each verb of a laptop once.
    "docs/start-laptop.md": Setup(warm=False),
    "docs/start-orin-nano.md": Setup(shorter=BOARD_EXPORT, given={"small-checkpoint": "plain_checkpoint"}),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, tmp_path: Path, smollm2_gguf: Path, request: pytest.FixtureRequest) -> None:
    text, setup = (ROOT / page).read_text(), SETUPS.get(page, Setup())
    (tmp_path / "few.json").write_text(FEW)
    for name, fixture in setup.given.items():
        value = request.getfixturevalue(fixture)
        path = Path(getattr(value, "path", value))
        if path.is_dir():
            shutil.copytree(path, tmp_path / name)
        else:
            (tmp_path / name).symlink_to(path)
    variables = {name: str(request.getfixturevalue(fixture)) for name, fixture in setup.variables.items()}
    # The name of SmolLM2 stands for the file that this test session already has.
    shorter = {**SHORTER, **setup.shorter, "smollm2-135m-instruct": str(smollm2_gguf), "8080": str(free_port())}
    runner = PageRunner(ROOT, tmp_path, shorter, variables, made_before=MADE, warm=setup.warm)
    ran = runner.run_page(text, setup.inline)
    if setup.check is not None:
        setup.check(text, tmp_path, ran)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_in_a_block(page: str) -> None:
    assert commands_outside_blocks((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LOGS])
def test_commands_that_are_not_run_have_verbs_and_options_of_the_program(page: str) -> None:
    text = (ROOT / page).read_text()
    told = [command for block in read_blocks(text) if block.language == "sh" for command in commands(block)]
    told += re.findall(r"(?<!`)`(merino-edge [^`]*)`(?!`)", text)
    assert {command: words for command in told if (words := unknown_words(command))} == {}


def test_the_refusal_is_the_one_that_is_printed(tmp_path: Path) -> None:
    (line,) = re.findall(r"^(?:    )?(merino-edge: .*)$", (ROOT / "docs/search.md").read_text(), re.MULTILINE)
    words = ["search", "--space", "edge", "--precision", "int4", "--flops", "3G", "--weight-mb", "1", "--out", "a.json"]
    done = subprocess.run([warm_merino(), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == f"{line}\n"


def test_blocks_are_told_apart() -> None:
    page = '```sh\na \\\n  b # why\n```\ntext\n```sh title="on the board"\nc\n```\n```json title="mine.json"\n{}\n```\n'
    assert [(b.language, b.title) for b in read_blocks(page)] == [
        ("sh", ""),
        ("sh", "on the board"),
        ("json", "mine.json"),
    ]
    assert commands_outside_blocks("text\n\n    merino-edge doctor\n") == ["merino-edge doctor"]
