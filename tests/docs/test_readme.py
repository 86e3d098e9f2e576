"""Every command of the README runs, in its order, in one folder, as it is printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from helpers.documented import run
from merino_edge.data.tiny_stories import tiny_stories

VERBS = {"profile", "estimate", "search", "pareto", "train", "import", "export", "generate", "bench", "show", "doctor"}
# What a reader waits minutes for is cut short here; nothing else is changed.
SHORTER = {"--steps 400": "--steps 12", "--quick": "--minutes 0.01"}


def readme_commands(repository: Path) -> list[str]:
    text = (repository / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_runs_and_says_what_the_readme_promises(
    repository: Path, smollm2_gguf: Path, tmp_path: Path
) -> None:
    commands = readme_commands(repository)
    assert {shlex.split(c)[1] for c in commands if c.startswith("merino-edge")} == VERBS
    (tmp_path / "corpus.txt").write_text(tiny_stories(stories=400))
    output = {}
    for command in commands:
        # The name stands for the file this test session already has.
        done = run(command.replace("smollm2-135m-instruct", str(smollm2_gguf)), tmp_path, SHORTER)
        output[command] = done.stdout
    paris = next(text for command, text in output.items() if "capital of France" in command)
    assert "Paris" in paris
    piped = next(text for command, text in output.items() if command.startswith("echo"))
    assert json.loads(piped)["finish_reason"] in ("stop", "length")
    assert {"table.png", "search.png"} <= {file.name for file in tmp_path.iterdir()}
