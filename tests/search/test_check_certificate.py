"""The checker of certificates accepts what searches find, and refuses every alteration that makes a claim false."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.formula_table import write_formula_table
from helpers.random_results import ALTERATIONS, OWN, Document, altered, document_of, random_result, signed
from helpers.search_verb import merino
from merino_edge.architecture import Architecture
from merino_edge.search import check_certificate
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import DEMO, PAPER
from merino_edge.search.check_certificate import Refused, check, users_function
from merino_edge.search.result import SearchConfig, SearchResult, run_search
from merino_edge.search.score import parse_score


def refusal(document: Document) -> str:
    """Why the checker refuses a result, "" where it accepts it."""
    try:
        check(document, users_function(document["score"]), Architecture.from_dict)
    except Refused as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_results_are_accepted_and_their_alterations_refused(scratch: Path, seed: int) -> None:
    """benchmarks/check_certificates.py does the same with thousands."""
    rng = random.Random(seed)
    result = random_result(rng, scratch)
    document = document_of(result)
    if document["certificate"]["bound"] is None:
        assert "claims no bound" in refusal(document)
        return
    assert refusal(document) == ""
    for name, (_, always) in ALTERATIONS.items():
        other = altered(name, document, rng, result)
        if other is not None:
            assert "sha256" in refusal(other), name
            told = refusal(signed(other))
            assert "\n" not in told and "sha256, so" not in told
            assert told or not always, name


@pytest.fixture(scope="module")
def paper() -> SearchResult:
    config = SearchConfig(PAPER, Budget.of({"flops": 60e9, "weight_mb@int4": 50.0}), parse_score("paper"), "int4")
    return run_search(config)


@pytest.fixture
def document(paper: SearchResult) -> Document:
    return document_of(paper)


def put(*path: Any, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def first_task(line: str) -> Callable[[Document], None]:
    return lambda document: put("certificate", "groups", 0, "classes", 0, "tasks", 3, value=line)(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("certificate", "version", value=2), "version 2; this checker reads version 1"),
        (lambda d: d["certificate"].pop("version"), "has no proof"),
        (lambda d: d.pop("certificate"), "no certificate"),
        (put("certificate", "bound", value=None), "claims no bound"),
        (put("certificate", "gap_percent", value="0"), "the gap is '0'"),
        (lambda d: d["certificate"].pop("groups"), "a field is missing"),
        (put("certificate", "groups", value=[]), "nothing is proven about 1 programs"),
        (put("certificate", "groups", 0, "programs", value="0 0"), "proven twice"),
        (put("certificate", "groups", 0, "programs", value="1"), "proven twice, or unknown"),
        (put("certificate", "too_dear", value="0"), "is called too dear, and is not"),
        (put("certificate", "groups", 0, "classes", 0, "first", value=[128, 1024]), "in none of its classes"),
        (put("certificate", "groups", 0, "classes", 0, "activation", value=[5, None]), "in none of its classes"),
        (put("certificate", "groups", 0, "classes", 0, "tried", value=[99]), "does not have a task for each depth"),
        (first_task("nan: 0 0"), "a task's bound is nan"),
        (first_task("1: nan 0"), "negative, infinite or no number"),
        (first_task("1: inf 0"), "negative, infinite or no number"),
        (first_task("1: -1e-9 0"), "negative, infinite or no number"),
        (first_task("1: 0"), "more or fewer prices than sums"),
        (first_task("1: 0 0"), "another bound than it states"),
        (first_task("none: 0 0"), "another bound than it states"),
        (first_task("words"), "a field cannot be read"),
        (put("space", "form", "widths", value=[]), "does not match its sha256"),
        (lambda d: d.pop("space"), "a field is missing (KeyError: 'space')"),
        (lambda d: d.pop("table"), "a field is missing (KeyError: 'table')"),
        (put("target", value="toaster"), "does not know how target 'toaster' stores"),
        (put("precision", value="int2"), "precision 'int2' is unknown"),
        (put("score", "name", value="best"), "is a user's, and its function is not at hand"),
        (put("score", "hyperparameters", "alpha_mha", value=0.5), "not those that its name says"),
        (put("budgets", "decode_ms@64", value=5.0), "budget decode_ms@64 is 5.0, or has no cost"),
        (put("costs", "happiness@64", value=5.0), "has a value, but the result has no table"),
        (put("architecture", "blocks", 0, "width", value=100), "not one of the space"),
        (put("architecture", "tied_head", value=False), "not one of the space"),
        (put("choices", "context", value=7), "the choices are not the architecture's"),
        (put("kind", value="space"), "no search result"),
    ],
)
def test_a_result_with_a_mistake_is_refused_in_one_line(
    document: Document, change: Callable[[Document], object], words: str
) -> None:
    assert refusal(document) == ""
    change(document)
    told = refusal(signed(document))
    assert words in told and "\n" not in told


def test_a_hidden_architecture_is_found_by_trying_too(document: Document, paper: SearchResult) -> None:
    """A forger may call every task tried. Then the checker tries them."""
    rng = random.Random(3)
    other = altered("a better architecture hidden", document, rng, paper)
    assert other is not None
    for one in other["certificate"]["groups"][0]["classes"]:
        one["tried"] = list(range(4, 17))
    assert "above the claimed" in refusal(signed(other))


def test_it_runs_alone(document: Document, repository: Path, tmp_path: Path) -> None:
    """One file of Python and NumPy: it works where nothing of merino-edge can be imported."""
    source = repository / "search" / "check_certificate.py"
    tree = ast.parse(source.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"numpy"}
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(document))
    bad.write_text(json.dumps({**document, "id": "0"}))
    copy = tmp_path / "checker.py"
    copy.write_text(source.read_text())
    done = subprocess.run([sys.executable, "-I", copy, good, bad], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{good}: the claim holds: none of 304,254,720 architectures scores above ")
    assert second == f"{bad}: refused: it does not match its own sha256, so it was altered"


# --- the verb --------------------------------------------------------------------------------------


def test_verify_checks_a_result_and_its_table(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    table = write_formula_table(tmp_path, DEMO, "int8")
    other = write_formula_table(tmp_path / "other", DEMO, "int8", projection_ms=0.02)
    out = tmp_path / "model.json"
    merino("--space", "demo", "--table", table.path, "--decode-ms", "3@64", "--peak-mb", "20@128", "--out", out)
    done = merino(out, "--table", table.path, verb="verify")
    assert done.stdout.startswith(f"{out}: the claim holds: none of 17,280 architectures scores above")
    told = json.loads(merino(out, "--json", verb="verify").stdout)
    document = json.loads(out.read_text())
    assert told["bound"] == document["certificate"]["bound"] and told["architectures"] == DEMO.size
    assert told["by_prices"] + told["by_trying"] > 0
    words = merino(out, "--table", other.path, verb="verify", code=3).stderr
    assert "was not found with table" in words
    document["table"] = None
    out.write_text(json.dumps(signed(document)))
    words = merino(out, verb="verify", code=3).stderr
    assert "has a value, but the result has no table; do not rely on it; search again" in words


def test_a_users_score_must_be_the_same_file(tmp_path: Path) -> None:
    own, out = tmp_path / "own.py", tmp_path / "model.json"
    own.write_text(OWN)
    merino("--space", "demo", "--score", f"{own}:heads", "--params", "3M", "--out", out)
    assert "the claim holds" in merino(out, verb="verify").stdout
    own.write_text(OWN + "\n")
    assert "own.py has changed; do not rely on it" in merino(out, verb="verify", code=3).stderr
    own.unlink()
    assert "own.py does not exist; do not rely on it" in merino(out, verb="verify", code=3).stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "not valid JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
        ("[]", "is no JSON object"),
        ("{}", "its score cannot be read"),
        ('{"score": 3}', "cannot be read"),
    ],
)
def test_a_file_that_is_no_result(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "model.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refused, match=words):
        _check_file(path)


def _check_file(path: Path) -> None:
    document = check_certificate.read(path)
    check(document, users_function(document.get("score")))
