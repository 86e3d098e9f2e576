"""Every package that is installed has a pinned version, and those of the container the hashes of their wheels too."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
IN_CONTAINER = ("3.10", "3.12")  # JetPack 6's and 7's
# What follows the machine, and is pinned where that is known: TensorRT, CUDA's packages, what is compiled with CUDA.
OF_THE_MACHINE = re.compile(r"(nvidia-|cuda-|tensorrt|pycuda)")


def machine(python: str, processor: str = "x86_64") -> dict[str, str]:
    """The markers of a Linux machine with this Python."""
    return {
        "python_version": python, "python_full_version": f"{python}.9", "implementation_name": "cpython",
        "platform_machine": processor, "platform_python_implementation": "CPython", "sys_platform": "linux",
        "platform_system": "Linux", "os_name": "posix", "extra": "",
    }  # fmt: skip


def pins(text: str, python: str) -> dict[str, tuple[str, list[str]]]:
    """{package: (version, hashes)} of a requirements file, for this Python."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(re.sub(r"\s--hash=\S+", "", line))
        if requirement.marker is None or requirement.marker.evaluate(machine(python)):
            [version] = [part.version for part in requirement.specifier if part.operator == "=="]
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = version, re.findall(r"--hash=sha256:(\S+)", line)
    return found


def needed(project: dict[str, Any], python: str, *extras: str) -> Iterator[Requirement]:
    """What the package itself and these extras ask for; all extras and groups where none is named."""
    lists = [project["project"]["dependencies"]]
    optional = project["project"]["optional-dependencies"]
    lists += [optional[extra] for extra in extras or optional]
    groups = project["dependency-groups"]
    lists += [] if extras else [groups[name] for name in groups if name != "release"]  # its tools need other versions
    for text in (text for texts in lists for text in texts):
        requirement = Requirement(text)
        if requirement.name != "merino-edge" and (
            requirement.marker is None or requirement.marker.evaluate(machine(python))
        ):
            yield requirement


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_package(python: str, repository: Path, project: dict[str, Any]) -> None:
    pinned = pins((repository / "constraints.txt").read_text(), python)
    assert len(pinned) > 100
    for requirement in needed(project, python):
        name = canonicalize_name(requirement.name)
        if name in pinned or not OF_THE_MACHINE.match(name):
            assert name in pinned, f"{name} has no pin for Python {python}"
            assert requirement.specifier.contains(pinned[name][0]), f"{requirement} is not {pinned[name][0]}"


@pytest.mark.parametrize("python", IN_CONTAINER)
def test_the_container_s_packages_are_pinned_by_hash(python: str, repository: Path, project: dict[str, Any]) -> None:
    pinned = pins((repository / "container-requirements.txt").read_text(), python)
    constraints = pins((repository / "constraints.txt").read_text(), python)
    for name, (version, hashes) in pinned.items():
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), name
        assert constraints.get(name, (version,))[0] == version, f"{name} was tested at another version"
    for requirement in needed(project, python, "jetson", "serve"):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)][0]), requirement
    assert not {"torch", "pycuda"} & pinned.keys()


def test_what_builds_the_package_is_pinned(repository: Path, project: dict[str, Any]) -> None:
    for text in project["build-system"]["requires"]:
        requirement = Requirement(text)
        assert str(requirement.specifier).startswith("==")
        for file in ("constraints.txt", "container-requirements.txt"):
            for python in IN_CONTAINER:
                version = pins((repository / file).read_text(), python)[canonicalize_name(requirement.name)][0]
                assert requirement.specifier.contains(version), file


def test_the_bill_of_materials_is_that_of_the_container(repository: Path) -> None:
    document = json.loads((repository / "docs/sbom.cdx.json").read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    listed = {
        (part["properties"][0]["value"], part["name"], part["version"], part["purl"]): sorted(
            one["content"] for one in part["hashes"]
        )
        for part in document["components"]
    }
    text = (repository / "container-requirements.txt").read_text()
    assert listed == {
        (python, name, version, f"pkg:pypi/{name}@{version}"): sorted(hashes)
        for python in IN_CONTAINER
        for name, (version, hashes) in pins(text, python).items()
    }


def test_every_pinned_package_has_a_licence(repository: Path) -> None:
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", (repository / "docs/licences.md").read_text(), re.M))
    pinned = {name for python in PYTHONS for name in pins((repository / "constraints.txt").read_text(), python)}
    assert pinned <= {canonicalize_name(name) for name in listed}
    assert all(text.strip() for text in listed.values())


def test_every_extra_that_an_error_names_exists(repository: Path, project: dict[str, Any]) -> None:
    named = set()
    for room in ("merino_edge", "search", "export", "runtime", "jetson"):
        for file in (repository / room).rglob("*.py"):
            for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == "require":
                    values = [part.value for part in call.args if isinstance(part, ast.Constant)]
                    named |= set(values[1:]) if len(values) == 2 else set()  # the checker has another `require`
                if isinstance(call.func, ast.Name) and call.func.id == "require_all":
                    named |= {key.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Dict)
                              for key in node.keys if isinstance(key, ast.Constant)}  # fmt: skip
    assert {"train", "export", "tensorboard"} <= named <= project["project"]["optional-dependencies"].keys()
