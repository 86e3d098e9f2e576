"""Data sets of Hugging Face's `datasets` library as a source of text. Rows are streamed.

    hf:NAME[:SPLIT[:COLUMN]]     NAME is OWNER/NAME[/CONFIG][@REVISION] on the Hub, or a folder (a path that begins
                                 with / . or ~) of parquet, JSON or text files

SPLIT is "train" by default. A column holds text, messages or turns. Without COLUMN a row is read like a line of JSON
(merino_edge.data.records). The fingerprint of a data set on the Hub is its revision's commit, which is looked up once.
The fingerprint of a folder is taken over the files of the split. This module knows no tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.data import records
from merino_edge.data.records import Record
from merino_edge.errors import InputError, MerinoError, require

PREFIX = "hf:"
SPELLING = "hf:NAME[:SPLIT[:COLUMN]]"


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set. `revision` is a commit; it is None for a folder."""

    spelling: str
    name: str  # OWNER/NAME, or a folder
    config: str | None
    revision: str | None
    split: str
    column: str | None

    @property
    def is_folder(self) -> bool:
        return self.name.startswith(("/", "."))

    def fingerprint(self) -> str:
        """A hash of where the rows are from and which part of them is read. Raises InputError."""
        fields = {"config": self.config, "split": self.split, "column": self.column}
        if not self.is_folder:
            return artefact.sha256_text(
                artefact.canonical_json({**fields, "name": self.name, "revision": self.revision})
            )
        import datasets

        with _reading(self.spelling):
            files = datasets.load_dataset_builder(self.name).config.data_files or {}
            if self.split not in files:
                raise InputError(f"{self.spelling}: there is no split {self.split!r}", f"choose of {', '.join(files)}")
            hashes = [artefact.sha256_file(Path(file)) for file in files[self.split]]
        return artefact.sha256_text(artefact.canonical_json({**fields, "files": hashes}))

    def records(self) -> Iterator[Record]:
        """The rows in order. Raises InputError naming the row."""
        with _reading(self.spelling):
            rows = iter(self._rows())
        number = 0
        while True:
            with _reading(f"{self.spelling} row {number + 1}"):
                row = next(rows, None)
            if row is None:
                return
            number += 1
            where = f"{self.spelling} row {number}"
            yield (
                records.parse(row, where)
                if self.column is None
                else records.column(row[self.column], self.column, where)
            )

    def _rows(self) -> Any:
        import datasets

        rows = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
        columns = rows.column_names
        if self.column is None:
            return rows
        if columns is not None and self.column not in columns:
            what = f"{self.spelling}: there is no column {self.column!r}"
            raise InputError(what, f"choose of {', '.join(columns)}")
        return rows.select_columns([self.column])


def parse(spelling: str) -> HubDataset:
    """The data set that `spelling` names, with its revision looked up. Raises InputError, MissingExtraError."""
    name, *rest = spelling.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise InputError(f"{spelling} is not the name of a data set", f"spell it {SPELLING}")
    split, column = (*rest, None, None)[:2]
    require("datasets", "datasets")
    if name.startswith(("/", ".", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"{spelling}: {folder} is not a folder", f"spell it {SPELLING}")
        return HubDataset(spelling, str(folder.absolute()), None, None, split or "train", column)
    name, _, revision = name.partition("@")
    owner, _, rest_of_name = name.partition("/")
    short, _, config = rest_of_name.partition("/")
    dataset = HubDataset(
        spelling, f"{owner}/{short}" if short else owner, config or None, revision or None, split or "train", column
    )
    return dataclasses.replace(dataset, revision=_commit(dataset))


def _commit(dataset: HubDataset) -> str:
    """The commit that the revision of a data set names now."""
    import huggingface_hub

    with _reading(dataset.spelling):
        return str(huggingface_hub.HfApi().dataset_info(dataset.name, revision=dataset.revision).sha)


class _reading:
    """Turn any error of the library into a one-line InputError that names the data set."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, MerinoError):
            first = " ".join(str(error).split())[:200]
            raise InputError(f"{self.what} cannot be read ({first})", f"spell it {SPELLING}") from None
