"""Teachers for distillation: a checkpoint that runs beside the student, or its stored logits.

Both predict the next token after each token of a batch's rows. A checkpoint gives logits, stored logits give the k
largest log-probabilities. merino_edge.training.loss has the loss for both. A teacher must have the student's
tokenizer, because distributions over other tokens cannot be compared. This module knows no optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from merino_edge import checkpoint
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import Corpus
from merino_edge.distillation.teacher_logits import HEADER, TeacherLogits
from merino_edge.errors import InputError
from merino_edge.pytorch.model import Model
from merino_edge.tokenizer import Tokenizer
from merino_edge.training.config import TrainingConfig
from merino_edge.training.loss import TopK


class Teacher(Protocol):
    """A source of next-token distributions for a student."""

    @property
    def sha256(self) -> str:
        """The teacher's hash. A training resumes only with the same teacher."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer for the student's text; None where the corpus is prepared already."""

    def prepare(self, a: Architecture, corpus: Corpus, config: TrainingConfig, device: torch.device) -> None:
        """Get ready for the first step. Raises InputError where the teacher does not fit model, corpus or options."""

    def predict(self, inputs: Tensor, starts: np.ndarray, *, bf16: bool) -> Tensor | TopK:
        """Predictions after each token of inputs [B, T], the rows that begin at tokens `starts` [B] of the corpus."""


class LiveTeacher:
    """A checkpoint that runs beside the student, in evaluation mode and in the student's precision."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.sha256 = source, str(source.training["sha256"])
        self.tokenizer = Tokenizer.load(source.path)
        self._model: Model | None = None

    def prepare(self, a: Architecture, corpus: Corpus, config: TrainingConfig, device: torch.device) -> None:
        """Load the model. Raises InputError for another vocabulary or tokenizer, or too long sequences."""
        own, where = self.source.architecture, self.source.path
        if own.vocab_size != a.vocab_size:
            what = f"the teacher {where} has a vocabulary of {own.vocab_size:,}, the model {a.vocab_size:,}"
            raise InputError(what, "give a model of the teacher's vocabulary, or use: merino-edge distill generate")
        if self.tokenizer.sha256 != corpus.header["tokenizer_sha256"]:
            what = f"the corpus was made with another tokenizer than that of the teacher {where}"
            raise InputError(what, f"make it again: merino-edge tokenize SOURCES --tokenizer {where} --out CORPUS")
        if config.sequence > own.max_positions:
            what = f"sequences of {config.sequence} are longer than the teacher's {own.max_positions} positions"
            raise InputError(what, f"use --sequence {own.max_positions} or less")
        self._model = (
            Model.from_weights(own, self.source.weights, copy=False)
            .eval()
            .requires_grad_(requires_grad=False)
            .to(device)
        )

    @torch.no_grad()
    def predict(self, inputs: Tensor, starts: np.ndarray, *, bf16: bool) -> Tensor:
        """The logits [B, T, V] of the teacher."""
        assert self._model is not None
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            return self._model(inputs)  # type: ignore[no-any-return]  # [B, T, V]


class StoredTeacher:
    """The stored logits of a teacher on a corpus (`merino-edge distill logits`)."""

    tokenizer = None

    def __init__(self, stored: TeacherLogits) -> None:
        self.stored, self.sha256 = stored, str(stored.header["sha256"])

    def prepare(self, a: Architecture, corpus: Corpus, config: TrainingConfig, device: torch.device) -> None:
        """Raise InputError for another vocabulary or corpus, or another temperature than 1."""
        header, folder = self.stored.header, self.stored.folder
        if header["vocab_size"] != a.vocab_size:
            what = f"{folder} is of a vocabulary of {header['vocab_size']:,}, the model has {a.vocab_size:,}"
            raise InputError(what, "give a model of that vocabulary")
        if header["corpus_sha256"] != corpus.sha256:
            hint = "train with the folder that it was made of, or make it again: merino-edge distill logits"
            raise InputError(f"{folder} is of another corpus", hint)
        if config.temperature != 1:
            what = f"temperature is {config.temperature}, what is stored is of 1"
            raise InputError(what, "leave --temperature out, or give the teacher's checkpoint")

    def predict(self, inputs: Tensor, starts: np.ndarray, *, bf16: bool) -> TopK:
        """The stored log-probabilities and token ids, each [B, T, k]."""
        logs, ids = self.stored.rows(starts, inputs.shape[1])
        return TopK(torch.from_numpy(logs).to(inputs.device), torch.from_numpy(ids).to(inputs.device))


def load(path: Path | str) -> Teacher:
    """The teacher in a folder: a checkpoint, or stored logits (`merino-edge distill logits`). Raises ArtefactError."""
    path = Path(path)
    return StoredTeacher(TeacherLogits(path)) if (path / HEADER).is_file() else LiveTeacher(checkpoint.load(path))
