"""The documentation site builds without a warning, its reference holds every verb and name, and links are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import merino_edge
from merino_edge.cli.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: warnings are errors."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def headings(page: Path) -> set[str]:
    """The texts of a built page's headings, without the links beside them."""
    found = re.findall(r"<h[23] id=[^>]*>(.*?)<a ", page.read_text())
    return {re.sub(r"<[^>]*>", "", text) for text in found}


def test_every_verb_is_in_the_reference(site: Path) -> None:
    verbs = {*VERBS, "distill generate", "distill logits"}
    assert verbs <= headings(site / "commands/index.html")


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    assert set(merino_edge.__all__) <= headings(site / "api/index.html")


def test_every_artefact_has_its_form(site: Path) -> None:
    page = (site / "artefacts/index.html").read_text()
    for kind in ("latency_table", "architecture", "bundle", "corpus", "study", "recipe", "prompts", "teacher_logits"):
        assert kind in page


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
