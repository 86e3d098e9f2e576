"""`python -m merino_edge`, and the installed `merino-edge`: a signal ends it in one line from the first import on."""

from __future__ import annotations

import os
import signal

NAME, INTERRUPTED = "merino-edge", 130  # what a shell reports of Ctrl-C
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def _end(number: int, frame: object) -> None:
    """While libraries are imported nothing is half-written, and an exception would show their traceback."""
    os.write(2, f"{NAME}: interrupted\n".encode())
    os._exit(INTERRUPTED)


def run() -> None:
    """Run the program. A signal that whoever started it wants ignored, as nohup does, stays ignored."""
    for name in SIGNALS:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from merino_edge.cli import little_memory

    if (limit := little_memory.limit_bytes()) is not None:
        little_memory.watch(limit)
    from merino_edge.cli.main import main

    main()


if __name__ == "__main__":
    run()
