"""The Pareto front as a report, a plot and a web page. The page is parsed as a browser parses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.search_verb import merino, written
from helpers.small_spaces import SMALL
from merino_edge.architecture import Architecture
from merino_edge.latency.table import LatencyTable
from merino_edge.search import pareto_report
from merino_edge.search.builtin_spaces import DEMO
from merino_edge.search.reference_models import PUBLIC

WriteTable = Callable[..., LatencyTable]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value for name in ("src", "href") if (value := found.get(name))]
        self.ids |= {value for value in (found.get("id"),) if value}
        if tag == "script":
            self.scripts.append((found, ""))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def test_the_front_is_written_in_three_forms(tmp_path: Path, write_table: WriteTable) -> None:
    table = write_table(DEMO, "int8")
    out, png, html = (tmp_path / f"front.{ending}" for ending in ("json", "png", "html"))
    options = ("--space", "demo", "--table", table.path, "--points", 8, "--kv-mb", 1.5)
    done = merino(*options, "--plot", png, "--html", html, "--json", "--out", out, verb="pareto")
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text()) and report["kind"] == "pareto_front"
    assert report["metric"] == "decode_ms@64" and len(report["points"]) == 8
    assert report["budgets"] == {"kv_mb": 1.5} and report["table"]["estimated"]
    for point in report["points"]:
        a = Architecture.from_dict(point["architecture"])
        assert a.id == point["id"] and table.model_ms(a, "decode", 64) == point["value"] <= point["limit"]
        assert point["costs"]["kv_mb"] <= 1.5 and point["score"] == point["bound"]
    assert tuple(r["name"] for r in report["references"]) == PUBLIC
    assert png.read_bytes().startswith(b"\x89PNG")

    page = Page(html.read_text())
    assert page.addresses == []  # nothing to fetch
    data = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "data"))
    assert data["points"] == report["points"] and "(estimated)" in data["title"]
    script = page.scripts[-1][1]
    assert {"chart", "details", "copy", "log", "title", "label", "name", "notes"} <= page.ids
    assert "innerHTML" not in script and "eval(" not in script
    assert "8 points of the front" in " ".join(done.stderr.split())
    shown = merino(out, verb="show").stdout
    assert "of counting against decode_ms@64" in shown and all(p["id"] in shown for p in report["points"])
    assert json.loads(merino(out, "--json", verb="show").stdout)["points"] == report["points"]


@pytest.mark.parametrize("device", ["Jetson Orin Nano 8GB (estimated)", "Jetson Orin Nano 8GB"])
def test_the_title_says_estimated_once(tmp_path: Path, device: str) -> None:
    """`merino-edge estimate` writes it into the name of the device."""
    out, html = tmp_path / "f.json", tmp_path / "f.html"
    merino("--space", "demo", "--against", "parameters", "--points", 3, "--out", out, verb="pareto")
    table = {"name": "t.jsonl", "sha256": "0", "estimated": True, "device": device}
    pareto_report.page({**json.loads(out.read_text()), "table": table}, html)
    data = next(text for attributes, text in Page(html.read_text()).scripts if attributes.get("id") == "data")
    assert json.loads(data)["title"] == "space demo, fp16, Jetson Orin Nano 8GB (estimated)"


def test_a_space_may_have_any_name(tmp_path: Path) -> None:
    """The name of a space cannot break out of the data in the page."""
    name = 'x</script><script>alert("1")</script><!--'
    document = json.loads(written(SMALL, tmp_path).read_text())
    space = tmp_path / "space.json"
    space.write_text(json.dumps({**{k: v for k, v in document.items() if k != "sha256"}, "name": name}))
    html = tmp_path / "front.html"
    merino("--space", space, "--against", "parameters", "--points", 3, "--html", html, "--out", tmp_path / "f.json",
           verb="pareto")  # fmt: skip
    page = Page(html.read_text())
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0][1])["space"]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--against", "speed"], 2, "choose one of decode_ms"),
        (["--against", "decode_ms"], 2, "--decode-ms needs a latency table"),
        (["--against", "parameters", "--points", "1"], 2, "points is 1, outside 2 to"),
        (["--against", "parameters", "--flops", "1"], 4, "the least possible is"),
        (["--against", "parameters@3"], 2, "leave @ out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = merino(*arguments, "--space", "demo", "--out", tmp_path / "f.json", verb="pareto", code=code)
    assert words in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
