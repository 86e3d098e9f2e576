"""The features of a GPU machine, each on or off and why: the GPU, CUDA's compiler, kernels, graphs, TensorRT, sensors.

Every answer comes from a try, since a package that is installed may still not start. The try runs in a process of its
own. A driver that is broken can end the process that calls it, and the doctor must go on.

    python -m merino_edge.jetson.doctor.features    prints {name: {"on", "why"}} of what needs the GPU or its libraries
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from merino_edge import engine_store, tensorrt_library
from merino_edge.errors import MerinoError, UnsupportedError
from merino_edge.jetson.device.sensors import Sensors

SECONDS = 120  # TensorRT's first start on a board takes many
GPU, COMPILER, SCATTER, TOPK, GRAPHS = (
    "CUDA on the GPU",
    "CUDA's compiler (NVRTC)",
    "KV scatter kernel",
    "top-k kernel",
    "CUDA graphs",
)
LIBRARIES = {tensorrt_library.TENSORRT: "TensorRT", tensorrt_library.RTX: "TensorRT for RTX"}
ONNX_RUNTIME = "ONNX Runtime on CUDA"
PROBED = (GPU, COMPILER, SCATTER, TOPK, GRAPHS, *LIBRARIES.values(), ONNX_RUNTIME)
SMALLEST_KERNEL = 'extern "C" __global__ void nothing() {}', "nothing"


class Feature(TypedDict):
    """Whether a feature works here, and the version or the reason."""

    on: bool
    why: str


def features(sensors: Sensors, root: Path | str = "/") -> dict[str, Feature]:
    """All features of this machine by name. The sensors and the engine store are those below `root`."""
    reading, source = sensors.read(), sensors.power_source
    counters = ", ".join(f"{name} {count}" for name, count in reading.throttle_events.items())
    return {
        **_probed_apart(),
        "engine store": _tried(lambda: _store(root)),
        "power sensors": _feature(source.removeprefix("none: "), on=sensors.source is not None),
        "throttle counters": _feature(counters or "no file counts them", on=bool(counters)),
    }


def _feature(why: str, *, on: bool) -> Feature:
    return {"on": on, "why": why}


def _tried(attempt: Callable[[], str]) -> Feature:
    """On with what `attempt` returns, or off with the refusal that it raises."""
    try:
        return _feature(attempt(), on=True)
    except MerinoError as refusal:
        return _feature(str(refusal), on=False)
    except Exception as error:  # a library's own; the doctor goes on
        return _feature(f"{type(error).__name__}: {' '.join(str(error).split())}", on=False)


def _store(root: Path | str) -> str:
    folder = engine_store.store_folder(root)
    engine_store.check_room(folder, 1)
    engines = list(folder.glob("*.plan"))
    used_mb, free_mb = sum(file.stat().st_size for file in engines) / 1e6, shutil.disk_usage(folder).free / 1e6
    return f"{folder}: {len(engines)} engines of {used_mb:,.0f} MB, {free_mb:,.0f} MB are free"


# --- in a process of its own -----------------------------------------------------------------------


def _probed_apart() -> dict[str, Feature]:
    command = [sys.executable, "-m", "merino_edge.jetson.doctor.features"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
        output = done.stdout
        lost = f"the try ended by {_signal_name(-done.returncode)}" if done.returncode < 0 else "the try failed"
    except subprocess.TimeoutExpired as error:  # what was printed before the hang is known
        output, lost = error.stdout or b"", f"the try did not end within {SECONDS:g} s"
    except OSError as error:
        output, lost = b"", f"not tried: {error}"
    found: dict[str, Feature] = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith('{"name": ') and line.endswith("}"):  # a library may print lines of its own
            entry = json.loads(line)
            found[entry["name"]] = _feature(entry["why"], on=entry["on"])
    return {name: found.get(name, _feature(lost, on=False)) for name in PROBED}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # those for real time have no names
        return f"signal {number}"


def probe() -> Iterator[tuple[str, Feature]]:
    """What needs the GPU or its libraries. It starts the driver and the libraries in this process."""
    from merino_edge.runtime.cuda.cuda import Cuda

    cuda: Cuda | None = None
    try:
        cuda = Cuda()
    except Exception:
        reason = _tried(lambda: str(Cuda()))
        yield from ((name, reason if name == GPU else _feature("no GPU, see above", on=False)) for name in PROBED[:5])
    else:
        with closing(cuda), cuda.active():
            yield from _probe_gpu(cuda)
    for library, name in LIBRARIES.items():
        yield name, _tried(lambda library=library: _start(library))  # type: ignore[misc]
    yield ONNX_RUNTIME, _tried(_onnx_runtime)


def _probe_gpu(cuda: Any) -> Iterator[tuple[str, Feature]]:
    from merino_edge.runtime.engines import kv_scatter_kernel, topk_kernel

    memory = "one memory with the CPU" if cuda.unified else "memory of its own"
    yield GPU, _tried(lambda: f"{cuda.capability}, {memory}, through {cuda.provider}")
    kernels = {
        COMPILER: SMALLEST_KERNEL,
        SCATTER: (kv_scatter_kernel.SOURCE, kv_scatter_kernel.NAME),
        TOPK: (topk_kernel.SOURCE, topk_kernel.NAME),
    }
    for name, kernel in kernels.items():
        yield name, _tried(lambda kernel=kernel: cuda.compile(*kernel) and "compiled")  # type: ignore[misc]
    yield GRAPHS, _recorded(cuda)


def _recorded(cuda: Any) -> Feature:
    """Record a copy, as a step of an engine holds some."""
    address, host = cuda.allocate(8), cuda.pinned((1,), np.int64)
    cuda.synchronize()
    if cuda.recorded(lambda: cuda.to_device(host, address)) is None:
        return _feature("the driver refuses to record a copy; steps run without", on=False)
    return _feature("a copy was recorded", on=True)


def _start(library: str) -> str:
    trt, log = tensorrt_library.load(library)
    tensorrt_library.start(trt.Runtime, log)
    return str(trt.__version__)


def _onnx_runtime() -> str:
    import onnxruntime

    from merino_edge.jetson.profiler.backends import backend_named

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UnsupportedError("this package is for the CPU", "bundles for ONNX Runtime run there")
    backend = backend_named("onnxruntime-cuda")
    backend.check("fp16")  # a tiny model on the GPU
    return "; ".join([str(onnxruntime.__version__), *backend.warnings])


def main() -> None:
    """Print each feature as soon as it is known, since the next try may end the process."""
    for name, feature in probe():
        sys.stdout.write(json.dumps({"name": name, **feature}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
