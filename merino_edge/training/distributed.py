"""The processes of one training: one alone, or those that `torchrun` started, by PyTorch's DDP or FSDP2.

    torchrun --nproc-per-node 8 -m merino_edge.cli train A.json --corpus C --out CKPT [--parallel fsdp]

Every worker takes its part of every batch, and the batches are those of one worker. DDP keeps a copy of the model in
each, FSDP2 a part of every tensor. Worker 0 writes files and speaks. What is saved is whole tensors, so a training goes
on with any number of workers. It knows no optimizer and no data.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from merino_edge.errors import InputError
from merino_edge.pytorch.model import Model
from merino_edge.training import device

Parallel = Literal["ddp", "fsdp"]


class Workers:
    """This process among its fellows: `rank` of `count`, computing on `device`."""

    def __init__(self, parallel: Parallel | str = "ddp") -> None:
        """Join those that torchrun started; without it, be the only one. Raises InputError."""
        if parallel not in get_args(Parallel):
            raise InputError(f"parallel is {parallel!r}", f"choose {' or '.join(get_args(Parallel))}")
        self.parallel = parallel
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device.device()
        self._wrapped: nn.Module | None = None
        if self.is_distributed:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_distributed(self) -> bool:
        """Whether there are others, or torchrun started this one alone."""
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard_of_batch(self, batch: int) -> slice:
        """Which of a batch's sequences are this worker's. Raises InputError where they cannot be divided evenly."""
        if batch % self.world_size:
            raise InputError(f"{self.world_size} workers cannot share {batch} sequences a step", "change --batch")
        share = batch // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: Model) -> nn.Module:
        """What to call instead of `model` so that gradients are averaged over workers."""
        if not self.is_distributed:
            return model
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                for layer in block.layers:  # type: ignore[union-attr]
                    fully_shard(layer)
            fully_shard(model)  # in place
            wrapped: nn.Module = model
        else:
            devices = [self.device.index] if self.device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        self._wrapped = wrapped
        return wrapped

    @contextlib.contextmanager
    def accumulate_gradients(self, *, last: bool) -> Iterator[None]:
        """Around a backward pass: gradients are exchanged in the last of a step only."""
        if self._wrapped is None:
            yield
        elif self.parallel == "fsdp":
            self._wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        else:
            with contextlib.nullcontext() if last else self._wrapped.no_sync():  # type: ignore[operator]
                yield

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value added up over all workers."""
        if not self.is_distributed:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Until every worker is here."""
        if self.is_distributed:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.is_distributed:
            torch.distributed.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with what other workers hold of it; all of them must ask."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's part of a whole tensor, as `like` is divided."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]
