"""The unit for systemd starts a command that there is, and systemd finds no fault with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

UNIT = Path("docs/systemd/merino-edge.service")


def test_it_starts_serve_with_options_that_there_are(repository: Path) -> None:
    from merino_edge.cli.serve import serve

    app = typer.Typer()
    app.command()(serve)
    [line] = re.findall(r"^ExecStart=(.*)$", (repository / UNIT).read_text(), re.MULTILINE)
    program, verb, bundle, *options = line.split()
    assert (Path(program).name, verb, bundle[0]) == ("merino-edge", "serve", "/")
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert options and set(options[::2]) <= known


def test_systemd_finds_no_fault(repository: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd")
    there = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", (repository / UNIT).read_text())
    (tmp_path / UNIT.name).write_text(there)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
