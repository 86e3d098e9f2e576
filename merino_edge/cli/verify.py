"""`merino-edge verify RESULT`: checks a search result by its certificate, without the solver.

The check is `search/check_certificate.py`, which runs by itself too. `--json` prints {"path", "score", "bound",
"architectures", "by_prices", "by_trying", "partial_models", "seconds"}; `by_prices` and `by_trying` count tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="Result of merino-edge search.")],
    table: Annotated[
        list[Path] | None,
        typer.Option(metavar="T.jsonl", help="The result must have been found with this latency table. Repeatable."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Your own score, if the result was found with one. It is imported and run, so trust it first.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a search result by its certificate, without the solver.

    Every score and cost is derived again, and the bound is proven again from the prices in the certificate.
    """
    from merino_edge import forms
    from merino_edge.architecture import Architecture
    from merino_edge.cli import console
    from merino_edge.errors import ArtefactError, InputError
    from merino_edge.search import check_certificate
    from merino_edge.search.forms import Result

    if not result.exists():
        raise ArtefactError(f"{result} does not exist", "check the path")
    try:
        document = check_certificate.read(result)
        forms.check(document, Result, str(result))
        function = check_certificate.users_function(document.get("score"), score)
        for path in table or ():
            _check_table(path, result, document)
        with console.stderr().status("checking"):
            outcome = check_certificate.check(document, function, Architecture.from_dict)
    except check_certificate.NotAllowed:
        spec = document["score"]["name"]
        raise InputError(
            f"the score of {result} is a user's program", f"if you trust that program, add: --score {spec}"
        ) from None
    except check_certificate.Refused as refusal:
        raise ArtefactError(f"{result}: {refusal}", "do not rely on it; search again: merino-edge search") from None
    if as_json:
        console.print_json({"path": str(result), **outcome._asdict()})
    else:
        console.print_line(f"{result}: {outcome.line()}")


def _check_table(path: Path, result: Path, document: dict[str, Any]) -> None:
    """Raise ArtefactError unless the result was found with the table at `path`."""
    from merino_edge.errors import ArtefactError
    from merino_edge.latency.table_file import load_table, to_compact

    given = to_compact(load_table(path))
    inside = [document.get("table"), *document.get("more_tables", ())]
    keys = ("sha256", "header", "faces", "entries")
    if not any(form and all(form.get(key) == given[key] for key in keys) for form in inside):
        raise ArtefactError(f"{result} was not found with table {path}", "give the table of the search")
