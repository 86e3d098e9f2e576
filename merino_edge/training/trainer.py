"""The trainer: a model, its optimizer and the step they have reached, by the paper's recipe, with exact resume.

Batches are a function of the step (merino_edge.data.corpus), and the model has no dropout. So a resumed training ends
with the bits of an uninterrupted one, on the same CPU and thread count. Any number of workers sees the same batches
(merino_edge.training.distributed). It knows no file: merino_edge.training.train writes them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import IGNORED, Corpus
from merino_edge.errors import ArtefactError, InputError
from merino_edge.pytorch.model import Model
from merino_edge.training import device
from merino_edge.training.config import TrainingConfig
from merino_edge.training.distributed import Workers, full_tensor, shard
from merino_edge.training.loss import distillation_loss, next_token_loss
from merino_edge.training.optimizer import Optimizer
from merino_edge.training.teacher import Teacher

VALIDATION_TOKENS = 2**14


class Diverged(InputError):
    """The loss or the gradient is not finite. The model is unchanged by that step."""


def check(a: Architecture, config: TrainingConfig, workers: Workers) -> None:
    """Raise InputError for options that do not fit together, before any worker writes a file.

    When one worker fails, torchrun kills the others, and they clean nothing up.
    """
    if config.sequence > a.max_positions:
        what = f"sequences of {config.sequence} are longer than the model's {a.max_positions} positions"
        raise InputError(what, f"use --sequence {a.max_positions} or less")
    if workers.is_distributed and workers.parallel == "fsdp" and config.optimizer == "muon":
        raise InputError("Muon needs whole matrices, FSDP divides them", "use --parallel ddp, or --optimizer adamw")
    workers.shard_of_batch(config.batch)


class Trainer:
    """A model, its optimizer and the step they have reached."""

    def __init__(
        self,
        a: Architecture,
        corpus: Corpus,
        config: TrainingConfig,
        *,
        start: Checkpoint | None = None,
        teacher: Teacher | None = None,
        workers: Workers | None = None,
        compiled: bool = False,
    ) -> None:
        """Begin with random weights, or with those of `start`, a checkpoint of `a`.

        Raises InputError where the options, the corpus and the teacher do not fit together.
        """
        self.corpus, self.config, self.step, self.gradient_norm = corpus, config, 0, 0.0
        self.workers = workers or Workers()
        check(a, config, self.workers)
        if (tokens := corpus.header["tokenizer_tokens"]) > a.vocab_size:
            what = f"the corpus has {tokens} tokens, the model's vocabulary {a.vocab_size}"
            raise InputError(what, "make it again with the model's vocabulary: merino-edge tokenize")
        self.batch_shard = self.workers.shard_of_batch(config.batch)
        self.device = self.workers.device
        self.bf16 = device.uses_bf16(config.precision, self.device)
        if (teacher is None) != (config.teacher_weight == 0):
            what = "a teacher without a weight" if teacher is not None else "a weight for a teacher that there is not"
            raise InputError(what, "give --teacher and a --teacher-weight above 0 together, or neither")
        self.teacher = teacher
        if teacher is not None:
            teacher.prepare(a, corpus, config, self.device)
        self.start_sha256 = None if start is None else start.training["sha256"]
        self.model = Model(a, config.seed) if start is None else Model.from_weights(a, start.weights)
        self.model.to(self.device)
        if compiled:
            self.model.compile()
        self.wrapped_model = self.workers.wrap(self.model)
        self.optimizer = Optimizer(self.model, config)

    def _losses(
        self, inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the cross-entropy of tokens [B, T], as `next_token_loss` gives them.

        With `starts`, the first tokens [B] of the rows, the loss has the teacher's part too.
        """
        x, y = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (inputs, targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.wrapped_model(x)  # [B, T, V]
        total, entropy = next_token_loss(logits, y, self.config.z_loss)
        if self.teacher is None or starts is None:
            return total, entropy
        c, predicted = self.config, self.teacher.predict(x, starts, bf16=self.bf16)
        divergence = distillation_loss(logits, predicted, y, c.temperature, c.direction)
        return total + c.teacher_weight * (divergence - entropy), entropy

    def train_step(self) -> float:
        """Do one optimizer step and return the batch's mean loss in nats. Raises Diverged, with the model unchanged."""
        c = self.config
        starts = self.corpus.starts(self.step, c.batch, c.sequence, c.seed)
        inputs, targets = self.corpus.rows(starts, c.sequence)
        learned = max(1, int((targets != IGNORED).sum()))  # over all workers
        starts, inputs, targets = starts[self.batch_shard], inputs[self.batch_shard], targets[self.batch_shard]
        self.optimizer.zero_grad()
        entropies = []
        for first in range(0, len(inputs), c.micro_batch):
            rows = slice(first, first + c.micro_batch)
            with self.workers.accumulate_gradients(last=first + c.micro_batch >= len(inputs)):
                total, entropy = self._losses(inputs[rows], targets[rows], starts[rows])
                (total * (self.workers.world_size / learned)).backward()  # type: ignore[no-untyped-call]
            entropies.append(entropy.detach())
        (loss,) = self.workers.all_reduce_sum(sum(float(entropy) for entropy in entropies) / learned)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip))
        self.gradient_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(self.gradient_norm)):
            raise Diverged(self._divergence(loss, entropies), "train again with a lower --learning-rate")
        self.optimizer.step(c.learning_rate_at(self.step))
        self.step += 1
        return loss

    def _divergence(self, loss: float, entropies: list[Tensor]) -> str:
        """The message about a diverged step: its number, and the sequences of its batch."""
        bad = [i for i, entropy in enumerate(entropies) if not math.isfinite(float(entropy))]
        what = f"loss {loss}, gradient {self.gradient_norm}"
        if bad:
            first = self.batch_shard.start + bad[0] * self.config.micro_batch
            what += f", first in sequences {first} to {min(self.batch_shard.stop, first + self.config.micro_batch) - 1}"
        return f"training diverged at step {self.step + 1} ({what})"

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss in nats per token over a fixed part of the held-out tokens, for the weights to be saved.

        Raises Diverged where it is not finite.
        """
        c = self.config
        inputs, targets = self.corpus.validation(max(1, VALIDATION_TOKENS // c.sequence), c.sequence)
        total = 0.0
        with self.optimizer.averaged():
            for first in range(0, len(inputs), c.micro_batch):
                rows = slice(first, first + c.micro_batch)
                total += float(self._losses(inputs[rows], targets[rows])[1])
        loss = total / max(1, int((targets != IGNORED).sum()))
        if not math.isfinite(loss):  # the last step's update was too large, and no step follows that would say so
            what = f"training diverged at step {self.step} (validation loss {loss})"
            raise Diverged(what, "train again with a lower --learning-rate")
        return loss

    @property
    def tokens(self) -> int:
        """The number of tokens trained on so far, repetitions included."""
        return self.step * self.config.tokens_per_step

    # --- state ---

    def identity(self) -> dict[str, Any]:
        """The step, and the fields that must be equal when a training resumes."""
        ids = {"architecture_id": self.model.architecture.id, "corpus_sha256": self.corpus.sha256}
        config = dataclasses.asdict(self.config)
        teacher = {"teacher_sha256": None if self.teacher is None else self.teacher.sha256}
        return {"step": self.step, **ids, "start_sha256": self.start_sha256, **teacher, "config": config}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training changes, by their names in the state file: full tensors on every worker."""
        tensors = {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        return {name: full_tensor(tensor) for name, tensor in (tensors | self.optimizer.state()).items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Resume from what `tensors()` gave at `step`. Raises ArtefactError for the tensors of another model."""
        try:
            self._restore(tensors)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            what = f"the saved state is not one of this model ({reason})"
            raise ArtefactError(what, "train again with another --out") from None
        self.step = step

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        like = self.model.state_dict()
        parameter_of = {name: like.get(name.partition(".")[2], tensor) for name, tensor in tensors.items()}
        shards = {
            name: shard(tensor.to(self.device), parameter_of[name])
            if tensor.shape == parameter_of[name].shape
            else tensor
            for name, tensor in tensors.items()
        }
        self.model.load_state_dict({name: shards.pop(f"weights.{name}") for name in like})
        self.optimizer.restore(shards)

    def kept_weights(self) -> dict[str, np.ndarray]:
        """The weights for a checkpoint, averaged ones where there are any. Every worker must call this."""
        with self.optimizer.averaged():
            state = self.model.state_dict()
            return {name: full_tensor(value).float().numpy(force=True).copy() for name, value in state.items()}
