"""The CUDA calls of an engine, through each package, on the strict stand-in for the driver."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from helpers.device_memory import assert_memory_comes_back
from helpers.fake_driver import FakeDriver
from helpers.stand_in_gpu import no_compiler
from merino_edge.errors import MerinoError, MissingExtraError, UnsupportedError
from merino_edge.runtime.cuda import compiler, provider
from merino_edge.runtime.cuda.cuda import Cuda, gpu_capability
from merino_edge.runtime.engines import kv_scatter_kernel

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 2, 700, 719


@pytest.fixture
def cuda(fake_driver: FakeDriver, package: str) -> Iterator[Cuda]:
    with contextlib.closing(Cuda()) as opened, opened.active():
        yield opened


def test_the_first_gpu_is_described(fake_driver: FakeDriver, package: str) -> None:
    for major, minor in ((8, 7), (11, 0)):
        fake_driver.set(major=major, minor=minor)
        assert gpu_capability() == f"SM{major}{minor}"


def test_memory_comes_back_as_it_was_sent(cuda: Cuda) -> None:
    assert_memory_comes_back(cuda)


def test_pinned_memory_is_the_gpus_too(cuda: Cuda) -> None:
    source, target = cuda.pinned((3, 5), np.int32), cuda.pinned((3, 5), np.int32)
    assert not source.any()
    source[:] = np.arange(15).reshape(3, 5)
    cuda.copy_rows(cuda.address_of(source), cuda.address_of(target), 8, 3, source_pitch=20, target_pitch=20)
    assert not target.any()  # nothing is done before
    cuda.synchronize()
    expected = np.where(np.arange(5) < 2, source, 0)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_copied_by_their_pitches(cuda: Cuda, rows: int) -> None:
    values = np.arange(64, dtype=np.uint8)
    source, target, back = cuda.allocate(64), cuda.allocate(64), np.zeros(64, np.uint8)
    cuda.to_device(values, source)
    cuda.copy_rows(source + 1, target + 2, 4, rows, source_pitch=16, target_pitch=20)
    cuda.to_host(target, back)
    cuda.synchronize()
    expected = np.zeros(64, np.uint8)
    for row in range(rows):
        expected[2 + 20 * row : 6 + 20 * row] = values[1 + 16 * row : 5 + 16 * row]
    np.testing.assert_array_equal(back, expected)


def test_a_kernel_gets_pointers_and_integers(cuda: Cuda, fake_driver: FakeDriver) -> None:
    fake_driver.add_kernel(kv_scatter_kernel.SOURCE, kv_scatter_kernel.NAME)
    rows, cache = np.arange(24, dtype=np.uint32).reshape(3, 8), np.zeros((3, 5, 8), np.uint32)
    position, address = cuda.allocate(8), cuda.allocate(cache.nbytes)
    at = cuda.allocate(rows.nbytes)
    cuda.to_device(rows, at)
    cuda.to_device(np.array([13], np.int64), position)  # which stands in row 3 of a ring of 5
    kernel = kv_scatter_kernel.KvScatterKernel(cuda, position, [at], [address], heads=[3], lengths=[5], row_bytes=32)
    kernel.queue()
    back = np.empty_like(cache)
    cuda.to_host(address, back)
    cuda.synchronize()
    cache[:, 3] = rows
    np.testing.assert_array_equal(back, cache)


def test_a_recorded_graph_reads_pinned_memory_again(cuda: Cuda) -> None:
    values, back, address = cuda.pinned((4,), np.int32), cuda.pinned((4,), np.int32), cuda.allocate(16)

    def work() -> None:
        cuda.to_device(values, address)
        cuda.to_host(address, back)

    graph = cuda.recorded(work)
    for number in (7, 8):
        values[:] = number
        cuda.launch(graph)
        assert not (back == number).any()
        cuda.synchronize()
        assert (back == number).all()


FORBIDDEN = {
    "an allocation": lambda cuda: cuda.allocate(8),
    "pinned memory": lambda cuda: cuda.pinned((1,), np.int32),
    "a copy to memory that is not pinned": lambda cuda: cuda.to_host(cuda.first, np.zeros(1, np.int32)),
    "a copy of memory that is not pinned": lambda cuda: cuda.to_device(np.zeros(1, np.int32), cuda.first),
    "waiting": lambda cuda: cuda.synchronize(),
    "an error": lambda cuda: (_ for _ in ()).throw(UnsupportedError("no")),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_is_not_recorded(cuda: Any, what: str) -> None:
    cuda.first = cuda.allocate(8)
    assert cuda.recorded(lambda: FORBIDDEN[what](cuda)) is None
    cuda.to_device(np.ones(2, np.int32), cuda.first)  # and the stream works as before
    cuda.synchronize()
    assert cuda.recorded(lambda: None) is not None


def test_a_capture_is_left_even_at_ctrl_c(cuda: Cuda) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.recorded(interrupted)
    cuda.allocate(8)
    cuda.synchronize()


def test_any_thread_may_call_within_active(fake_driver: FakeDriver, package: str) -> None:
    results: list[object] = []

    def work(cuda: Cuda) -> None:
        try:
            cuda.allocate(8)
        except UnsupportedError as refusal:
            results.append(str(refusal))
        with cuda.active(), cuda.active():
            results.append(cuda.allocate(8) > 0)

    with contextlib.closing(Cuda()) as cuda:
        thread = threading.Thread(target=work, args=(cuda,))
        thread.start()
        thread.join()
        assert "CUDA_ERROR_INVALID_CONTEXT" in str(results[0]) or "no currently active context" in str(results[0])
        assert results[1:] == [True]
    assert "stack" not in fake_driver.held()


def test_close_may_come_from_another_thread_and_twice(fake_driver: FakeDriver, package: str) -> None:
    cuda = Cuda()
    with cuda.active():
        cuda.allocate(8)
        cuda.pinned((8,), np.int32)
        assert cuda.recorded(lambda: None) is not None
    for _ in range(2):
        thread = threading.Thread(target=cuda.close)
        thread.start()
        thread.join()
    cuda.close()  # what is held is compared after the test


def test_two_hundred_times(fake_driver: FakeDriver, package: str) -> None:
    for _ in range(200):
        with contextlib.closing(Cuda()) as cuda, cuda.active():
            cuda.allocate(100)


def test_an_address_that_was_freed_is_found_out(fake_driver: FakeDriver, package: str) -> None:
    with contextlib.closing(Cuda()) as first, first.active():
        address = first.allocate(8)
    with contextlib.closing(Cuda()) as cuda, cuda.active(), pytest.raises(UnsupportedError):
        cuda.to_device(np.zeros(1, np.int64), address)


def test_errors_carry_the_drivers_name(cuda: Cuda, fake_driver: FakeDriver) -> None:
    fake_driver.set(memory=1000)
    with pytest.raises(UnsupportedError, match=r"cuMemAlloc(_v2)? gives CUDA_ERROR_OUT_OF_MEMORY") as refusal:
        cuda.allocate(2000)
    assert "--context" in refusal.value.hint
    fake_driver.set(memory=10**9)
    cuda.allocate(2000)
    fake_driver.fail(0, LAUNCH_FAILED)
    with pytest.raises(UnsupportedError, match="cuStreamSynchronize gives CUDA_ERROR_LAUNCH_FAILED"):
        cuda.synchronize()


def test_an_error_of_the_gpu_stays_until_it_is_closed(fake_driver: FakeDriver, package: str) -> None:
    with contextlib.closing(Cuda()) as cuda, cuda.active():
        at, other = cuda.allocate(8), cuda.allocate(8)
        cuda.copy_rows(at, other + 8, 8, 1, source_pitch=8, target_pitch=8)  # one row too far
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                cuda.synchronize()


NO_GPU = {
    "no GPU": ({"devices": 0}, "CUDA_ERROR_NO_DEVICE", "--runtime nvidia"),
    "a driver that was updated": ({"init": 803}, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart"),
    "an unknown error": ({"init": 999}, "CUDA_ERROR_UNKNOWN", "merino-edge doctor"),
}


@pytest.mark.parametrize("case", NO_GPU)
def test_without_a_gpu_the_line_says_why(fake_driver: FakeDriver, package: str, case: str) -> None:
    settings, error, hint = NO_GPU[case]
    fake_driver.set(**settings)
    with pytest.raises(UnsupportedError, match=f"cuInit gives {error}") as refusal:
        gpu_capability()
    assert hint in refusal.value.hint and "\n" not in str(refusal.value)


def test_without_the_drivers_library_it_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages say it by an ImportError or a RuntimeError."""
    module = f"merino_edge.runtime.cuda.{provider.PROVIDERS[package]}"
    for error in (
        ImportError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("Failed to dlopen\nlibcuda"),
    ):

        def fails(name: str, error: Exception = error) -> None:
            assert name == module
            raise error

        monkeypatch.setattr(provider, "import_module", fails)
        with pytest.raises(UnsupportedError, match="CUDA's driver cannot be loaded") as refusal:
            gpu_capability()
        assert "\n" not in str(refusal.value) and "--runtime nvidia" in refusal.value.hint


