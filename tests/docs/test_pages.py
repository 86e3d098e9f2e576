"""Every block of the README and of docs/ runs as it stands, in order, in one folder, and says what is promised.

SETUPS says of each page what stands in the folder before, and what is made shorter than a reader would wait for.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers.documented import PageRunner, Ran, commands_outside_blocks, read_blocks
from merino_edge.latency.table_file import load_table
from merino_edge.search.builtin_spaces import load_space

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]
README_VERBS = {"profile", "estimate", "search", "pareto", "train", "import", "export", "generate", "bench", "show"}
# What takes minutes for a reader, in every page. Nothing else of a command is changed.
SHORTER = {"--steps 400": "--steps 12", "--quick": "--minutes 0.01", "--points 40": "--points 4"}
Check = Callable[[str, Path, Sequence[Ran]], None]


@dataclass(frozen=True)
class Setup:
    """`shorter`: more replacements. `given`: fixtures that stand in the folder under these names. `check`: what the
    page promises of its results. `variables`: environment variables, as fixtures."""

    shorter: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    check: Check | None = None


def check_readme(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    verbs = {shlex.split(command)[1] for command, _, _ in ran if command.startswith("merino-edge")}
    assert verbs == README_VERBS | {"doctor"}
    output = {command: stdout for command, stdout, _ in ran}
    assert "Paris" in next(stdout for command, stdout in output.items() if "capital of France" in command)
    piped = next(stdout for command, stdout in output.items() if command.startswith("echo"))
    assert json.loads(piped)["finish_reason"] in ("stop", "length")
    assert {"table.png", "search.png"} <= {file.name for file in folder.iterdir()}


def check_profiling(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    assert load_table(folder / "board.jsonl").finished
    assert load_table(folder / "nano.jsonl").estimated


def check_search(text: str, folder: Path, ran: Sequence[Ran]) -> None:
    first = next(one for one in ran if one.command.startswith("merino-edge search"))
    (claim,) = re.findall(r"^(?:    )?(score .* scores above .*)$", text, re.MULTILINE)
    assert claim in first.stderr  # the certificate that the page prints
    assert load_space(str(folder / "mine.json")).blocks == (2, 3)
    costs = json.loads((folder / "flops.json").read_text())["costs"]
    assert f"{costs['parameters'] / 1e6:.1f} M parameters, {costs['weight_mb@int4']:.1f} MB" in text


SETUPS: dict[str, Setup] = {
    "README.md": Setup(check=check_readme),
    "docs/api.md": Setup(given={"smollm2.gguf": "smollm2_gguf", "checkpoint": "tiny_checkpoint"}),
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, tmp_path: Path, smollm2_gguf: Path, request: pytest.FixtureRequest) -> None:
    text, setup = (ROOT / page).read_text(), SETUPS.get(page, Setup())
    for name, fixture in setup.given.items():
        value = request.getfixturevalue(fixture)
        (tmp_path / name).symlink_to(getattr(value, "path", value))
    variables = {name: str(request.getfixturevalue(fixture)) for name, fixture in setup.variables.items()}
    # The name of SmolLM2 stands for the file that this test session already has.
    shorter = {**SHORTER, **setup.shorter, "smollm2-135m-instruct": str(smollm2_gguf), "8080": str(free_port())}
    ran = PageRunner(ROOT, tmp_path, shorter, variables).run_page(text)
    if setup.check is not None:
        setup.check(text, tmp_path, ran)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_in_a_block(page: str) -> None:
    assert commands_outside_blocks((ROOT / page).read_text()) == []


def test_blocks_are_told_apart() -> None:
    page = '```sh\na \\\n  b # why\n```\ntext\n```sh title="on the board"\nc\n```\n```json title="mine.json"\n{}\n```\n'
    assert [(b.language, b.title) for b in read_blocks(page)] == [
        ("sh", ""),
        ("sh", "on the board"),
        ("json", "mine.json"),
    ]
    assert commands_outside_blocks("text\n\n    merino-edge doctor\n") == ["merino-edge doctor"]
