"""The optimizer: PyTorch's fused AdamW, optionally with PyTorch's Muon, and an exponential moving average of weights.

Only matrices have weight decay. Muon (PyTorch 2.9 and later) takes the layers' matrices. Its updates are scaled to the
size of AdamW's, so that one learning rate serves both. Tables, heads and vectors stay with AdamW. The state goes in and
out as tensors named KIND.PARAMETER, as a training's state file holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from merino_edge.errors import UnsupportedError
from merino_edge.training.config import TrainingConfig
from merino_edge.weights import is_matrix

TABLES = ("embedding.weight", "positions.weight", "head.weight")  # matrices that are looked up or predict

KINDS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}  # tensors of each parameter


class Optimizer:
    """Updates all parameters of a model, and averages its weights where the configuration says so."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        """Raises UnsupportedError where this PyTorch has no Muon."""
        self._parameters = dict(model.named_parameters())
        matrices = {name for name, p in self._parameters.items() if is_matrix(name, tuple(p.shape))}
        by_muon = matrices - set(TABLES) if config.optimizer == "muon" else set()
        groups = [
            (sorted(matrices - by_muon), config.weight_decay),
            (sorted(self._parameters.keys() - matrices), 0.0),
        ]
        betas = (config.beta1, config.beta2)
        self._parts: list[tuple[torch.optim.Optimizer, list[str]]] = []  # and the names of its parameters, in order
        named = [([self._parameters[name] for name in names], decay) for names, decay in groups if names]
        adamw = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in named], betas=betas, fused=True
        )
        self._parts.append((adamw, [name for names, _ in groups for name in names]))
        if by_muon:
            if not hasattr(torch.optim, "Muon"):
                raise UnsupportedError(f"PyTorch {torch.__version__} has no Muon", "install torch>=2.9, or use adamw")
            muon = torch.optim.Muon(
                [self._parameters[name] for name in sorted(by_muon)],
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append((muon, sorted(by_muon)))
        self._ema = config.ema
        self.average = {n: p.detach().clone() for n, p in self._parameters.items()} if config.ema else {}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """PyTorch's parameter groups of all optimizers."""
        return [group for part, _ in self._parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part, _ in self._parts:
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update of the parameters, and of the average."""
        for group in self.groups:
            group["lr"] = learning_rate
        for part, _ in self._parts:
            part.step()
        for name, average in self.average.items():
            average.lerp_(self._parameters[name].detach(), 1 - self._ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model has the averaged weights, if there are any."""
        last = {name: self._parameters[name].detach().clone() for name in self.average}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(last)

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the parameters, in place: FSDP2 and compiled code keep the parameters' memory."""
        for name, weight in weights.items():
            self._parameters[name].copy_(weight)

    def state(self) -> dict[str, Tensor]:
        """All tensors that `step` changes beside the weights."""
        state = {f"average.{name}": average for name, average in self.average.items()}
        for part, names in self._parts:
            for index, tensors in part.state_dict()["state"].items():
                state |= {f"{kind}.{names[index]}": tensor for kind, tensor in tensors.items()}
        return state

    @staticmethod
    def _check_like(key: str, tensor: Tensor, parameter: Tensor, kind: str) -> None:
        """Raise ValueError for a tensor that PyTorch would fail on, not here but in the next step."""
        shape = torch.Size() if kind == "step" else parameter.shape
        if tensor.shape != shape or (kind != "step" and tensor.dtype != parameter.dtype):
            raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}")

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load what `state()` gave for the same model and configuration."""
        for name, average in self.average.items():
            average.copy_(state[f"average.{name}"])
        for part, names in self._parts:
            index_of = {name: index for index, name in enumerate(names)}
            loaded: dict[int, dict[str, Tensor]] = {}
            for key, tensor in state.items():
                kind, _, name = key.partition(".")
                if kind != "average" and name in index_of:
                    self._check_like(key, tensor, self._parameters[name], kind)
                    loaded.setdefault(index_of[name], {})[kind] = tensor.clone()
            for index, tensors in loaded.items():
                if tensors.keys() != KINDS[type(part).__name__]:
                    raise ValueError(f"{names[index]} has the tensors {', '.join(sorted(tensors))} only")
            part.load_state_dict({**part.state_dict(), "state": loaded})
