"""The strict stand-in for NVIDIA's driver (libcuda.cpp): built once, and loaded in the driver's place.

A library that asks for libcuda.so.1 gets the one that is loaded under this name already. So PyCUDA's own module and
cuda-bindings run on it, unchanged. A machine with a real driver does not use it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from merino_edge.runtime.cuda import provider

SOURCE = Path(__file__).with_name("libcuda.cpp")
COMPILER = shutil.which("c++") or shutil.which("g++")
HELD = ("memory", "streams", "graphs", "executables", "modules", "contexts", "stack")
EXPORTED = 'extern "C" __attribute__((visibility("default")))'
# A kernel's source as host code: one thread in a block, which our kernels allow.
HOST_CUDA = """
#include <string.h>
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads()
static unsigned __float_as_uint(float number) { unsigned bits; memcpy(&bits, &number, 4); return bits; }
static float __uint_as_float(unsigned bits) { float number; memcpy(&number, &bits, 4); return number; }
static struct { int x, y; } blockIdx, threadIdx, blockDim = {1, 1};
"""


def compiled(name: str, *sources: str, options: tuple[str, ...] = ()) -> Path:
    """A shared library of C++ sources, kept in the system's temporary folder by its content."""
    assert COMPILER is not None
    digest = hashlib.sha256("\0".join((name, *sources, *options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"merino-edge-tests-{digest}"
    if not (folder / name).is_file():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            files = [Path(work) / f"{number}.cpp" for number in range(len(sources))]
            for file, source in zip(files, sources, strict=True):
                file.write_text(source)
            words = [
                "-shared",
                "-fPIC",
                "-O1",
                "-w",
                "-std=c++17",
                "-fvisibility=hidden",
                f"-Wl,-soname,{name}",
                *options,
            ]
            subprocess.run([COMPILER, *words, "-o", f"{work}/{name}", *map(str, files), "-ldl"], check=True)
            os.replace(f"{work}/{name}", folder / name)
    return folder / name


class FakeDriver:
    """The loaded stand-in: its settings, what is still held, and its failures."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(compiled("libcuda.so.1", SOURCE.read_text())), ctypes.RTLD_GLOBAL)
        self.library.fakeFailedIn.restype = ctypes.c_char_p
        for name in ("fakeCalls", "fakeCount"):
            getattr(self.library, name).restype = ctypes.c_long
        self._kept: list[object] = []  # what the library points to

    def set(self, **settings: int) -> None:
        """Set what the machine is: driver, devices, major, minor, integrated, memory, init (an error of cuInit)."""
        for name, value in settings.items():
            self.library.fakeSet(name.encode(), ctypes.c_long(value))

    def fail(self, after: int, status: int) -> None:
        """Let the call after `after` others give the error `status`."""
        self.library.fakeFail(ctypes.c_long(after), status)

    @property
    def failed_in(self) -> str:
        """The function that failed because of `fail`; empty if none was reached."""
        return str(self.library.fakeFailedIn().decode())

    @property
    def calls(self) -> int:
        return int(self.library.fakeCalls())

    def count(self, *functions: str) -> int:
        """How often these functions of the driver were called."""
        return sum(int(self.library.fakeCount(function.encode())) for function in functions)

    def held(self) -> dict[str, int]:
        """What is not given back yet."""
        counts = (ctypes.c_long * len(HELD))()
        self.library.fakeHeld(counts)
        return {name: count for name, count in zip(HELD, counts, strict=True) if count}

    def is_device(self, address: int, size: int) -> bool:
        return bool(self.library.fakeIsDevice(ctypes.c_void_p(address), ctypes.c_size_t(size)))

    def is_capturing(self, stream: int) -> bool:
        state = ctypes.c_int()
        self.library.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(state))
        return state.value != 0

    def queue(self, stream: int, function: object) -> int:
        """Queue a host function (ctypes) of one number, as a library queues its kernels."""
        self._kept.append(function)
        return int(self.library.fakeQueue(ctypes.c_void_p(stream), function, ctypes.c_long(0)))

    def add_kernel(self, source: str, name: str) -> None:
        """Let the kernel `name` run as host code of the same source."""
        (parameters,) = re.findall(rf"__global__ void {name}\(([^)]*)\)", source)
        types = [re.sub(r"\w+$", "", one.strip()) for one in parameters.split(",") if one.strip()]
        values = ", ".join(f"*({kind}*)p[{number}]" for number, kind in enumerate(types))
        run = f"""
{EXPORTED} void run(void** p, int gx, int gy, int bx) {{
    for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)
        for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y) {name}({values});
}}"""
        library = ctypes.CDLL(str(compiled(f"{name}.so", f"{HOST_CUDA}{source}\n{run}")))
        kinds = "".join("p" if "*" in kind else "i" for kind in types)
        self._kept.append(library)
        self.library.fakeKernel(name.encode(), library.run, kinds.encode())

    def reset(self) -> None:
        """As at the start, whatever a broken engine left behind."""
        self.library.fakeReset(int("pycuda" in sys.modules))


def refusing_functions(module: Path) -> str:
    """C++ of the driver's functions that `module` wants when it is loaded and the stand-in lacks: they refuse."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", module], check=True, capture_output=True, text=True)
    wanted = set(re.findall(r" U (cu[A-Z]\w*)", listed.stdout))
    missing = sorted(wanted - set(re.findall(r"^API (\w+)\(", SOURCE.read_text(), re.M)))
    return "\n".join(f"{EXPORTED} int {name}() {{ return 801; }}  // not supported" for name in missing)


@functools.cache
def load_driver() -> FakeDriver | None:
    """The stand-in in the driver's place. None where the machine has a real driver, or no compiler."""
    if COMPILER is None or ctypes.util.find_library("cuda"):
        return None
    driver = FakeDriver()
    spec = find_spec("pycuda")
    if spec is not None and spec.submodule_search_locations:
        for random_numbers in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libcurand.so.*"):
            ctypes.CDLL(str(random_numbers), ctypes.RTLD_GLOBAL)
        (module,) = Path(spec.submodule_search_locations[0]).glob("_driver*.so")
        ctypes.CDLL(str(compiled("librefusing.so", refusing_functions(module))), ctypes.RTLD_GLOBAL)
    return driver


def is_loaded() -> bool:
    """Whether this process has the stand-in, which looks like a GPU to whoever asks."""
    return load_driver.cache_info().currsize > 0 and load_driver() is not None


@pytest.fixture
def fake_driver() -> Iterator[FakeDriver]:
    """A stand-in without a past. After the test nothing may be held."""
    driver = load_driver()
    if driver is None:
        pytest.skip("this machine has NVIDIA's driver, or no C++ compiler")
    driver.reset()
    yield driver
    held = driver.held()
    driver.reset()
    if "pycuda" in sys.modules:  # it keeps a context until the process ends
        held.pop("contexts", None)
    assert held == {}


@pytest.fixture(params=list(provider.PROVIDERS))
def package(request: pytest.FixtureRequest, fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each package that calls the driver, in turn, as if no other were installed."""
    name: str = request.param
    try:
        if find_spec(name) is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(provider, "PROVIDERS", {name: provider.PROVIDERS[name]})
    return name
