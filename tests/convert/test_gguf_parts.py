"""A GGUF model in parts is one model; files of another use are refused by what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from merino_edge.convert.gguf_parts import read_model
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError

TENSORS = {f"w{i}": np.full(4, i, np.float32) for i in range(5)}


def _file(path: Path, tensors: dict[str, np.ndarray], **values: Any) -> Path:
    file = gguf.GGUFWriter(str(path), "llama")
    for key, value in values.items():
        name = key.replace("__", ".")
        getattr(file, {str: "add_string", int: "add_uint16"}[type(value)])(name, value)
    for name, value in tensors.items():
        file.add_tensor(name, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _parts(folder: Path, count: int = 3) -> list[Path]:
    names = sorted(TENSORS)
    return [
        _file(
            folder / f"m-{i + 1:05}-of-{count:05}.gguf",
            {name: TENSORS[name] for name in names[i::count]},
            split__no=i,
            split__count=count,
            split__tensors__count=len(names),
            **({"general__name": "whole"} if i == 0 else {}),
        )
        for i in range(count)
    ]


def test_any_part_gives_the_whole_model(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    for part in parts:
        model = read_model(part)
        assert model.files == tuple(parts) and model.values["general.name"] == b"whole"
        assert model.tensors.keys() == TENSORS.keys()
        assert all(np.array_equal(model.tensors[name].data, value) for name, value in TENSORS.items())


def _swap(parts: list[Path]) -> None:
    other = parts[0].with_name("x")
    parts[1].rename(other)
    parts[2].rename(parts[1])
    other.rename(parts[2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda parts: parts[1].unlink(), "m-00002-of-00003.gguf is not beside it; download all parts"),
        (_swap, "m-00002-of-00003.gguf is not part 2 of 3"),
        (lambda parts: parts[0].rename(parts[0].with_name("first.gguf")), "its name does not say which"),
        (
            lambda parts: _file(parts[1], {"w0": TENSORS["w0"]}, split__no=1, split__count=3),
            "w0 is in another part too",
        ),
        (lambda parts: _file(parts[1], {}, split__no=1, split__count=3), "says 5 tensors, its parts hold 3"),
    ],
)
def test_wrong_and_missing_parts_are_named(damage: Any, says: str, tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    damage(parts)
    given = parts[0] if parts[0].exists() else tmp_path / "first.gguf"
    with pytest.raises(ArtefactError, match=says):
        read_model(given)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"general__type": "adapter"}, "is a LoRA adapter, not a model; merge it into its base"),
        ({"adapter__type": "lora"}, "is a LoRA adapter"),
        ({"general__type": "mmproj"}, "encoder of images"),
        ({"general__type": "model", "general__name": "no weights"}, "a vocabulary without weights"),
    ],
)
def test_files_of_another_use_are_named(values: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=says) as refusal:
        read_model(_file(tmp_path / "m.gguf", {}, **values))
    assert isinstance(refusal.value, MerinoError) and refusal.value.hint
