"""A warm Python does what a plain one does; only the imports are done before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.warm_python import ONE_THREAD, SHARED, warm_folder, warm_python

PROGRAMS = {
    "words and input": "import sys; print(sys.argv, __name__, sys.path[0], sys.stdin.read())",
    "folder and environment": "import os, sys; print(os.getcwd(), os.environ['HERE'], len(os.environ), sys.executable)",
    "streams": "import sys; print([(type(s.buffer), s.encoding, s.errors, s.line_buffering, s.write_through, "
    "s.isatty(), s.seekable()) for s in (sys.stdin, sys.stdout, sys.stderr)])",
    "bytes": "import sys; print(sys.stdin.buffer.read(2), sys.stdin.read()); sys.stdout.buffer.write(b'raw')",
    "open files": "import os; print(os.listdir('/proc/self/fd'))",
    "signals": "import signal; print([str(signal.getsignal(one)) for one in (1, 2, 3, 10, 12, 13, 15, 17)])",
    "mask of signals": "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))",
    "limits": "import resource; print([resource.getrlimit(one) for one in range(10)])",
    "exit code": "import sys; sys.exit(300)",
    "exit text": "import sys; sys.exit('no')",
    "exit by None": "raise SystemExit",
    "error": "print('half'); raise ValueError('bad')",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os; print('lost?'); os.kill(os.getpid(), 9)",
    "end": "import atexit, threading, time\natexit.register(print, 'last')\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "processes": "import subprocess, multiprocessing\nif __name__ == '__main__':\n"
    " print(subprocess.run(['cat'], input=b'in', capture_output=True).stdout, multiprocessing.get_start_method())\n"
    " with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(abs, [-1]))",
    "nothing of ours": "import sys; print([name for name in sys.modules if name.startswith('merino')])",
}


def outcome(program: str, *words: str, **more: object) -> tuple[int, str, str]:
    done = subprocess.run([program, *words], capture_output=True, text=True, errors="replace", timeout=120, **more)  # type: ignore[call-overload]
    return done.returncode, done.stdout, "".join(done.stderr.splitlines()[-1:])  # a traceback has other files


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_ends_as_in_a_plain_python(code: str, tmp_path: Path) -> None:
    more = {"input": "told\n", "cwd": tmp_path, "env": {**os.environ, "HERE": "naïve\udcff"}}
    assert outcome(warm_python(), "-c", code, "a b", "ö", **more) == outcome(
        sys.executable, "-c", code, "a b", "ö", **more
    )


@pytest.mark.parametrize(
    "line",
    [
        "{} -c 'import sys; print(sys.stdin.tell(), sys.stdin.read(3))' < f",
        "{} -m merino_edge <&-",
        'ulimit -f 1; {} -c \'open("f", "w").write("a" * 9999)\'',
    ],
)
def test_a_shell_may_close_streams_and_set_limits(line: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("of a file")
    warm, plain = (outcome("bash", "-c", line.format(one), cwd=tmp_path) for one in (warm_python(), sys.executable))
    assert warm == plain


def test_a_module_is_found_in_the_folder_and_knows_its_name(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("import sys; print(__name__, sys.argv, __file__, sys.path[0])")
    more = {"cwd": tmp_path}
    assert outcome(warm_python(), "-m", "here", "x", **more) == outcome(sys.executable, "-m", "here", "x", **more)


def test_it_is_warm_unless_a_variable_that_is_read_at_the_start_differs() -> None:
    code = "import sys; print('torch' in sys.modules)"
    pytest.importorskip("torch")
    assert outcome(warm_python(), "-c", code)[1] == "True\n"
    assert outcome(warm_python(), "-c", code, env={**os.environ, "PYTHONPATH": "/nowhere"})[1] == "False\n"


def test_the_program_by_its_name() -> None:
    program = str(warm_folder() / "merino-edge")
    assert outcome(program, "--version") == outcome(sys.executable, "-m", "merino_edge", "--version")


def test_numpys_old_random_numbers_differ() -> None:
    drawn = [outcome(warm_python(), "-c", "import numpy; print(numpy.random.rand())") for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command(number: signal.Signals) -> None:
    code = "import time\ntry: print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('caught')"
    with subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        out = process.communicate(timeout=30)[0]
    assert (process.returncode, out) == ((0, "caught\n") if number == signal.SIGINT else (-signal.SIGTERM, ""))


def test_a_client_that_is_killed_takes_its_command_along() -> None:
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    with subprocess.Popen([warm_python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        command = Path("/proc") / process.stdout.readline().strip()
        process.kill()
    deadline = time.monotonic() + 30
    while command.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom helpers.warm_python import warm_folder; print(warm_folder())"
    )
    own = {name: value for name, value in os.environ.items() if name != SHARED}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=True,
        env=own,
    )
    deadline = time.monotonic() + 60
    while Path(done.stdout.strip()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_import_starts_a_thread_whatever_the_user_set() -> None:
    pytest.importorskip("scipy")
    code = "import os, scipy.linalg; print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "1\n"
