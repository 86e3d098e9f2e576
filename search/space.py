"""A search space: all models that a search may choose, as chains of blocks whose widths do not decrease.

A `ModelTemplate` is what all blocks of a model share: FFN kind, vocabulary, embedding width and context. A block choice
is one block that a model may have: width, FFN ratio, layers, KV heads, own or shared weights, window, and the precision
of its weights if that is open. Block choices are ordered by width. A `Candidate` is one model of the space: the index
of a template, and the index of a block choice for each block. A space knows no score, no cost and no file. `space_file`
reads it from a file, and `builtin_spaces` holds the built-in ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, get_args

from merino_edge import counts, limits
from merino_edge.architecture import Architecture, Block, Ffn
from merino_edge.errors import InputError
from merino_edge.search.block_precision import BlockPrecision


class Candidate(NamedTuple):
    """One model of a space: the index of its template, and the index of each block's choice, in order."""

    template: int
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary and the tokenizer it implies.

    `bytes_per_token` is the mean number of UTF-8 bytes of text per token. It is None if it was not measured.
    """

    size: int
    bytes_per_token: float | None = None
    tokenizer: str = "byte-level BPE"


class ModelTemplate(NamedTuple):
    """What all blocks of a model share."""

    ffn: Ffn
    vocabulary: Vocabulary
    embedding_width: int
    context: int


@dataclass(frozen=True)
class Space:
    """The values that each dimension of a model may have.

    `model` gives everything else. Its blocks, and the fields that a template sets, are ignored. Raises InputError if a
    dimension is empty or not ascending, or gives a fractional FFN width or number of heads. Raises ArchitectureError if
    `model` breaks a rule.
    """

    name: str
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    ffn_ratios: tuple[float, ...]
    layers: tuple[int, ...]
    kv_groups: tuple[int, ...]
    shared: tuple[bool, ...]
    ffn: tuple[Ffn, ...]
    embedding_widths: tuple[int, ...]
    vocabularies: tuple[Vocabulary, ...]
    contexts: tuple[int, ...]
    least_width: float  # minimum width of the first block, as a share of the embedding's width
    least_embedding: float  # minimum width of the embedding, as a share of the widest block's width
    model: Architecture
    precisions: tuple[BlockPrecision, ...] = ()  # of a block's weights; empty: the search's one for all blocks
    windows: tuple[int, ...] = (0,)  # positions that a block's layers attend to; 0: all
    origin: str = field(default="", compare=False)  # its name on the command line

    def __post_init__(self) -> None:
        # The fields that the space sets get fixed values in `model`. So spaces with the same choices are equal.
        head_dim = self.model.head_dim
        unset = {"vocab_size": 1, "max_positions": 1, "embedding_width": 1, "ffn": "relu"}
        model = dataclasses.replace(self.model, **unset, blocks=(Block(head_dim, 1, 1, 1, 1),))  # type: ignore[arg-type]
        object.__setattr__(self, "model", model)
        for name, high in _BOUNDS.items():
            choices = getattr(self, name)
            kinds = (int, float) if name == "ffn_ratios" else (int,)
            numbers = all(isinstance(x, kinds) and not isinstance(x, bool) and 0 < x <= high for x in choices)
            if not choices or not numbers or list(choices) != sorted(set(choices)):
                raise InputError(f"space {self.name}: {name} {list(choices)}", f"list ascending numbers up to {high}")
        self._check_rest()
        count = len(self.widths) * len(self.ffn_ratios) * len(self.layers) * len(self.kv_groups) * len(self.shared)
        count *= len(self.windows)
        limits.check_range(
            "widths x FFN ratios x layers x key-value heads x sharing x windows x precisions",
            count * self._copies,
            1,
            limits.MAX_BLOCK_CHOICES,
        )
        open_fields = (self.ffn, self.vocabularies, self.embedding_widths, self.contexts)
        limits.check_range("templates", math.prod(map(len, open_fields)), 1, limits.MAX_TEMPLATES)
        limits.check_range("templates x widths", len(self.templates) * len(self.widths), 1, limits.MAX_TEMPLATE_WIDTHS)
        limits.check_range("blocks x layers", self.blocks[-1] * self.layers[-1], 1, limits.MAX_LAYERS)
        for template, model in enumerate(self.models):
            if not self.width_range(template):
                raise InputError(
                    f"space {self.name}: no width goes with embedding width {model.embedding_width}",
                    "add one, or lower least_width or least_embedding",
                )
        for choice in (0, -1):  # the smallest and the largest block must be valid
            dataclasses.replace(self.models[-1], blocks=(self.block_choices[choice],) * self.blocks[-1])

    def _check_rest(self) -> None:
        def refuse_unless(*, condition: bool, message: str, hint: str) -> None:
            if not condition:
                raise InputError(f"space {self.name}: {message}", hint)

        whole = all(type(w) is int and 0 <= w <= limits.MAX_POSITIONS for w in self.windows)
        refuse_unless(
            condition=bool(self.windows) and whole and list(self.windows) == sorted(set(self.windows)),
            message=f"windows {list(self.windows)}",
            hint=f"list ascending numbers up to {limits.MAX_POSITIONS}; 0 is no window",
        )
        for name, allowed in (("shared", (False, True)), ("ffn", get_args(Ffn))):
            choices = getattr(self, name)
            valid = all(type(x) is type(allowed[0]) and x in allowed for x in choices)
            refuse_unless(
                condition=bool(choices) and valid and len(set(choices)) == len(choices),
                message=f"{name} {list(choices)}",
                hint=f"list some of {allowed}",
            )
        sizes = [v.size for v in self.vocabularies]
        refuse_unless(condition=bool(sizes), message="vocabularies is empty", hint="list at least one")
        ascending = all(type(n) is int for n in sizes) and sizes == sorted(set(sizes))
        refuse_unless(condition=ascending, message=f"vocabularies {sizes}", hint="ascending")
        for v in self.vocabularies:
            per_token = v.bytes_per_token
            refuse_unless(
                condition=per_token is None or (_is_number(per_token) and 0 < per_token <= 1024),
                message=f"bytes_per_token {per_token!r}",
                hint="give a number up to 1024 or leave it out",
            )
            text = isinstance(v.tokenizer, str)
            refuse_unless(condition=text, message=f"tokenizer {v.tokenizer!r}", hint="name it in words")
        names = [precision.name for precision in self.precisions]
        refuse_unless(
            condition=len(set(names)) == len(names) and set(names) <= set(counts.PRECISIONS),
            message=f"precisions {names}",
            hint=f"list some of {', '.join(counts.PRECISIONS)}, each once",
        )
        for precision in self.precisions:
            refuse_unless(
                condition=_is_number(precision.lost) and 0 <= precision.lost <= 1,
                message=f"precision {precision.name} loses {precision.lost!r} of a block's score",
                hint="give a share from 0 to 1, as 0.05",
            )
        for name in ("least_width", "least_embedding"):
            share = getattr(self, name)
            refuse_unless(
                condition=_is_number(share) and 0 <= share <= 64,
                message=f"{name} {share!r}",
                hint="give a share, as 0.5",
            )

    # --- templates and block choices ---

    @cached_property
    def templates(self) -> tuple[ModelTemplate, ...]:
        """Every combination of what all blocks of a model share."""
        return tuple(
            itertools.starmap(
                ModelTemplate, itertools.product(self.ffn, self.vocabularies, self.embedding_widths, self.contexts)
            )
        )

    @cached_property
    def models(self) -> tuple[Architecture, ...]:
        """Each template as an architecture whose only block is the smallest block choice."""
        return tuple(
            dataclasses.replace(
                self.model,
                ffn=template.ffn,
                vocab_size=template.vocabulary.size,
                embedding_width=template.embedding_width,
                max_positions=template.context,
                blocks=self.block_choices[:1],
            )
            for template in self.templates
        )

    @cached_property
    def block_choices(self) -> tuple[Block, ...]:
        """All blocks that a model may have, ordered by width.

        A block of one layer has nothing to share. If both kinds are allowed, only the one with own weights is listed.
        Where precisions are open, a block stands once for each of them (`precision_of`).
        """
        blocks: list[Block] = []
        for width in self.widths:
            heads = width // self.model.head_dim
            groups = [group for group in self.kv_groups if heads % group == 0]
            if heads * self.model.head_dim != width or not groups:
                raise InputError(
                    f"space {self.name}: width {width} with head_dim {self.model.head_dim} and kv_groups "
                    f"{list(self.kv_groups)}",
                    "choose widths that head_dim divides, and for each a group that divides its heads",
                )
            dimensions = (self.ffn_ratios, self.layers, groups, self.shared, self.windows)
            for ratio, layers, group, shared, window in itertools.product(*dimensions):
                if width * ratio != int(width * ratio):
                    raise InputError(
                        f"space {self.name}: width {width} with FFN ratio {ratio}", "choose ratios of whole FFN widths"
                    )
                if not (shared and layers == 1 and len(self.shared) > 1):
                    block = Block(width, layers, heads, heads // group, int(width * ratio), shared, window)
                    blocks += [block] * self._copies
        return tuple(blocks)

    @property
    def _copies(self) -> int:
        """How often each block stands among the block choices."""
        return max(1, len(self.precisions))

    def precision_of(self, choice: int) -> BlockPrecision | None:
        """The precision of a block choice; None where all blocks have the search's."""
        return self.precisions[choice % len(self.precisions)] if self.precisions else None

    def lost_of(self, choice: int) -> float:
        """The share of its score that a block choice loses by rounding; 0 where precisions are not open."""
        precision = self.precision_of(choice)
        return 0.0 if precision is None else precision.lost

    @cached_property
    def width_of(self) -> tuple[int, ...]:
        """The width index of every block choice."""
        index = {width: i for i, width in enumerate(self.widths)}
        return tuple(index[choice.width] for choice in self.block_choices)

    @cached_property
    def first_choice(self) -> tuple[int, ...]:
        """The index of the first block choice of every width, and at the end the number of block choices."""
        return tuple(bisect.bisect_left(self.width_of, i) for i in range(len(self.widths) + 1))

    def width_range(self, template: int) -> range:
        """The indices of the widths that a block may have in this template."""
        embedding = self.templates[template].embedding_width
        allowed = [w >= self.least_width * embedding and w * self.least_embedding <= embedding for w in self.widths]
        return range(allowed.index(True), allowed.index(True) + sum(allowed)) if any(allowed) else range(0)

    @cached_property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """Every pair of different widths, narrower first, between which a projection may stand."""
        inner = itertools.combinations(self.widths, 2)
        outer = ((min(e, w), max(e, w)) for e in self.embedding_widths for w in self.widths if e != w)
        return tuple(sorted({*inner, *outer}))

    # --- candidates ---

    @cached_property
    def _path_counts(self) -> list[list[list[int]]]:
        """[template][n][w]: in how many ways n blocks of width index w or higher can be chosen."""
        by_widths: dict[range, list[list[int]]] = {}
        for widths in map(self.width_range, range(len(self.templates))):
            if widths not in by_widths:
                by_widths[widths] = counts = [[1] * (len(self.widths) + 1)]
                for _ in range(self.blocks[-1]):
                    row = [0] * (len(self.widths) + 1)
                    for w in reversed(widths):
                        row[w] = row[w + 1] + (self.first_choice[w + 1] - self.first_choice[w]) * counts[-1][w]
                    counts.append(row)
        return [by_widths[self.width_range(template)] for template in range(len(self.templates))]

    @cached_property
    def _sizes(self) -> list[tuple[int, int, int]]:
        """(cumulative number of architectures, template, blocks) for every template and number of blocks."""
        pairs = list(itertools.product(range(len(self.templates)), self.blocks))
        sums = itertools.accumulate(self._path_counts[f][blocks][self.width_range(f).start] for f, blocks in pairs)
        return [(total, *pair) for total, pair in zip(sums, pairs, strict=True)]

    @property
    def size(self) -> int:
        """The number of architectures in the space. Raises InputError for one that no float holds."""
        if (size := self._sizes[-1][0]) >= 10**limits.MAX_JSON_DIGITS:
            raise InputError(
                f"space {self.name} has more than 1e{limits.MAX_JSON_DIGITS} architectures", "make it smaller"
            )
        return size

    def architecture(self, candidate: Candidate) -> Architecture:
        """The architecture of a candidate."""
        return dataclasses.replace(
            self.models[candidate.template], blocks=tuple(self.block_choices[choice] for choice in candidate.choices)
        )

    def precisions_of(self, candidate: Candidate) -> tuple[BlockPrecision, ...]:
        """The precision of each block of a candidate; () where all blocks have the search's."""
        return tuple(filter(None, map(self.precision_of, candidate.choices)))

    def candidates(self) -> Iterator[Candidate]:
        """Iterate over every candidate once, for the exhaustive search of small spaces."""
        for template, blocks in itertools.product(range(len(self.templates)), self.blocks):
            for widths in itertools.combinations_with_replacement(self.width_range(template), blocks):
                choices = (range(self.first_choice[w], self.first_choice[w + 1]) for w in widths)
                yield from (Candidate(template, choices) for choices in itertools.product(*choices))

    def sample(self, rng: random.Random) -> Candidate:
        """Draw a candidate uniformly."""
        pick = rng.randrange(self.size)
        _, template, blocks = self._sizes[bisect.bisect_right(self._sizes, pick, key=lambda entry: entry[0])]
        counts, choices, w = self._path_counts[template], [], self.width_range(template).start
        for left in reversed(range(blocks)):
            rest = rng.randrange(counts[left + 1][w])
            while (in_width := (self.first_choice[w + 1] - self.first_choice[w]) * counts[left][w]) <= rest:
                rest, w = rest - in_width, w + 1
            choices.append(self.first_choice[w] + rest // counts[left][w])
        return Candidate(template, tuple(choices))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_BOUNDS = {
    "blocks": limits.MAX_BLOCKS,
    "widths": limits.MAX_WIDTH,
    "ffn_ratios": 64,
    "layers": limits.MAX_LAYERS,
    "kv_groups": limits.MAX_HEADS,
    "embedding_widths": limits.MAX_WIDTH,
    "contexts": limits.MAX_POSITIONS,
}
