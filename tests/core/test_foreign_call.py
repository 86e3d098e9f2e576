"""Whatever a library's code does, the caller gets one error, in time, and stderr stays its own."""

from __future__ import annotations

import os
import threading

import pytest

from merino_edge.errors import ArtefactError, InputError
from merino_edge.foreign_call import call


class Panic(BaseException):
    """As pyo3's: no Exception."""


def panicking() -> int:
    os.write(2, b"thread '<unnamed>' panicked at lib.rs:1:1\n")
    raise Panic("index out of bounds\nthe len is 1")


@pytest.mark.parametrize("seconds", [None, 10.0])
def test_a_panic_is_one_error_and_its_text_is_not_shown(
    seconds: float | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtefactError) as refusal:
        call(panicking, "it fails", "do something", seconds=seconds, quiet=True)
    assert str(refusal.value) == "it fails (index out of bounds the len is 1); do something"
    assert capfd.readouterr().err == ""
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


@pytest.mark.parametrize("seconds", [None, 10.0])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), InputError("ours")])
def test_what_is_not_the_librarys_goes_on(error: BaseException, seconds: float | None) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        call(fail, "it fails", "", seconds=seconds)
    assert call(lambda: 5, "it fails", "", seconds=seconds) == 5


def test_a_call_without_an_end_is_left() -> None:
    gate = threading.Event()
    with pytest.raises(ArtefactError, match="took more than 0 s"):
        call(gate.wait, "it hangs", "", seconds=0.01)
    gate.set()


def test_calls_in_several_threads_give_stderr_back(capfd: pytest.CaptureFixture[str]) -> None:
    gate, inside = threading.Event(), threading.Event()

    def slow() -> None:
        inside.set()
        assert gate.wait(20)

    thread = threading.Thread(target=lambda: call(slow, "", "", quiet=True))
    thread.start()
    assert inside.wait(20)
    call(lambda: os.write(2, b"hidden"), "", "", quiet=True)
    gate.set()
    thread.join()
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"
