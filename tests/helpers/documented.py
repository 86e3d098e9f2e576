"""The commands that a page prints, run as a reader would type them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run(command: str, folder: Path, shorter: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`command` in `folder`, with this environment's programs; what a reader waits minutes for is cut short as
    `shorter` says. Fails where the command does."""
    for long, short in shorter.items():
        command = command.replace(long, short)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, timeout=600, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done
