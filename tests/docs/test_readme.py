"""Every command of the README runs, in its order, in one folder, as it is printed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "verb",
    [
        *("", *sorted(VERBS), "demo", "build", "targets", "serve", "evaluate", "export-hf", "tokenize", "study"),
        *("write", "teach"),
    ],
)
def test_help_loads_no_heavy_library(verb: str) -> None:
    heavy = [
        "torch",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "numpy",
        "transformers",
        "tokenizers",
        "matplotlib",
        "starlette",
        "lm_eval",
    ]
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        f"sys.argv = ['merino-edge', *{[verb] if verb else []}, '--help']\n"
        "from merino_edge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.executable).parent)
    assert done.stderr.strip() == "[]"
    assert "Usage: merino-edge" in done.stdout
