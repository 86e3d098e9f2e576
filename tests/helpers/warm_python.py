"""A `python` whose commands begin with PyTorch and other large packages imported already.

Each command is a process of its own, with its own words, folder, environment, streams, signals and exit code: see
helpers.warm_client and helpers.warm_server. Commands that start otherwise, or that change a variable which is read at
the start, run in a plain Python. So do tests of what is imported and of the time that it takes: they use
`sys.executable`.
"""

from __future__ import annotations

import marshal
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# Else an import starts threads, which do not survive a fork. OpenBLAS heeds the second one more than the first.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SHARED = "MERINO_WARM_FOLDER"  # environment variable: the folder of another process's server


def share() -> None:
    """Start the server for the workers of pytest-xdist, which this process starts later."""
    os.environ[SHARED] = str(warm_folder())


@cache
def warm_folder() -> Path:
    """The folder of `python` and `merino-edge`, for PATH. The server behind them starts at the first call."""
    if shared := os.environ.get(SHARED):
        return Path(shared)
    folder, here = Path(tempfile.mkdtemp(prefix="warm-")), Path(__file__).parent
    for name in ("python", "merino-edge"):
        (folder / name).write_text(f"#!{sys.executable} -IS\n{(here / 'warm_client.py').read_text()}")
        (folder / name).chmod(0o700)
    (folder / "environment").write_bytes(marshal.dumps(dict(os.environ)))
    listener = socket.socket(socket.AF_UNIX)  # clients may connect before the server is ready
    listener.bind(f"{folder}/socket")
    listener.listen(64)
    _server(folder, listener)
    return folder


def warm_python() -> str:
    """In place of `sys.executable`, as in `subprocess.run([warm_python(), "-m", "merino_edge", ...])`."""
    return str(warm_folder() / "python")


def warm_merino() -> str:
    """The program, as in `subprocess.run([warm_merino(), "show", ...])`."""
    return str(warm_folder() / "merino-edge")


def run_merino(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What the program printed. It must end with the exit code `code`."""
    command = [warm_merino(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == code, done.stderr
    return done


def _server(folder: Path, listener: socket.socket) -> None:
    global _kept  # its standard input closes with this process, and that ends it
    command = [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(folder), str(listener.fileno())]
    _kept = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,
        env={**os.environ, **ONE_THREAD},
    )
    listener.close()
