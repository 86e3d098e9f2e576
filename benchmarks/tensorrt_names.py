"""Has each TensorRT the names that our code uses? Asks the real bindings of several releases, without the libraries.

    python benchmarks/tensorrt_names.py                      # of JetPack 6.2, 7.1 and 7.2, and TensorRT 11
    python benchmarks/tensorrt_names.py 10.3.0               # some releases

It downloads each release's bindings, about 1 MB, into a temporary folder. They are loaded over empty stand-ins for the
libraries, in a process of their own. So their classes, methods and signatures are NVIDIA's, and no call goes further.
Names are read from our source: what is asked of `trt`, and of the variables in OBJECTS. A name that the code asks for
with `hasattr`, or only of TensorRT for RTX, may be missing. Exit code 1 if another one is.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from merino_edge import tensorrt_library
from merino_edge.errors import UnsupportedError
from merino_edge.export import tensorrt
from merino_edge.runtime.engines import rtx_runtime_cache, tensorrt_plan

RELEASES = {  # the package and its version, by the target that has this TensorRT
    "jetpack-6.2": "tensorrt-cu12-bindings==10.3.0",
    "jetpack-7.1": "tensorrt-cu12-bindings==10.13.3.9",
    "jetpack-7.2": "tensorrt-cu12-bindings==10.16.1.11",
    "tensorrt-11": "tensorrt-cu13-bindings==11.*",
}
SOURCES = (tensorrt_library, tensorrt, tensorrt_plan, rtx_runtime_cache)
OBJECTS = {  # the class of each variable in SOURCES
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "first": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "self._cache": "IRuntimeCache",
}
RESULTS = {  # the class of what a method gives
    "deserialize_cuda_engine": "ICudaEngine",
    "get_timing_cache": "ITimingCache",
    "create_timing_cache": "ITimingCache",
    "get_layer": "ILayer",
    "get_input": "ITensor",
}
# Reached only where `hasattr` or the library's name says TensorRT for RTX.
ONLY_RTX = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeConfig.set_runtime_cache",
}


class Use(NamedTuple):
    """A name that our code asks for; `arguments`: how many a call passes, without those by name."""

    owner: str  # a class of the library, or "" for its module
    name: str
    arguments: int | None = None  # None: it is not called, or with a list of unknown length

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}".lstrip(".")


def uses() -> set[Use]:
    """All that our code asks of the library."""
    return {use for module in SOURCES for use in _uses_in(ast.parse(inspect.getsource(module)))}


@cache
def asked_for() -> set[str]:
    """The names of which our code asks whether they are there."""
    found = set()
    for module in SOURCES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                owner, name = node.args
                assert isinstance(name, ast.Constant)
                found.add(str(Use(_class_of(owner) or "", str(name.value))))
    return found


def _uses_in(tree: ast.AST) -> Iterator[Use]:
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (owner := _class_of(node.value)) is not None:
            call = calls.get(node)
            unpacked = call is None or any(isinstance(argument, ast.Starred) for argument in call.args)
            yield Use(owner, node.attr, None if unpacked or call is None else len(call.args))


def _class_of(node: ast.AST) -> str | None:
    """The library's class of an expression, "" for its module, None where it is none of the library's."""
    if isinstance(node, ast.Name | ast.Attribute) and (text := ast.unparse(node)) in {"trt", *OBJECTS}:
        return OBJECTS.get(text, "")
    if isinstance(node, ast.Attribute) and (owner := _class_of(node.value)) is not None:
        return str(Use(owner, node.attr)) if node.attr[0].isupper() else None  # a class within it
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        starts = ast.unparse(node.func) == "tensorrt_library.start"
        return _class_of(node.args[0]) if starts else RESULTS.get(node.func.attr)
    return None


def problems(trt: Any) -> dict[str, str]:
    """What the module `trt` does not have or take, with the reason."""
    found = {}
    for use in sorted(uses(), key=str):
        owner: Any = trt
        for part in filter(None, use.owner.split(".")):
            owner = getattr(owner, part, None)
        if owner is None:
            found[use.owner] = "missing"
        elif not hasattr(owner, use.name):
            found[str(use)] = "missing"
        elif use.arguments is not None and not _takes(getattr(owner, use.name), use):
            found[str(use)] = f"does not take {use.arguments} arguments"
    return found


def _takes(function: Any, use: Use) -> bool:
    """Whether a form of a bound function, which its documentation lists, takes so many arguments."""
    forms = re.findall(rf"{use.name}\((self: .*)\) -> ", function.__doc__ or "")
    if not forms:  # a class, or undocumented
        return True
    for form in forms:
        parameters = re.findall(r"(?:^|, )(\w+): ", form)[1:]
        required = len(re.findall(r"(?:^|, )\w+: (?!(?:(?!, \w+: ).)* = )", form)) - 1
        if required <= use.arguments <= len(parameters):  # type: ignore[operator]
            return True
    return False


def is_expected(name: str) -> bool:
    """Whether our code can do without."""
    return bool({name, name.split(".")[0]} & (ONLY_RTX | asked_for())) or (
        name == "IRuntimeConfig" and "ICudaEngine.create_runtime_config" in asked_for()
    )


def download(requirement: str, folder: Path) -> None:
    """Unpack a wheel of bindings for this Python into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "--dest", folder, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)


def load_over_stand_ins(folder: Path) -> Any:
    """The bindings in `folder`, over libraries whose functions return no object."""
    (extension,) = folder.glob("*/tensorrt.so")
    dynamic = subprocess.run(["readelf", "-d", extension], check=True, capture_output=True, text=True).stdout
    symbols = subprocess.run(["nm", "-D", "--undefined-only", extension], check=True, capture_output=True, text=True)
    wanted = re.findall(r" U (\w+(?:_INTERNAL|Registry|ParserVersion|InferPlugins))$", symbols.stdout, re.MULTILINE)
    (folder / "functions.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    for library in re.findall(r"\[(libnv\S+)\]", dynamic):
        compiler = shutil.which("cc") or "gcc"
        words = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, folder / "functions.c"]
        subprocess.run([compiler, *words], check=True)
        ctypes.CDLL(str(folder / library), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    return importlib.import_module(extension.parent.name)


def check(requirement: str) -> bool:
    """Print a line about a release. Whether our code can use it."""
    with tempfile.TemporaryDirectory() as name:
        download(requirement, Path(name))
        trt = load_over_stand_ins(Path(name))
        found = problems(trt)
        wrong = [f"{name} ({reason})" for name, reason in found.items() if not is_expected(name)]
        log = tensorrt_library.new_log(trt)
        log.log(trt.ILogger.Severity.WARNING, "slow")
        log.log(trt.ILogger.Severity.ERROR, "no kernel")
        try:  # the library gives no object
            tensorrt_library.start(trt.Runtime, log)
            wrong.append("a runtime that did not start is not refused")
        except UnsupportedError as refusal:
            wrong += [] if "no kernel" in refusal.message else ["the logger keeps another line"]
    expected = [name for name in found if is_expected(name)]
    print(f"{trt.__version__}: {len(uses())} names, wrong: {', '.join(wrong) or 'none'}", flush=True)
    print(f"  not there, and not needed: {', '.join(expected) or 'none'}", flush=True)
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="*", help="a version, or PACKAGE==VERSION")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one release in this process
    options = parser.parse_args()
    if options.here:
        sys.exit(not check(options.here))
    asked = [text if "==" in text else f"tensorrt-cu12-bindings=={text}" for text in options.release]
    codes = []
    for requirement in asked or RELEASES.values():
        codes.append(subprocess.run([sys.executable, __file__, "--here", requirement], check=False).returncode)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
