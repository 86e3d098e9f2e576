"""The weight files of a Hugging Face folder, and one weight at a time as float32.

They are `model.safetensors`, its shards by `model.safetensors.index.json`, or shards whose names say that none lacks.
Every float type becomes float32, float8 too. Pickled weights (.bin, .pt) are never read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from merino_edge import artefact
from merino_edge.checkpoint import check_header_size
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError, require_all

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # as ml_dtypes names them; NumPy has neither
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57_344.0}
UNQUANTISED = "choose the model's unquantised files, which are float16, bfloat16 or float32"
LFS_POINTER = b"version https://git-lfs"


def find(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files of weights in `folder`, and which file an index says that each weight is in.

    Raises ArtefactError (missing shards), UnsupportedError (pickles only), InputError (a folder of GGUF files).
    """
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS], {}
    if (folder / INDEX).is_file():
        check_is_content(folder / INDEX)
        document = artefact.parse_json(artefact.read_text(folder / INDEX), str(folder / INDEX))
        by_weight = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(by_weight, dict) or not by_weight:
            raise ArtefactError(f"{folder / INDEX} has no weight_map", "download it again")
        for name in by_weight.values():
            if not isinstance(name, str) or PurePath(name).name != name or not (folder / name).is_file():
                raise ArtefactError(
                    f"{folder / INDEX} names {name!r}, which is no file beside it", "download the folder again"
                )
        return [folder / name for name in sorted(set(by_weight.values()))], by_weight
    names = sorted(path.name for path in folder.iterdir())
    if shards := [match for match in map(SHARD.fullmatch, names) if match]:
        of = int(shards[0][2])
        if other := next((match[0] for match in shards if match[2] != shards[0][2]), ""):
            raise ArtefactError(
                f"{folder} holds shards of two models, {shards[0][0]} and {other}", "remove those of one"
            )
        wanted = [f"model-{i:05}-of-{of:05}.safetensors" for i in range(1, of + 1)]
        if missing := sorted(set(wanted) - set(names)):
            raise ArtefactError(f"{folder} lacks the shard {missing[0]}", "download the folder again")
        return [folder / name for name in wanted], {}
    raise _nothing(folder, names)


def _nothing(folder: Path, names: Sequence[str]) -> MerinoError:
    """The error for a folder without weights that can be read. Its hint is what can be done with what is there."""
    for name in names:
        if Path(name).suffix in PICKLES:
            to = shlex.quote(f"{folder.resolve().name}-safetensors")
            code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r})"
            return UnsupportedError(
                f"{folder / name} is not safetensors, and a pickle can run code when it is read",
                "if the repository has no .safetensors files either, and you trust it, convert it once: "
                f'python -c "{code}.save_pretrained({to!r})" and copy tokenizer.json and tokenizer_config.json there',
            )
    for name in names:
        if Path(name).suffix == ".gguf":
            return InputError(f"{folder} holds GGUF files", f"give one of them: {folder / name}")
    other = [name for name in names if name.endswith(".safetensors")]
    found = f"; it holds {other[0]}, a layout of another program" if other else ""
    return ArtefactError(f"{folder} holds no {SAFETENSORS}{found}", "download the model's .safetensors files")


def check_is_content(path: Path) -> None:
    """Raise ArtefactError where git left a pointer in place of a large file."""
    if artefact.read_head(path, len(LFS_POINTER)) == LFS_POINTER:
        raise ArtefactError(f"{path} is a pointer of Git LFS, not the file itself", "run there: git lfs pull")


class StoredWeights:
    """The weights of safetensors files by their stored names."""

    def __init__(self, files: Sequence[Path], extra: str = "import") -> None:
        """Open `files`. Raises ArtefactError (damaged, or a weight twice), MissingExtraError."""
        require_all({extra: ["safetensors", "ml_dtypes"]})
        import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
        from safetensors import safe_open

        self._opened: dict[Path, Any] = {}
        self.file_of: dict[str, Path] = {}
        self.notes: dict[Path, str] = {}  # what is odd about a file
        for file in files:
            check_is_content(file)
            check_header_size(file)
            with _readable(file):
                self._opened[file] = safe_open(file, framework="np")
                names = list(self._opened[file].keys())
            for name in names:
                if name in self.file_of:
                    raise ArtefactError(f"{file}: weight {name} appears twice", "download the folder again")
                self.file_of[name] = file

    def load(self, name: str) -> np.ndarray:
        """The weight as float32, in the shape as stored. Raises ArtefactError, UnsupportedError (no float)."""
        file = self.file_of[name]
        with _readable(file):
            kind = self._opened[file].get_slice(name).get_dtype()
            if kind in FLOAT8:
                array = _float8(file, name, FLOAT8[kind])
                if array.size and float(np.abs(array).max()) == LARGEST[kind] and file not in self.notes:
                    self.notes[file] = (
                        f"{file.name}: {name} reaches {LARGEST[kind]:g}, the largest number of float8, as quantised "
                        "weights do; no file has their scales, so they are taken as they are"
                    )
                return array
            if kind.startswith(("F8_", "F6_")) or kind == "F4":
                raise UnsupportedError(f"{file}: {name} is {kind}, a quantised type", UNQUANTISED)
            array = self._opened[file].get_tensor(name)
        if array.dtype.name not in FLOATS:
            raise UnsupportedError(f"{file}: {name} is {array.dtype.name}, not a float", UNQUANTISED)
        return np.asarray(array, np.float32)


def _float8(file: Path, name: str, kind: str) -> np.ndarray:
    """A float8 weight, which the library cannot give to NumPy. Its header was checked when the file was opened."""
    import ml_dtypes

    with open(file, "rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(header_bytes))[name]
        begin, end = entry["data_offsets"]
        opened.seek(8 + header_bytes + begin)
        data = opened.read(end - begin)
    return np.frombuffer(data, getattr(ml_dtypes, kind)).reshape(entry["shape"]).astype(np.float32)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (MerinoError, MemoryError):
        raise
    except Exception as error:  # the library raises its own errors, and those of numpy for types that it lacks
        raise ArtefactError(
            f"{file} cannot be read ({error})", "it is damaged or truncated; download it again"
        ) from None
