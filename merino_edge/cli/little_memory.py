"""A limit of the address space (ulimit -v): libraries of C++ and Rust abort the process where they get no memory.

So where there is such a limit, the program runs in a process of its own. If that is aborted, the one that started it
says so in one line, and removes what was half-written.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

MB = 2**20
ABORTS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL, signal.SIGILL, signal.SIGTRAP)
NOISE = re.compile(  # what the libraries write about it
    rb"terminate called|  what\(\):|memory allocation of |thread '.*panicked|note: run with `RUST_BACKTRACE|OpenBLAS"
    rb"|Fatal Python error|libc\+\+abi|OMP: |Aborted|called `Result::unwrap|fatal runtime error"
)


def limit_bytes() -> int | None:
    """The smallest limit of this process's memory, if there is one."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min((value for value in limits if value != resource.RLIM_INFINITY), default=None)


def watch(limit: int) -> None:
    """Go on in a child process and return there. This process ends as the child does."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 2)
        os.close(write)
        return
    os.close(write)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
    is_noise = False
    with os.fdopen(read, "rb") as lines:
        for line in lines:
            is_noise = NOISE.match(line) is not None or (is_noise and line[:1] in b" \n")
            if not is_noise:
                os.write(2, line)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if -code in ABORTS or code == 128 + signal.SIGABRT:
        _remove_leftovers()
        told = f"merino-edge: out of memory; {limit // MB:,} MB of address space are too few, raise ulimit -v"
        os.write(2, f"{told}\n".encode())
        code = 1
    os._exit(code if code >= 0 else 128 - code)


def _remove_leftovers() -> None:
    """Take the locks of the outputs that the command line names, which removes what the dead process left there."""
    from merino_edge import atomic, output
    from merino_edge.errors import MerinoError

    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    for option, word in pairwise(["", *words]):
        with suppress(MerinoError, OSError, ValueError):
            path = Path(word).resolve()  # a link's lock is beside what it points to
            if option == "--out" or output.lock_file(path).exists():  # an argument, as build's bundle
                with output.lock(path):
                    atomic.sweep(path.parent, path.name, held=True)
