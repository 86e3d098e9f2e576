"""Text in .xz files: honest ones are read as they are, and bombs end early."""

from __future__ import annotations

import lzma
import resource
from pathlib import Path

import pytest

from merino_edge import limits
from merino_edge.data.sources import File
from merino_edge.errors import InputError
from merino_edge.packed_text import open_text, read_text

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Deich.\n" * 50


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gigabyte of spaces in 150 KB: the first stream alone passes the limit."""
    path = tmp_path_factory.mktemp("bomb") / "text.txt.xz"
    packer = lzma.LZMACompressor(preset=0)
    stream = b"".join(packer.compress(b" " * 2**24) for _ in range(5)) + packer.flush()
    path.write_bytes(stream * 13)
    assert path.stat().st_size < 2**20 and limits.MAX_SCORED_BYTES < 5 * 2**24
    return path


def test_plain_and_packed_texts_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    halves = [lzma.compress(part.encode()) for part in (TEXT[:100], TEXT[100:])]
    (tmp_path / "b.txt.xz").write_bytes(b"".join(halves))  # as `cat a.xz b.xz` makes it
    for name in ("a.txt", "b.txt.xz"):
        assert read_text(tmp_path / name, 2**20) == TEXT
        with open_text(tmp_path / name) as file:
            assert [*file] == TEXT.splitlines(keepends=True)


def test_a_text_beyond_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    assert read_text(tmp_path / "a.txt", len(TEXT.encode())) == TEXT
    with pytest.raises(InputError, match="holds more than"):
        read_text(tmp_path / "a.txt", len(TEXT.encode()) - 1)


def test_a_bomb_ends_early_and_takes_no_memory(bomb: Path) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="holds more than 64 MB of text"):
        read_text(bomb, limits.MAX_SCORED_BYTES)
    with pytest.raises(InputError, match="holds more than"):
        for _ in File(bomb).records():
            pass
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < 400 * 1024


def test_text_that_packs_well_passes(tmp_path: Path) -> None:
    """Megabytes of one sentence are honest, if dull: their ratio is that of a bomb, their size is not."""
    path = tmp_path / "dull.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode() * 2_000, preset=0))
    assert path.stat().st_size * limits.MAX_UNPACKED_RATIO < len(TEXT.encode()) * 2_000
    assert sum(map(len, File(path).records())) == len(TEXT) * 2_000 + len("<|endoftext|>")


@pytest.mark.parametrize("data", [b"no xz", lzma.compress(TEXT.encode())[:-5]])
def test_damaged_files_are_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"is not a whole \.xz file"):
        list(File(path).records())
