"""The checker of certificates accepts what searches find, and refuses every alteration that makes a claim false."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.formula_table import write_formula_table
from helpers.random_results import ALTERATIONS, OWN, Document, altered, document_of, random_result, signed
from helpers.search_verb import merino
from helpers.small_spaces import SMALL
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
        check(document, users_function(document["score"], document["score"]["name"]), Architecture.from_dict)
    except Refused as refused:
        return str(refused)
    return ""


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@example(18058)  # peak memory beside energy: bytes were held against the finer grid of millijoules
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
        (first_task("1: nan 0"), "negative, too high or no number"),
        (first_task("1: inf 0"), "negative, too high or no number"),
        (first_task("1: -1e-9 0"), "negative, too high or no number"),
        (first_task("1: 0 0; 1e308 0"), "negative, too high or no number"),
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
        (put("score", "name", value="own.py:heads"), "is a user's, and its function is not at hand"),
        (put("budgets", "\x1b[2J\n", value=5.0), "budget ?[2J? is 5.0"),
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


def hidden(result: SearchResult) -> Document:
    """The result with a worse architecture stated, as if it were the best."""
    other = altered("a better architecture hidden", document_of(result), random.Random(3), result)
    assert other is not None
    return other


def test_a_price_too_high_to_calculate_with_hides_nothing(paper: SearchResult) -> None:
    """Products of such a price overflow, and what is no number compares with nothing."""
    forged = hidden(paper)
    for one in forged["certificate"]["groups"][0]["classes"]:
        one["tried"] = list(range(4, 17))
        one["tasks"] = [line if line == "-" else f"{line}; 1e308 1e308" for line in one["tasks"]]
    assert refusal(signed(forged))


# The embedding is as wide as all blocks, so the programs of the two templates have no width in common.
APART = dataclasses.replace(
    SMALL, name="apart", blocks=(1, 2), widths=(64, 256), embedding_widths=(64, 256), least_width=1, least_embedding=1
)


def test_programs_without_a_common_width_hide_nothing() -> None:
    """No model steps from the one's width to the other's. That costs infinitely much, and 0 times that is no number."""
    budget = Budget.of({"parameters": 1.5e6, "weight_mb@int8": 9.0})
    result = run_search(SearchConfig(APART, budget, parse_score("flops"), "int8"))
    assert result.architecture.blocks[0].width == 64  # the wide ones fit too, but they are no better
    forged = hidden(result)
    assert refusal(document_of(result)) == "" and refusal(signed(forged))
    space = check_certificate.Space(forged["space"]["form"])
    programs = check_certificate.Programs(space, check_certificate.Metrics(space, forged), forged["budgets"]).all
    score = check_certificate.Score(forged["score"], space, None, check_certificate.plain)
    outer = [0, 1]
    tasks = check_certificate.Tasks(space, programs, outer, outer, np.array([0.0, math.inf]))
    scores = score.highest([program.template for program in programs], outer, outer)
    bounds = tasks.bounds(np.full((len(space.depths), 2), 1e-9), scores)
    one = {"first": [64, 256], "last": [64, 256], "activation": [0, None], "tried": list(space.depths)}
    one["tasks"] = [f"{bound:.12g}: 1e-9 1e-9" for bound in bounds]
    forged["certificate"].update(too_dear="", groups=[{"programs": "0 1", "classes": [one]}])
    assert "above the claimed" in refusal(signed(forged))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("table", "entries", 0, 5, value=-1.0), "an energy is negative"),
        (put("table", "faces", "faces", 0, value=[0, -1.0, 0]), "makes a part cost less"),
        (put("table", "faces", "faces", 0, value=[-0.5, 0, 0]), "makes a part cost less"),
        (lambda d: slow_parts(d, 1e12), "sums of it are not exact"),
        (lambda d: bytes_of_a_token(d, -3.0), "no token has so many bytes"),
        (lambda d: bytes_of_a_token(d, 1e-300), "no token has so many bytes"),
    ],
)
def test_numbers_that_no_machine_gives_are_refused(
    tmp_path: Path, change: Callable[[Document], object], words: str
) -> None:
    """With them sums would round, a model could cost less for each part, or a limit could not be found."""
    table = write_formula_table(tmp_path, SMALL, "int8", energy=True)
    budget = Budget.of({"energy_mj@64": 20.0, "text_ms@64": 60.0})
    config = SearchConfig(SMALL, budget, parse_score("paper"), "int8", table)
    document = document_of(run_search(config))
    assert refusal(document) == ""
    change(document)
    assert words in refusal(signed(document))


def slow_parts(document: Document, ms: float) -> None:
    """One entry takes so long, and the costs and budgets are those that follow."""
    document["table"]["entries"][0][4] = ms
    space = check_certificate.Space(document["space"]["form"])
    metrics, (template, blocks) = check_certificate.Metrics(space, document), check_certificate._found(space, document)
    m = check_certificate.plain(space.fields(template, blocks))
    document["costs"] = {key: metrics.of(key, template.vocabulary).value(m, blocks) for key in document["costs"]}
    document["budgets"] = {key: document["costs"][key] for key in document["budgets"]}


def bytes_of_a_token(document: Document, number: float) -> None:
    for vocabulary in (document["space"]["form"]["vocabularies"][0], document["choices"]["vocabulary"]):
        vocabulary["bytes_per_token"] = number
    document["space"]["sha256"] = check_certificate.canonical_hash(document["space"]["form"])


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
    claim = "the claim holds: of 304,254,720 architectures none within the budgets scores above "
    assert first.startswith(f"{good}: {claim}")
    assert second == f"{bad}: refused: it does not match its own sha256, so it was altered"


# --- the verb --------------------------------------------------------------------------------------


def test_verify_checks_a_result_and_its_table(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    table = write_formula_table(tmp_path, DEMO, "int8")
    other = write_formula_table(tmp_path / "other", DEMO, "int8", projection_ms=0.02)
    out = tmp_path / "model.json"
    merino("--space", "demo", "--table", table.path, "--decode-ms", "3@64", "--peak-mb", "20@128", "--out", out)
    done = merino(out, "--table", table.path, verb="verify")
    assert done.stdout.startswith(f"{out}: the claim holds: of 17,280 architectures none within the budgets scores")
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


def test_a_users_score_must_be_the_same_file_and_allowed(tmp_path: Path) -> None:
    own, out, ran = tmp_path / "own.py", tmp_path / "model.json", tmp_path / "ran"
    own.write_text(f"{OWN}\nopen({str(ran)!r}, 'a').close()\n")
    spec = f"{own}:heads"
    merino("--space", "demo", "--score", spec, "--params", "3M", "--out", out)
    ran.unlink()
    for verb, asked in (("verify", (out,)), ("search", ("--from", out, "--out", tmp_path / "again.json"))):
        words = f"a user's program; if you trust that program, add: --score {spec}\n"
        assert merino(*asked, verb=verb, code=2).stderr.endswith(words) and not ran.exists()
        merino(*asked, "--score", spec, verb=verb)
        ran.unlink()
    own.write_text(OWN)
    assert "own.py has changed; do not rely on it" in merino(out, "--score", spec, verb="verify", code=3).stderr
    own.unlink()
    assert "own.py does not exist; do not rely on it" in merino(out, "--score", spec, verb="verify", code=3).stderr


def test_a_users_module_must_be_the_same_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "module_of_mine.py"
    path.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    stated = {"name": "module_of_mine:heads", "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with pytest.raises(Refused, match="a user's program"):
        users_function(stated, None)
    with pytest.raises(Refused, match="module_of_mine has changed"):
        users_function({**stated, "source_sha256": "0"}, stated["name"])
    assert "module_of_mine" not in sys.modules
    assert users_function(stated, stated["name"]).__name__ == "heads"


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
    check(document, users_function(document.get("score"), None))
