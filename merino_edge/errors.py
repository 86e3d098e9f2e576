"""The errors of merino-edge that a user can act on.

Each error is one line that says what was wrong and where. Its `hint` says what to do next, with the command where there
is one. The command line prints `message; hint` and exits with `exit_code`. Nothing in this module prints or exits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

LONGEST = 2_000  # characters of a message, which may quote what a file says


class MerinoError(Exception):
    """A refusal that a user can act on. `hint` names the next step, `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ArchitectureError(MerinoError):
    """An architecture breaks a rule (widths decreasing, heads not dividing, zero layers, ...)."""

    exit_code = 2


class ArtefactError(MerinoError):
    """An artefact is missing, truncated, altered, foreign, or newer than this tool."""

    exit_code = 3


class BudgetError(MerinoError):
    """No architecture of the space meets the budgets."""

    exit_code = 4


class ParityError(MerinoError):
    """An exported graph does not compute the checkpoint's values. `checks` is the whole parity report."""

    exit_code = 5

    def __init__(self, message: str, hint: str = "", checks: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message, hint)
        self.checks = checks


class InputError(MerinoError):
    """A value, prompt or corpus cannot be used."""

    exit_code = 2


class ContextLengthError(InputError):
    """A prompt is longer than the context."""


class EngineInUseError(InputError):
    """Another session, answer or thread has the engine (merino_edge.runtime.engine_use)."""


class OutputError(MerinoError):
    """The result cannot be written: the disk is read-only or full, or the path is taken."""

    exit_code = 6


class MissingExtraError(MerinoError):
    """A verb needs a package that is not installed. The hint is the pip command."""

    exit_code = 7


class UnsupportedError(MerinoError):
    """This version does not handle the model, operator, device or target."""

    exit_code = 8


class UnfitTableError(MerinoError):
    """A latency table was measured, but its predictions are too far off to be used. The table stays, and says so."""

    exit_code = 9


class UnmetFormError(MerinoError):
    """An answer was to have a form, and was cut off before it had."""

    exit_code = 10


class Interrupted(MerinoError):
    """The user pressed Ctrl-C, or the process was asked to terminate."""

    exit_code = 130  # as shells count it


def mapping_failure(error: BaseException) -> MerinoError | MemoryError | None:
    """What it means that the loader failed to map a library; None for any other error.

    glibc says the same where there is too little address space and where the library's file system is mounted noexec.
    """
    if not isinstance(error, ImportError | OSError):
        return None
    if "cannot map zero-fill pages" in str(error):
        return MemoryError()
    path, says, _ = str(error).partition(": failed to map segment")
    if not says:
        return None
    with suppress(OSError, ValueError):
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            what = f"{path} is on a file system mounted noexec, where no library can be loaded"
            return UnsupportedError(what, "mount it without noexec, or install elsewhere")
    return MemoryError()


def require(package: str, extra: str) -> None:
    """Raise MissingExtraError with the pip command if `package`, a part of the extra `extra`, is not installed."""
    require_all({extra: [package]})


def require_all(needed: Mapping[str, Sequence[str]]) -> None:
    """Raise MissingExtraError that names every package that is not installed, and one pip command for them all.

    `needed` has the packages by extra, as {"train": ["torch", "safetensors"]}.
    """
    from importlib.util import find_spec

    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in needed.items()}
    packages = list(dict.fromkeys(name for names in missing.values() for name in names))
    if packages:
        some = f"the package {packages[0]}, which is" if len(packages) == 1 else f"{', '.join(packages)}, which are"
        wanted = ",".join(extra for extra, names in missing.items() if names)
        raise MissingExtraError(f"this needs {some} not installed", f"run: pip install 'merino-edge[{wanted}]'")
