"""Install PyCUDA in this environment, on a machine without a GPU, for the tests: pip compiles it, in a few minutes.

    python tools/install_pycuda.py

It needs nvcc. It is linked with the tests' stand-in for NVIDIA's driver (tests/helpers/libcuda.cpp), and with the
cuRAND library from a package. A board has both, and there `pip install pycuda` is enough.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
CONSTRAINTS = ["-c", str(ROOT / "constraints.txt")]


def main() -> None:
    """Install it, or say why not. Raises CalledProcessError where a step fails."""
    compiler, nvcc = shutil.which("c++") or shutil.which("g++"), shutil.which("nvcc")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if compiler is None or nvcc is None or not (toolkit / "include/cuda.h").is_file():
        print("PyCUDA is not installed: there is no CUDA toolkit (nvcc). The tests through it will be skipped")
        return
    subprocess.run([*PIP, *CONSTRAINTS, "nvidia-curand"], check=True)
    (curand,) = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/include/curand.h")
    with tempfile.TemporaryDirectory() as folder:
        driver = [compiler, "-shared", "-fPIC", "-w", "-std=c++17", "-Wl,-soname,libcuda.so.1"]
        source = str(ROOT / "tests/helpers/libcuda.cpp")
        subprocess.run([*driver, "-o", f"{folder}/libcuda.so", source, "-ldl"], check=True)
        (library,) = (curand.parent.parent / "lib").glob("libcurand.so.*")
        os.symlink(library, f"{folder}/libcurand.so")
        places = {"CPATH": f"{toolkit}/include:{curand.parent}", "LIBRARY_PATH": folder}
        subprocess.run([*PIP, *CONSTRAINTS, "pycuda"], check=True, env={**os.environ, **places})


if __name__ == "__main__":
    main()
