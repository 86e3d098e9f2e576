"""A disk that fills while a model is imported, downloaded or exported: one line, and nothing half-written stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from helpers.hub_stand_in import Hub, point_to, serve
from helpers.small_disk import fill, small_disk
from helpers.tiny_huggingface import LLAMA, save
from merino_edge.convert import hub as hub_module
from merino_edge.convert.import_model import import_model
from merino_edge.convert.to_gguf import export_to_gguf
from merino_edge.errors import OutputError

NAME = "Owner/a-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder; beside it `model-checkpoint` and `model.gguf`, the same model."""
    folder = save(tmp_path_factory.mktemp("full") / "model", LLAMA)
    export_to_gguf(folder.with_name("model-checkpoint"), folder.with_suffix(".gguf"), "fp32")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


JOBS: dict[str, Callable[[Path, Path], object]] = {
    "import of a folder": lambda model, out: import_model(model, out / "ckpt"),
    "import of GGUF": lambda model, out: import_model(model.with_suffix(".gguf"), out / "ckpt"),
    "export to GGUF": lambda model, out: export_to_gguf(model.with_name("model-checkpoint"), out / "m.gguf", "fp32"),
}


@pytest.mark.parametrize("job", JOBS)
def test_nothing_half_written_stays(job: str, model: Path, disk: Path) -> None:
    JOBS[job](model, disk)  # it fits
    [made] = disk.iterdir()
    files = [made] if made.is_file() else list(made.iterdir())
    needed = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    if made.is_dir():
        made.rmdir()
    for free in (0, 4096, needed // 4, needed * 3 // 4, needed - 4096):
        fill(disk, free)
        with pytest.raises(OutputError, match=r"cannot write .*No space left on device.*free the disk") as refused:
            JOBS[job](model, disk)
        assert "\n" not in str(refused.value) and refused.value.exit_code == OutputError.exit_code
        assert [path.name for path in disk.iterdir()] == ["most"], f"{free} bytes were free"
        (disk / "most").unlink()


def test_a_download_that_fills_the_disk_goes_on_when_there_is_room(
    model: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is here of the weights stays in the hub's cache, and nothing else does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(disk))
    monkeypatch.setattr(hub_module, "check_room", lambda cache, needed: None)  # others fill the disk after that
    with serve(Hub({NAME: {file.name: file.read_bytes() for file in model.iterdir()}})) as hub:
        point_to(hub.address, monkeypatch)
        fill(disk, (model / "model.safetensors").stat().st_size // 2)
        with pytest.raises(OutputError, match=r"No space left on device") as refused:
            import_model(NAME, tmp_path / "ckpt")
        assert "\n" not in str(refused.value) and not (tmp_path / "ckpt").exists()
        (disk / "most").unlink()
        import_model(NAME, tmp_path / "ckpt")
