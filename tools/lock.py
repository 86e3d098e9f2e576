"""Pins what is installed: versions for every supported Python, and the packages of the board's container by hash.

    pip install uv
    python tools/lock.py              constraints.txt, container-requirements.txt and docs/sbom.cdx.json
    python tools/lock.py --upgrade    with newer releases; without it, pins that still fit stay

It needs Python 3.11 and asks the package index for metadata only. The container has Python 3.10 (JetPack 6, Ubuntu
22.04) or 3.12 (JetPack 7, Ubuntu 24.04) on arm64. Of each of its packages, the hashes of the wheels that fit are kept.
So pip can take no other file, and builds none.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS, REQUIREMENTS, SBOM = "constraints.txt", "container-requirements.txt", "docs/sbom.cdx.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LINUX = {
    "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64",
    "implementation_name": "cpython", "platform_python_implementation": "CPython",
}  # fmt: skip
EXTRAS = ("dev", "jetson", "grammar")
GROUPS = ("board", "checks")  # the tools of `make release` do not go together with what the tests run with
# What follows the machine: CUDA's own packages, and PyTorch's for GPUs.
OF_THE_MACHINE = re.compile(r"(nvidia|cuda|triton|tensorrt|torch-c)")


ASKED_OF_THE_MACHINE = ("cuda-bindings", "cuda-toolkit", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "triton")


class Board(NamedTuple):
    """A Python that the container may have, with the newest C library that wheels may ask for."""

    python: str
    glibc_minor: int
    cuda: str


BOARDS = (Board("3.10", 35, "12"), Board("3.12", 39, "13"))


class Pin(NamedTuple):
    """A package of the container: its version, and the hash of each wheel that fits, by the wheel's name."""

    name: str
    version: str
    hashes: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take newer releases")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (ROOT / CONSTRAINTS).write_text(constraints(work, upgrade=upgrade))
        pins = {board: container_pins(board, work) for board in BOARDS}
    (ROOT / REQUIREMENTS).write_text(requirements(pins))
    (ROOT / SBOM).write_text(json.dumps(sbom(pins), indent=1) + "\n")
    for board, found in pins.items():
        print(f"Python {board.python}: {len(found)} packages in the container")


def resolve(out: Path, *options: str) -> None:
    """Run uv's resolver on pyproject.toml. Raises SystemExit with what it says where it finds no answer."""
    command = [shutil.which("uv") or "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *options]
    done = subprocess.run([*command, "--output-file", str(out), "pyproject.toml"], cwd=ROOT, text=True, stderr=-1)
    if done.returncode:
        raise SystemExit(f"lock: no versions go together\n{done.stderr}")


# --- constraints.txt -------------------------------------------------------------------------------


def constraints(work: Path, *, upgrade: bool) -> str:
    """The text of constraints.txt. Pins that no extra of ours reaches, such as PyCUDA's, stay as they are."""
    out = work / "resolved.txt"
    shutil.copy(ROOT / CONSTRAINTS, out)  # its pins are preferred
    words = [word for extra in EXTRAS for word in ("--extra", extra)]
    words += [word for group in GROUPS for word in ("--group", group)]
    overrides = work / "overrides.txt"  # the machine's own packages: no version of them is asked for
    overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in ASKED_OF_THE_MACHINE))
    common = ["--universal", "--python-version", PYTHONS[0], "--override", str(overrides)]
    common += ["--upgrade"] if upgrade else []
    resolve(out, *common, *words)
    old, new = by_name((ROOT / CONSTRAINTS).read_text()), by_name(out.read_text())
    lines = {name: found for name, found in new.items() if name in old or not OF_THE_MACHINE.match(name)}
    lines |= {name: found for name, found in old.items() if name not in new}
    text = "".join(f"{line}\n" for name in sorted(lines) for line in sorted(lines[name]))
    return (
        "# Pinned versions that `make` installs and the tests run with, for Python 3.10 to 3.13.\n"
        "# torch: its CPU build is enough for everything here. CUDA's packages are the machine's own.\n"
        "# Written by tools/lock.py.\n" + text
    )


def by_name(text: str) -> dict[str, list[str]]:
    """The lines of a requirements file by package, each with a marker for our Pythons alone."""
    pythons: dict[str, dict[str, list[str]]] = {}  # package -> pin -> where it applies
    for line in text.splitlines():
        if re.match(r"[a-zA-Z0-9]", line):
            requirement = Requirement(line)
            applies = [python for python in PYTHONS if _applies(requirement, python)]
            pins = pythons.setdefault(canonicalize_name(requirement.name), {})
            pins.setdefault(f"{canonicalize_name(requirement.name)}{requirement.specifier}", []).extend(applies)
    return {name: [_line(pin, at) for pin, at in pins.items() if at] for name, pins in pythons.items()}


