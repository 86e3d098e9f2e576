"""What stands at a path is told by the beginning of a file, however long or damaged the rest is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merino_edge import artefact
from merino_edge.errors import OutputError
from merino_edge.kind import Existing, head_of, refuse_other, what_is, words_of


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"kind": "search", "x": 1}', "search"),
        ('{\n  "kind": "architecture",\n  "pad": "%s"\n}' % ("x" * 100_000), "architecture"),
        ('{"kind": "architecture", "cut', "architecture"),
        (artefact.canonical_json({"axes": 1, "estimated": True, "kind": "latency_table"}) + "\n{}\n", "latency_table"),
        ("[1]", None),
        ('{"x": 1}', None),
        ("kind", None),
        ("", None),
        ('{"kind": 3}', None),
        ("[" * 60_000, None),
    ],
)
def test_the_head_of_a_file(tmp_path: Path, content: str, kind: str | None) -> None:
    (tmp_path / "a").write_text(content)
    assert (head_of(tmp_path / "a") or {}).get("kind") == kind


def test_what_took_long_is_dear(tmp_path: Path) -> None:
    for name, estimated, dear in (("m", False, True), ("e", True, False)):
        line = artefact.canonical_json({"estimated": estimated, "kind": "latency_table"})
        (tmp_path / name).write_text(line + "\n{}\n")
        assert what_is(tmp_path / name) == Existing("latency_table", is_dear=dear)
    assert what_is(tmp_path / "none") is None
    (tmp_path / "empty").touch()
    assert what_is(tmp_path / "empty") is None
    (tmp_path / "begun" / "state").mkdir(parents=True)
    (tmp_path / "begun" / "log.jsonl").touch()
    assert what_is(tmp_path / "begun") is None
    (tmp_path / "begun" / "letter.txt").touch()
    assert what_is(tmp_path / "begun") == Existing(None)


def test_a_folder_of_another_program_is_not_ours(tmp_path: Path) -> None:
    """A web extension has a manifest.json too."""
    (tmp_path / "manifest.json").write_text(json.dumps({"manifest_version": 3}))
    with pytest.raises(OutputError, match="not an artefact"):
        refuse_other(tmp_path, "bundle")
    artefact.write_json(tmp_path / "corpus.json", "corpus", {})
    with pytest.raises(OutputError, match="is a tokenized corpus, which a bundle never replaces"):
        refuse_other(tmp_path, "bundle")


def test_words() -> None:
    assert [words_of(kind) for kind in ("bundle", "evaluation", "training-state", "_")] == [
        "a bundle",
        "an evaluation report",
        "a training state",
        "of a kind without a name",
    ]
