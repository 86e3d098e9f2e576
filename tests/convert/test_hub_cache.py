"""A folder of the hub's cache is the model of its newest revision, and the checkpoint records which."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.tiny_huggingface import save
from merino_edge import checkpoint
from merino_edge.convert.import_model import import_model
from merino_edge.errors import ArtefactError, InputError


def _cache(tmp_path: Path, revision: str = "a" * 40) -> Path:
    """The cache of one model, as huggingface_hub lays it out: links to blobs."""
    model = save(tmp_path / "model")
    folder = tmp_path / "hub" / "models--Owner--A-model"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, folder / "blobs" / str(number))
        (folder / "snapshots" / revision / path.name).symlink_to(f"../../blobs/{number}")
    return folder


def test_each_way_to_name_it_gives_the_model(tmp_path: Path) -> None:
    folder = _cache(tmp_path)
    for number, path in enumerate((folder, folder / "snapshots" / ("a" * 40))):
        import_model(path, tmp_path / f"ckpt{number}")
        source = checkpoint.load(tmp_path / f"ckpt{number}").training["source"]
        assert source["hub"] == "Owner/A-model" and source["revision"] == "a" * 40


def test_without_a_branch_the_newest_revision_is_taken(tmp_path: Path) -> None:
    folder = _cache(tmp_path)
    (folder / "refs" / "main").write_text("../../outside")
    import_model(folder, tmp_path / "ckpt")
    assert checkpoint.load(tmp_path / "ckpt").training["source"]["revision"] == "a" * 40


def test_a_whole_cache_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    folder = _cache(tmp_path)
    with pytest.raises(InputError, match="cache of 1 models; give one of its folders: models--Owner--A-model"):
        import_model(tmp_path / "hub", tmp_path / "ckpt")
    shutil.rmtree(folder / "snapshots" / ("a" * 40))
    with pytest.raises(ArtefactError, match=r"holds no whole revision; .*Owner/A-model"):
        import_model(folder, tmp_path / "ckpt")
