"""Stands in for `python` and `merino-edge`: the command runs in a process that helpers.warm_server forks.

helpers.warm_python copies this file under both names. It hands its streams, folder and environment over, passes
signals on, and ends as the command ends. It starts once per command, so it imports only what starts fast.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import sys
from _socket import AF_UNIX, MSG_WAITALL, SCM_RIGHTS, SOL_SOCKET, socket  # `socket` itself takes longer than the rest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

SCRIPT = "script"  # the installed script, in place of Python's -m or -c; its path follows
FOLDER = os.path.dirname(os.path.abspath(__file__))
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Variables that Python, its packages and the loader read before a command begins: they cannot change afterwards.
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "LD_", "MPL", "LANG", "LC_")


def main() -> NoReturn:
    words = sys.argv[1:]
    if os.path.basename(sys.argv[0]) == "merino-edge":
        words = [SCRIPT, os.path.abspath(sys.argv[0]), *words]
    if not _can_be_warm(words):
        plain = ["-m", "merino_edge", *words[2:]] if words[:1] == [SCRIPT] else words
        os.execv(sys.executable, [sys.executable, *plain])
    status = _run_warm(words)
    if status < 0:  # a signal ended it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _can_be_warm(words: list[str]) -> bool:
    with open(f"{FOLDER}/environment", "rb") as file:
        started = marshal.load(file)
    all_open = None not in (sys.stdin, sys.stdout, sys.stderr)
    return (
        words[:1] in (["-m"], ["-c"], [SCRIPT]) and all_open and _read_at_start(started) == _read_at_start(os.environ)
    )


def _run_warm(words: list[str]) -> int:
    """The command's exit status, or minus the signal that ended it."""
    ignored = [one for one in PASSED_ON if signal.getsignal(one) == signal.SIG_IGN]
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    request = {
        "words": words,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "ignored": list(map(int, ignored)),
        "limits": limits,
    }
    text = marshal.dumps(request)
    streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # they are passed on after the request
    server = socket(AF_UNIX)
    server.connect(f"{FOLDER}/socket")
    server.sendmsg([len(text).to_bytes(4, "big")], [(SOL_SOCKET, SCM_RIGHTS, streams)])
    server.sendall(text)
    for one in set(PASSED_ON) - set(ignored):
        signal.signal(one, lambda number, _: server.sendall(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    answer = server.recv(4, MSG_WAITALL)
    if len(answer) < 4:
        sys.exit("the warm server ended before the command did")
    return int.from_bytes(answer, "big", signed=True)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


if __name__ == "__main__":
    main()
