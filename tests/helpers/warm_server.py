"""Forks a process for each command that helpers.warm_client sends, after it imported the large packages once.

Run as `warm_server.py FOLDER LISTENER`, with a pipe as standard input: it ends when the pipe closes. A forked process
has the client's words, folder, environment, streams and limits. It imports merino_edge itself, and nothing of ours is
imported before. What it shares with the others: the seed of Python's hashes, and submodules that are loaded already.
At its end it runs what is registered for the end, but does not take down the interpreter: that takes half a second.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import marshal
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import types
import weakref
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

# Of other projects only, and none that starts a thread when it is imported, as onnxruntime does: threads do not
# survive a fork.
PACKAGES = (
    *("typer", "pydantic.type_adapter", "pydantic.fields", "annotated_types"),
    *("rich.console", "rich.table", "rich._emoji_codes", "jinja2.sandbox"),
    *("numpy", "torch", "torch._dynamo", "safetensors", "tokenizers", "gguf"),
    *("onnx_ir", "onnx", "scipy.stats", "matplotlib.pyplot"),
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def warm_up() -> None:
    """Import what takes long. Raises EOFError where the pipe closes meanwhile."""
    for package in PACKAGES:
        if select.select([0], [], [], 0)[0]:
            raise EOFError
        if find_spec(package.partition(".")[0]) is not None:
            importlib.import_module(package)
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # takes PyTorch's operators apart
        one.atexit = False
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports"
    gc.collect()
    gc.freeze()  # else a collection in each child would copy all of it


def serve(listener: socket.socket) -> dict[str, Any]:
    """Answer clients until the pipe closes. Returns only in a forked process: what it shall run."""
    clients: dict[socket.socket, int] = {}  # to the process that each waits for
    ends: dict[int, socket.socket] = {}  # a descriptor that is readable once the process ended
    while True:
        ready, _, _ = select.select([0, listener, *clients, *ends], [], [])
        if 0 in ready:
            for process in clients.values():
                os.kill(process, signal.SIGKILL)
            raise EOFError
        for one in ready:
            if one in ends:
                client = ends.pop(one)
                _, status = os.waitpid(clients.pop(client), 0)
                _answer(client, os.waitstatus_to_exitcode(status))
                os.close(one)
            elif one in clients:
                for number in one.recv(1) or bytes([signal.SIGKILL]):  # a client that was killed takes its own along
                    os.kill(clients[one], number)
            elif one is listener:
                client, _ = listener.accept()
                request, streams = _received(client)
                process = os.fork()
                if process == 0:
                    for inherited in (listener, client, *clients):
                        inherited.close()
                    for number in ends:
                        os.close(number)
                    return {**request, "streams": streams}
                for number in streams:
                    os.close(number)
                clients[client] = process
                ends[os.pidfd_open(process)] = client


def _received(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    request: dict[str, Any] = marshal.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    return request, streams


def _answer(client: socket.socket, status: int) -> None:
    with suppress(BrokenPipeError):  # the client was killed
        client.sendall(status.to_bytes(4, "big", signed=True))
    client.close()


def become(request: dict[str, Any]) -> None:
    """Take over what the client was started with."""
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = _again(sys.stdin), _again(sys.stdout), _again(sys.stderr)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), limit)
    for one in PASSED_ON:
        signal.signal(one, signal.SIG_IGN if one in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # as a new process would; Python's own is seeded by the fork


def _again(old: Any) -> io.TextIOWrapper:
    """A text stream in place of one of Python's own, for it remembers whether its file is a pipe."""
    mode, bare = "rb" if old.readable() else "wb", isinstance(old.buffer, io.RawIOBase)
    stream = open(old.fileno(), mode, 0 if bare else -1, closefd=False)  # noqa: SIM115  it stays open
    lines = old.line_buffering or stream.isatty()
    return io.TextIOWrapper(stream, old.encoding, old.errors, line_buffering=lines, write_through=old.write_through)


def run(words: list[str]) -> None:
    """`python -m MODULE ...`, `python -c PROGRAM ...`, or helpers.warm_client's `script PATH ...`."""
    option, first, *rest = words
    sys.argv = [option, *rest]
    if option == "script":  # as the installed script does, which names itself
        sys.argv[0] = first
        sys.path[0] = os.path.dirname(first)
        importlib.import_module("merino_edge.__main__").run()
    elif option == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(first, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(first, "<string>", "exec"), main.__dict__)


def run_to_end(words: list[str]) -> NoReturn:
    status = 0
    try:
        run(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # closed
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    folder, number = sys.argv[1:]
    for one in PASSED_ON:
        signal.signal(one, signal.SIG_IGN)
    try:
        warm_up()
        asked = serve(socket.socket(fileno=int(number)))
    except EOFError:
        shutil.rmtree(folder)
        sys.exit()
    become(asked)
    run_to_end(asked["words"])
