"""What keeps TensorRT from being used is one typed line that names the cause; harmless errors are forgotten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merino_edge import tensorrt_library
from merino_edge.errors import MerinoError, MissingExtraError, UnsupportedError
from merino_edge.export.tensorrt import use_timing_cache
from merino_edge.tensorrt_library import RTX, RTX_LIBRARIES, TENSORRT, install_hint, load, start

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
NULL = "pybind11::init(): factory function returned nullptr"


def refusal_of_import(package: Path, monkeypatch: pytest.MonkeyPatch) -> MerinoError:
    """What `load` says about the package `tensorrt` in the folder `package`."""
    monkeypatch.syspath_prepend(package)
    for name in [name for name in sys.modules if name.split(".")[0] == TENSORRT]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnsupportedError) as refusal:
        load(TENSORRT)
    assert "\n" not in str(refusal.value)
    return refusal.value


def test_bindings_whose_library_the_host_does_not_give_name_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real extension that is linked to a library which is then removed."""
    compiler = shutil.which("cc") or pytest.skip("needs a compiler")
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "dla.c").write_text("int dla(void) { return 0; }")
    (tmp_path / "trt.c").write_text(
        "int dla(void); int use(void) { return dla(); } void *PyInit_tensorrt(void) { return 0; }"
    )
    dla = tmp_path / "libnvdla_compiler.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", dla, tmp_path / "dla.c"], check=True)
    extension = tmp_path / "tensorrt" / "tensorrt.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", extension, tmp_path / "trt.c", dla], check=True)
    dla.unlink()
    (tmp_path / "tensorrt" / "__init__.py").write_text("from .tensorrt import *")
    said = refusal_of_import(tmp_path, monkeypatch)
    assert "libnvdla_compiler.so" in said.message and "--runtime nvidia" in said.hint


def test_a_library_of_the_wheel_that_gets_no_memory_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's own loader swallows that; a library too large for any address space says the same here."""
    for package in (RTX, RTX_LIBRARIES):
        (tmp_path / package).mkdir()
        monkeypatch.delitem(sys.modules, package, raising=False)
    missing = "raise ImportError('libhuge.so.1: cannot open shared object file: No such file or directory')"
    (tmp_path / RTX / "__init__.py").write_text(missing)
    (tmp_path / RTX_LIBRARIES / "__init__.py").write_text("")
    compiler = shutil.which("cc") or pytest.skip("needs a compiler")
    (tmp_path / "huge.c").write_text('char huge[1L << 46] __attribute__((section(".bss")));')
    huge = tmp_path / RTX_LIBRARIES / "libhuge.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-mcmodel=large", "-o", huge, tmp_path / "huge.c"], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MemoryError):
        load(RTX)
    huge.unlink()
    monkeypatch.delitem(sys.modules, RTX, raising=False)
    with pytest.raises(UnsupportedError, match="cannot be imported"):
        load(RTX)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (
            "raise ImportError('Python version mismatch: module was compiled for Python 3.10, but the interpreter "
            "version is incompatible: 3.12.3.')",
            "built for Python 3.10; make the environment with python3.10 -m venv --system-site-packages VENV",
        ),
        ("from .tensorrt import *", "built for another Python; make the environment with the system's python3"),
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
            "a library is missing",
        ),
    ],
)
def test_bindings_that_cannot_be_imported_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, hint: str
) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text(code)
    assert hint in refusal_of_import(tmp_path, monkeypatch).hint


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("", "sudo apt install python3-libnvinfer, then python3 -m venv --system-site-packages"),
        (f"python{HERE}", f"does not see {{root}}/usr/lib/python{HERE}/dist-packages/tensorrt"),
        ("python3", "does not see {root}/usr/lib/python3/dist-packages/tensorrt"),
        ("python3.7", f"is for Python 3.7, this is {HERE}; make the environment with: python3.7 -m venv --system-site"),
    ],
)
def test_on_arm_the_hint_is_the_boards_own_tensorrt_and_never_pip(tmp_path: Path, folder: str, said: str) -> None:
    if folder:
        (tmp_path / "usr/lib" / folder / "dist-packages/tensorrt").mkdir(parents=True)
    hint = install_hint(TENSORRT, tmp_path, "aarch64")
    assert said.format(root=tmp_path) in hint and "pip" not in hint
    assert "pip" not in install_hint(RTX, tmp_path, "aarch64")
    assert install_hint(TENSORRT, tmp_path, "x86_64") == "run: pip install 'merino-edge[tensorrt]'"


def test_where_no_tensorrt_is_installed_arm_hears_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "find_spec", lambda name: None)
    for machine, has_pip in (("aarch64", False), ("x86_64", True)):
        monkeypatch.setattr(tensorrt_library.platform, "machine", lambda machine=machine: machine)
        for refused in (tensorrt_library.installed, lambda: load(TENSORRT)):
            with pytest.raises(MissingExtraError) as refusal:
                refused()
            assert ("pip install" in str(refusal.value)) == has_pip


def test_cuda_that_does_not_start_is_typed() -> None:
    """The full library's bindings raise TypeError then, with the reason in the log."""
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    trt, log = load(RTX)

    def builder(log: Any) -> None:
        log.log(trt.ILogger.Severity.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
        raise TypeError(NULL)

    with pytest.raises(
        UnsupportedError, match="TensorRT cannot start: CUDA initialization failure with error: 35"
    ) as refusal:
        start(builder, log)
    assert "merino-edge generate BUNDLE --cpu" in refusal.value.hint  # build, profile and doctor have no --cpu
    assert isinstance(start(trt.Builder, log), trt.Builder)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_damaged_timing_cache_is_not_the_reason_of_a_later_failure() -> None:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    trt, log = load(RTX)
    config = trt.Builder(log).create_builder_config()
    log.log(trt.ILogger.Severity.ERROR, "timing cache: bad magic")  # where there is a GPU the library says so itself
    use_timing_cache(config, b"garbage", log)
    log.log(trt.ILogger.Severity.WARNING, "slow")
    log.log(trt.ILogger.Severity.ERROR, "no kernel\nfor MatMul")
    log.log(trt.ILogger.Severity.ERROR, "gave up")
    assert log.first == "no kernel"
    assert log.reason() == "no kernel"
    log.forget()
    log.log(trt.ILogger.Severity.ERROR, "Error Code 1: Myelin (Unexpected exception std::bad_alloc In createMyelinOp)")
    with pytest.raises(MemoryError):
        log.reason()