def _applies(requirement: Requirement, python: str) -> bool:
    machine = {"python_version": python, "python_full_version": f"{python}.12", "extra": "", **LINUX}
    return requirement.marker is None or requirement.marker.evaluate(machine)


def _line(pin: str, pythons: list[str]) -> str:
    first, after = PYTHONS.index(pythons[0]), PYTHONS.index(pythons[-1]) + 1
    parts = [f'python_version >= "{PYTHONS[first]}"'] if first else []
    parts += [f'python_version < "{PYTHONS[after]}"'] if after < len(PYTHONS) else []
    return f"{pin} ; {' and '.join(parts)}" if parts else pin


# --- the container ---------------------------------------------------------------------------------


def container_pins(board: Board, work: Path) -> list[Pin]:
    """The packages of the container with this Python. Raises SystemExit where one has no wheel that fits."""
    out, needed = work / f"pylock.{board.cuda}.toml", work / "constraints.txt"
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    needed.write_text((ROOT / CONSTRAINTS).read_text() + f"\ncuda-bindings=={board.cuda}.*\n")
    more = work / f"more-{board.cuda}.txt"
    more.write_text("\n".join(build) + "\n")
    platform = f"aarch64-manylinux_2_{board.glibc_minor}"
    resolve(
        out, str(more), "--extra", "jetson", "--extra", "serve", "--constraint", str(needed), "--only-binary", ":all:",
        "--python-version", board.python, "--python-platform", platform, "--format", "pylock.toml",
    )  # fmt: skip
    packages = tomllib.loads(out.read_text())["packages"]
    return [pin_of(package, board) for package in sorted(packages, key=lambda package: str(package["name"]))]


def pin_of(package: dict[str, Any], board: Board) -> Pin:
    wheels = {wheel["url"].rpartition("/")[2]: wheel["hashes"]["sha256"] for wheel in package.get("wheels", [])}
    fitting = {name: sha256 for name, sha256 in wheels.items() if fits(name, board)}
    if not fitting:
        raise SystemExit(
            f"lock: {package['name']} {package['version']} has no wheel for Python {board.python} on arm64"
        )
    return Pin(package["name"], package["version"], fitting)


def fits(wheel: str, board: Board) -> bool:
    """Whether a wheel can be installed on the board: its Python, its C library and its processor."""
    minor = int(board.python.partition(".")[2])
    for tag in parse_wheel_filename(wheel)[3]:
        stable = tag.abi == "abi3" and re.fullmatch(r"cp3(\d+)", tag.interpreter)
        right_python = (
            tag.interpreter in ("py3", f"py3{minor}", f"cp3{minor}") and tag.abi in ("none", f"cp3{minor}")
        ) or bool(stable and int(stable[1]) <= minor)
        manylinux = re.fullmatch(r"manylinux_2_(\d+)_aarch64", tag.platform)
        right_place = tag.platform in ("any", "manylinux2014_aarch64") or bool(
            manylinux and int(manylinux[1]) <= board.glibc_minor
        )
        if right_python and right_place:
            return True
    return False


def requirements(pins: dict[Board, list[Pin]]) -> str:
    """The text of the container's requirements, for `pip install --require-hashes`."""
    head = (
        "# The packages of the board's container (Dockerfile.l4t): arm64, Python 3.10 and 3.12.\n"
        "# pip install --require-hashes --only-binary=:all: takes these files and no others.\n"
        "# Written by tools/lock.py.\n"
    )
    return head + "".join(line for board, found in pins.items() for pin in found for line in _lines(pin, board))


def _lines(pin: Pin, board: Board) -> Iterator[str]:
    hashes = [f"    --hash=sha256:{sha256}" for sha256 in sorted(set(pin.hashes.values()))]
    yield f'{pin.name}=={pin.version} ; python_version == "{board.python}" \\\n' + " \\\n".join(hashes) + "\n"


def sbom(pins: dict[Board, list[Pin]]) -> dict[str, Any]:
    """The same packages as a CycloneDX software bill of materials."""
    components = [_component(pin, board) for board, found in pins.items() for pin in found]
    project = {"type": "application", "name": "merino-edge container", "bom-ref": "container"}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": project},
        "components": components,
    }


def _component(pin: Pin, board: Board) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": f"{pin.name}=={pin.version} python{board.python}",
        "name": pin.name,
        "version": pin.version,
        "purl": f"pkg:pypi/{pin.name}@{pin.version}",
        "hashes": [{"alg": "SHA-256", "content": sha256} for sha256 in sorted(set(pin.hashes.values()))],
        "properties": [{"name": "python", "value": board.python}],
    }


if __name__ == "__main__":
    sys.exit(main())
