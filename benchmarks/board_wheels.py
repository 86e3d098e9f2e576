"""Does a board install everything as wheels? Resolves the extras that a board uses, for aarch64 and JetPack's Pythons.

    python benchmarks/board_wheels.py            prints a table: Python, package, version, MB

It downloads the wheels (about 400 MB for each Python) and fails where one would have to be compiled.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("jetson", "serve", "plot", "grammar")
JETPACK = {"3.10": ("6", 35), "3.12": ("7", 39)}  # JetPack and the release of glibc, by Python


def main() -> None:
    """Print each wheel and the sum, for each Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
    print("| JetPack | Python | wheel | MB |\n|---|---|---|---:|")
    for python, (jetpack, glibc) in JETPACK.items():
        with tempfile.TemporaryDirectory() as folder:
            platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(glibc, 16, -1)]
            place = ["--python-version", python, "--implementation", "cp", "--only-binary", ":all:", "--dest", folder]
            lines = [requirement.split(";")[0] for requirement in wanted if _applies(requirement, python)]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            platforms.append("--platform=manylinux2014_aarch64")
            subprocess.run([*pip, *place, *platforms, *lines], check=True)
            wheels = sorted(Path(folder).iterdir(), key=lambda file: -file.stat().st_size)
            for wheel in wheels:
                print(f"| {jetpack} | {python} | {wheel.name} | {wheel.stat().st_size / 1e6:.1f} |")
            total = sum(wheel.stat().st_size for wheel in wheels)
            print(f"| {jetpack} | {python} | all {len(wheels)} | {total / 1e6:.1f} |")


def _applies(requirement: str, python: str) -> bool:
    """Whether a requirement's marker is true there. pip reads markers for the Python that runs it."""
    from packaging.requirements import Requirement

    marker = Requirement(requirement).marker
    there = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "aarch64"}
    return marker is None or marker.evaluate(there)


if __name__ == "__main__":
    main()
