"""Names in any capitals are found, and the nearest one is offered."""

from __future__ import annotations

from pathlib import Path

import pytest

from merino_edge import bundle, names
from merino_edge.errors import ArtefactError, MerinoError
from merino_edge.presets import PRESETS, preset
from merino_edge.search.builtin_spaces import SPACES, load_space
from merino_edge.search.score import parse_score


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("opt-125", "did you mean opt-125m? choose one of merino-52m, "),
        ("OPT125m", "did you mean opt-125m? "),
        ("zebra", "choose one of merino-52m, "),
        ("x" * 10**6, "choose one of merino-52m, "),
        ("", "choose one of "),
        (None, "choose one of "),
    ],
)
def test_the_nearest_name_is_offered(given: object, hint: str) -> None:
    assert names.choose(given, PRESETS).startswith(hint)


def test_capitals_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset("GPT2") == preset("gpt2")
    assert load_space("Edge") is SPACES["edge"]
    assert parse_score("Calibrated").spec == parse_score("calibrated").spec
    assert parse_score("Effective:shared_layer=0.5").spec == "effective:shared_layer=0.5"
    with pytest.raises(MerinoError, match="cannot be loaded"):  # a module of the user's own
        parse_score("Effective:score")
    monkeypatch.chdir(tmp_path)  # a file of the user's own goes before a name in other capitals
    (tmp_path / "Edge").write_text("{}")
    with pytest.raises(ArtefactError, match="Edge"):
        load_space("Edge")
    (tmp_path / "edge").mkdir()
    assert load_space("edge") is SPACES["edge"]


def test_the_nearest_file_is_offered(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").touch()
    assert names.beside(tmp_path / "tabel.jsonl") == f"did you mean {tmp_path / 'table.jsonl'}?"
    for other in ("model.json", "tab", "a/b", "\0"):
        assert names.beside(tmp_path / other) == ""
    with pytest.raises(ArtefactError, match=r"lam does not exist; did you mean lamb\?"):
        bundle.load("lam")


def test_what_cannot_be_looked_at_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    found = [names.is_missing(tmp_path / name) for name in ("nothing", "file/inside", "file", "link", "\0", "a" * 999)]
    assert found == [True, True, False, False, False, False]
