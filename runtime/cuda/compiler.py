"""CUDA's compilers: they turn the source of a kernel into a binary for one GPU.

NVRTC is a library that cuda-bindings calls. Where it is missing, PyCUDA runs nvcc of CUDA's toolkit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from merino_edge.errors import UnsupportedError


@cache  # a sequence that outgrows its plan must not wait for the compiler again
def compiled(source: str, name: str, capability: str) -> bytes:
    """Compile the CUDA C of the kernel `name` for a compute capability such as SM87.

    Raises UnsupportedError where no compiler is found, or where it refuses the source or does not know the capability.
    """
    architecture, missing = capability.lower().replace("sm", "sm_"), []
    compilers: tuple[Callable[[str, str, str], bytes], ...] = (_by_nvrtc, _by_nvcc)
    for compiler in compilers:
        try:
            return compiler(source, name, architecture)
        except (ImportError, OSError, RuntimeError) as error:  # NVRTC's library is looked for at the first call
            missing.append(" ".join(str(error).split()))
    raise UnsupportedError(f"CUDA's compiler is missing ({'; '.join(missing)})", "install CUDA's toolkit")


def _by_nvrtc(source: str, name: str, architecture: str) -> bytes:
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    known = [f"sm_{number}" for number in nvrtc.nvrtcGetSupportedArchs()[1]]
    if architecture not in known:  # each release drops old GPUs, so an update need not help
        release = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
        said = f"CUDA {release} compiles for {', '.join(known)}, not for {architecture}"
        raise UnsupportedError(said, "install the CUDA toolkit of this board's JetPack, or one that knows the GPU")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    status, *_ = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnsupportedError(f"CUDA's compiler refuses {name}: {status.name}", "update CUDA's toolkit")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    binary = bytearray(size)
    nvrtc.nvrtcGetCUBIN(program, binary)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


def _by_nvcc(source: str, name: str, architecture: str) -> bytes:
    pycuda: Any = import_module("pycuda.compiler")
    try:
        # Its own cache is not used: it would be a second one beside ours, in the user's folder.
        return bytes(pycuda.compile(source, arch=architecture, no_extern_c=True, cache_dir=False))
    except import_module("pycuda.driver").CompileError as error:
        raise UnsupportedError(f"nvcc refuses {name}: {error}", "update CUDA's toolkit") from None
