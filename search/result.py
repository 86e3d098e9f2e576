"""A search: its configuration, the function that runs it, and its result.

`SearchConfig` holds everything that a search depends on. `SearchResult` can be repeated from it. The result has no
times of the search itself, so the same configuration gives the same file. This module prints nothing. A search adds
these fields to an architecture artefact:

    "score": {"name": "effective", "total": ..., "hyperparameters": {...}},
    "certificate": {"bound": ..., "gap_percent": 0.0, "architectures": 304254720},     # none scores above the bound;
                                                                                # null where nothing is proven
    "costs": {"parameters": ..., "decode_ms@256": ..., ...}, "budgets": {"decode_ms@256": 5.0}, "precision": "int4",
    "target": "rtx",            # whose bundle is counted (merino_edge.storage); null or absent: no target was named
    "choices": {"blocks": 3, "ffn": "swiglu", "vocabulary": {"size", "bytes_per_token", "tokenizer"},
                "embedding_width": 512, "context": 1024,
                "precisions": ["int4", "int8"]},        # of each block's weights; absent where the space opens none
    "ties": "more weights" | "fewer weights",       # absent in older results: fewer
    "solver": "exact" | "evolution", "solver_options": {...},       # evolution: iterations, population, parents, seed
    "space": {"name", "sha256", "form": {...}}                      # form: merino_edge.search.space_file
    "table": null | {"name", "sha256", "header": {...}, "faces": {...}, "validation": {...}, "entries": [...]}
                                                                                # table_file.to_compact
    "more_tables": [{...}]      # the same of other precisions, which time blocks of those; absent where there are none
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from merino_edge import artefact, forms, limits, names
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, BudgetError, InputError
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.table_file import from_compact, to_compact
from merino_edge.search import space_file
from merino_edge.search.brute_force import brute_force
from merino_edge.search.budget import Budget
from merino_edge.search.costs import CostModel
from merino_edge.search.evolution import Evolution, evolve
from merino_edge.search.exact.certificate import Certificate
from merino_edge.search.exact.solver import ExactSolver, OnProgress
from merino_edge.search.forms import Result
from merino_edge.search.infeasible import infeasibility_error
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score, is_users, parse_score
from merino_edge.search.space import Candidate, Space
from merino_edge.search.steady_score import check_steady

SOLVERS = ("exact", "evolution")
CERTIFICATE_VERSION = 1  # docs/certificate.md
MORE_WEIGHTS, FEWER_WEIGHTS = "more weights", "fewer weights"
OPTIONS = ("iterations", "population", "parents", "seed")  # options of the evolution


@dataclass(frozen=True)
class SearchConfig:
    """Everything that a search depends on. Raises InputError for an unknown solver or option."""

    space: Space
    budget: Budget
    score: Score
    precision: str
    table: LatencyTable | None = None
    solver: str = "exact"
    options: dict[str, int] = field(default_factory=dict)  # options of the evolution
    more_weights: bool = True  # how the last tie is decided (`Problem`)
    target: str | None = None  # whose bundle is counted; None: no target is named
    more_tables: tuple[LatencyTable, ...] = ()  # of other precisions that blocks may have

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"there is no solver {self.solver!r}", names.choose(self.solver, SOLVERS))
        if unknown := sorted(set(self.options) - set(OPTIONS if self.solver == "evolution" else ())):
            raise InputError(
                f"solver {self.solver} has no option {unknown[0]!r}", f"evolution has {', '.join(OPTIONS)}"
            )

    def problem(self) -> Problem:
        """The mathematical program. Raises InputError where the table cannot answer a budget."""
        cost_model = CostModel(self.precision, self.table, self.target, self.more_tables)
        return Problem(self.space, self.budget, self.score, cost_model, more_weights=self.more_weights)

    @staticmethod
    def of(document: dict[str, Any], where: str, own_score: str | None = None) -> SearchConfig:
        """The configuration that a result was found with.

        A result may come from anybody. So a user's score is imported only if it is `own_score`. Raises ArtefactError if
        the document does not hold the configuration. Raises InputError if a user's score is not allowed, cannot be
        found or has changed since.
        """
        forms.check(document, Result, f"{where} does not say how it was found", "give a result of merino-edge search")
        try:
            form, table = document["space"]["form"], document["table"]
            spec, limits_by_key, target = document["score"]["name"], document["budgets"], document.get("target")
            if is_users(spec) and spec != own_score:
                raise InputError(
                    f"the score of {where} is a user's program", f"if you trust that program, add: --score {spec}"
                )
            score = parse_score(spec)
            config = SearchConfig(
                space=space_file.from_dict(form, where),
                budget=Budget.of(limits_by_key),
                score=score,
                precision=document["precision"],
                table=None if table is None else from_compact(table, where),
                solver=document["solver"],
                options=dict(document["solver_options"]),
                more_weights=document.get("ties") == MORE_WEIGHTS,
                target=target,
                more_tables=tuple(from_compact(one, where) for one in document.get("more_tables", ())),
            )
            proven = config.solver != "exact" or document["certificate"]["gap_percent"] == 0
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtefactError(
                f"{where} does not say how it was found", "give a result of merino-edge search"
            ) from None
        if not proven:
            raise InputError(f"{where} was stopped before it was proven", "search again without --seconds")
        if {name: document["score"].get(name) for name in score.details} != score.details:
            raise InputError(f"score {score.spec} is not what {where} was found with", "search again with --score")
        return config


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. `certificate` is None if the score is not a sum over blocks and nothing is proven."""

    config: SearchConfig
    problem: Problem
    candidate: Candidate
    certificate: Certificate | None
    evolution: Evolution | None

    @property
    def architecture(self) -> Architecture:
        """The architecture that was found."""
        return self.problem.space.architecture(self.candidate)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precision of each of its blocks; () where the space opens none."""
        return tuple(precision.name for precision in self.problem.space.precisions_of(self.candidate))

    @property
    def total(self) -> float:
        """Its score."""
        return self.problem.total(self.candidate)

    @property
    def gap_percent(self) -> float | None:
        """How far the architecture is below the proven bound, in percent; None if there is no bound."""
        if self.certificate is None:
            return None
        bound = self.certificate.bound
        return 0.0 if bound <= self.total else dataclasses.replace(self.certificate, score=self.total).gap_percent

    def document(self) -> dict[str, Any]:
        """The fields that the artefact gets."""
        problem, config, space = self.problem, self.config, self.problem.space
        template, form = space.templates[self.candidate.template], space_file.to_dict(space)
        bound, gap = None if self.certificate is None else self.certificate.bound, self.gap_percent
        return {
            "score": {"name": config.score.spec, "total": self.total, **config.score.details},
            "certificate": {
                "version": CERTIFICATE_VERSION,
                "bound": _finite(bound),
                "gap_percent": _finite(gap),
                "architectures": space.size,
                **({} if self.certificate is None else self.certificate.proof),
            },
            "costs": problem.costs(self.candidate),
            "intervals": {key: list(bounds) for key, bounds in problem.intervals(self.candidate).items()},
            "expected": problem.expected(self.candidate),
            "budgets": problem.budget.to_dict(),
            "precision": config.precision,
            "target": config.target,
            "choices": {
                "blocks": len(self.candidate.choices),
                "ffn": template.ffn,
                "vocabulary": dataclasses.asdict(template.vocabulary),
                "embedding_width": template.embedding_width,
                "context": template.context,
                **({"precisions": list(self.precisions)} if self.precisions else {}),
            },
            "ties": MORE_WEIGHTS if config.more_weights else FEWER_WEIGHTS,
            "solver": config.solver,
            "solver_options": config.options,
            "space": {"name": space.name, "sha256": artefact.sha256_text(artefact.canonical_json(form)), "form": form},
            "table": None if config.table is None else to_compact(config.table),
            **({"more_tables": [to_compact(table) for table in config.more_tables]} if config.more_tables else {}),
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def run_search(
    config: SearchConfig, seconds: float | None = None, on_progress: OnProgress = lambda *_: None
) -> SearchResult:
    """Run a search. The exact solver follows an evolution, to say how far its result is from the optimum.

    `seconds` limits the time of the proof. Raises BudgetError if no architecture meets the budgets, or if none was
    found in that time.
    """
    problem = config.problem()
    check_steady(problem)
    evolution = None
    if config.solver == "evolution":
        evolution = evolve(
            problem, **config.options, on_progress=lambda i, best: on_progress("evolving", best, math.inf)
        )
    certificate = _prove(problem, seconds, on_progress)
    if certificate is not None and certificate.infeasible:
        raise infeasibility_error(problem)
    outcome = evolution or certificate
    if outcome is None:
        raise InputError(
            f"score {config.score.spec} is not a sum over blocks, and space {problem.space.name} is too large to try "
            "every architecture",
            "write it as NAME(model, block, depth, cut), or add: --solver evolution",
        )
    if outcome.candidate is None:
        bound = math.inf if certificate is None else certificate.bound
        ruled_out = "none was ruled out" if bound == math.inf else f"none scores above {bound:,.2f}"
        raise BudgetError(
            f"no architecture of space {problem.space.name} was found within the budgets, and {ruled_out}",
            "search longer: --seconds, --iterations",
        )
    return SearchResult(config, problem, outcome.candidate, certificate, evolution)


def _prove(problem: Problem, seconds: float | None, on_progress: OnProgress) -> Certificate | None:
    if problem.score.block is not None:
        return ExactSolver(problem, seconds, on_progress).solve()
    return brute_force(problem, seconds, on_progress) if problem.space.size <= limits.MAX_ENUMERATED else None
