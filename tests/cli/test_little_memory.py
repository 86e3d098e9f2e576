"""A limit of the address space: where a library aborts, one line says so and nothing is left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from merino_edge.cli.main import _one_line

PROGRAM = """
import os, resource, sys
from pathlib import Path
from merino_edge import atomic, output
from merino_edge.cli import main as module

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
out = Path(sys.argv[-1])

def work():
    with output.lock(out):
        atomic.hidden_name(out).mkdir()
        print("a line of its own", file=sys.stderr, flush=True)
        {end}

module.main = work
from merino_edge.__main__ import run
run()
"""
ABORT = """os.write(2, b"terminate called after throwing\\\\n  what():  std::bad_alloc\\\\n"); os.abort()"""


@pytest.mark.parametrize("option", [["--out"], []])  # or an argument, as build's bundle
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (ABORT, 1, "merino-edge: out of memory; 8,192 MB of address space are too few, raise ulimit -v\n"),
        ("sys.exit(7)", 7, ""),
    ],
)
def test_an_abort_is_one_line(tmp_path: Path, end: str, code: int, said: str, option: list[str]) -> None:
    words = [sys.executable, "-c", PROGRAM.format(end=end), *option, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"a line of its own\n{said}")
    assert code == 7 or os.listdir(tmp_path) == []


def test_an_abort_leaves_no_lock_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/out")
    words = [sys.executable, "-c", PROGRAM.format(end=ABORT), str(tmp_path / "link")]
    assert subprocess.run(words, capture_output=True).returncode == 1
    assert os.listdir(tmp_path / "real") == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ImportError("x.so: failed to map segment from shared object"),
        ImportError("x.so: cannot map zero-fill pages"),
    ],
)
def test_what_libraries_say_without_memory_is_called_so(error: BaseException) -> None:
    assert _one_line(error) == "out of memory; use a smaller model, batch or context"
    assert _one_line(ValueError(str(error))).startswith("unexpected ValueError")


def test_onednn_without_memory_is_called_so_where_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("could not create a primitive")
    assert _one_line(error).startswith("unexpected RuntimeError (could not create a primitive)")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**30, 2**30))
    assert _one_line(error) == "out of memory; use a smaller model, batch or context"


@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_a_library_on_a_file_system_that_runs_nothing_is_no_lack_of_memory(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """glibc's words are the same. Only root can mount one, so here only its flag is another."""
    error = kind("/bin/sh: failed to map segment from shared object")
    assert _one_line(error).startswith("out of memory")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    line = _one_line(error)
    assert line.startswith("/bin/sh is on a file system mounted noexec") and line.endswith("install elsewhere")


def test_too_few_threads_name_both_limits() -> None:
    assert _one_line(RuntimeError("can't start new thread")).startswith("no thread can be started; free memory, or")