def test_a_package_that_cannot_be_loaded_is_passed_over(
    fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.driver")
    pytest.importorskip("pycuda")
    monkeypatch.setitem(sys.modules, "merino_edge.runtime.cuda.pycuda_provider", None)  # as where libcurand is missing
    with contextlib.closing(Cuda()) as cuda:
        assert cuda.provider == "cuda-bindings"


def test_without_a_package_the_hint_installs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="PyCUDA or the package cuda-bindings"):
        gpu_capability()


def test_without_a_compiler_it_is_refused_and_the_rest_works(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch)
    with pytest.raises(UnsupportedError, match="compiler is missing"):
        cuda.compile("", "any")
    cuda.synchronize()


def test_a_source_that_is_wrong_is_refused(fake_driver: FakeDriver) -> None:
    with pytest.raises(UnsupportedError, match=r"refuses|missing"):
        compiler.compiled('extern "C" __global__ void wrong( {', "wrong", "SM87")


def test_nvcc_compiles_where_nvrtc_is_missing(fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycuda.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    try:
        binary = compiler.compiled(f"// nvcc\n{kv_scatter_kernel.SOURCE}", kv_scatter_kernel.NAME, "SM87")
    except MerinoError as refusal:
        pytest.skip(str(refusal))  # no nvcc here
    assert binary.startswith(b"\x7fELF") and kv_scatter_kernel.NAME.encode() in binary
