"""Distributed training: one process, or the workers that `torchrun` starts, with PyTorch's DDP or FSDP2.

    torchrun --nproc-per-node 8 -m merino_edge train A.json --corpus C --out CKPT [--parallel fsdp]

Each worker takes its shard of every batch, so the batches are those of one worker. With DDP each worker keeps a copy of
the model, with FSDP2 a shard of every tensor. Rank 0 writes the files and prints. Full tensors are saved, so a training
can resume with any number of workers. This module knows no optimizer and no data.
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
    """This worker in its process group: `rank` of `world_size`, with its `device`."""

    def __init__(self, parallel: Parallel | str = "ddp") -> None:
        """Join the process group of torchrun; without torchrun, be the only worker. Raises InputError."""
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
        """Whether there is more than one worker."""
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and prints."""
        return self.rank == 0

    def shard_of_batch(self, batch: int) -> slice:
        """This worker's sequences of a batch. Raises InputError where the batch cannot be divided evenly."""
        if batch % self.world_size:
            raise InputError(f"{self.world_size} workers cannot share {batch} sequences a step", "change --batch")
        share = batch // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: Model) -> nn.Module:
        """The module to call instead of `model`, so that gradients are averaged over workers."""
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
        """Context of a backward pass. Only the `last` pass of a step exchanges gradients between workers."""
        if self._wrapped is None:
            yield
        elif self.parallel == "fsdp":
            self._wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        else:
            with contextlib.nullcontext() if last else self._wrapped.no_sync():  # type: ignore[operator]
                yield

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all workers."""
        if not self.is_distributed:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def from_main(self, value: str) -> str:
        """The main worker's `value`. Every worker must call this."""
        if not self.is_distributed:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait until every worker has reached this point."""
        if self.is_distributed:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.is_distributed:
            torch.distributed.destroy_process_group()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from the shards of all workers. All of them must call this."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's shard of a full tensor, placed as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]
