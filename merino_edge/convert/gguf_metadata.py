"""The metadata of a GGUF file, typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from merino_edge.errors import ArtefactError, UnsupportedError

T = TypeVar("T")


class Metadata:
    """The file's key-value pairs, typed. Raises ArtefactError naming the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value, or None where the key is missing. For kind `list` it is the whole array."""
        if key not in self.values:
            return None
        value = self.values[key]
        try:
            if isinstance(value, bytes):
                value = value.decode()
            elif isinstance(value, list):
                value = [item.decode() for item in value]
            elif isinstance(value, np.ndarray) and kind is list:
                value = value.tolist()
        except UnicodeDecodeError:
            value = None
        if type(value) is not kind:
            raise ArtefactError(f"{self.where}: {key} is not {kind.__name__}", "it is damaged; download it again")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key that must be present."""
        value = self.get(key, kind)
        if value is None:
            raise ArtefactError(f"{self.where} has no {key}", "it is damaged, or its kind of model is not supported")
        return value

    def whole(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self.need(key, int)
        if value < 1:
            raise ArtefactError(f"{self.where}: {key} is {value}", "it is damaged; download it again")
        return value

    def of_all_layers(self, key: str, default: int | None = None) -> int:
        """A whole number that is the same for each layer; a file may spell it once, or as a list with one for each.

        Raises UnsupportedError where layers differ.
        """
        if default is not None and key not in self.values:
            return default
        if not isinstance(self.values.get(key), np.ndarray):
            return self.whole(key)
        several = self.need(key, list)
        if not several or any(type(value) is not int or value < 0 for value in several):
            raise ArtefactError(f"{self.where}: {key} is no list of whole numbers", "it is damaged; download it again")
        if len(set(several)) > 1 or several[0] < 1:
            raise UnsupportedError(f"{self.where}: {key} differs from layer to layer", "choose another model")
        return int(several[0])

    def of_each_layer(self, key: str, layers: int) -> list[int]:
        """A whole number of at least 0 for each layer; a file may spell it once where they are the same."""
        several = self.need(key, list) if isinstance(self.values.get(key), np.ndarray) else [self.whole(key)] * layers
        if len(several) != layers or any(type(value) is not int or value < 0 for value in several):
            raise ArtefactError(
                f"{self.where}: {key} is no list of {layers} numbers", "it is damaged; download it again"
            )
        return several

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06. It is finite."""
        value = self.get(key, float) if default is not None else self.need(key, float)
        if value is not None and not math.isfinite(value):
            raise ArtefactError(f"{self.where}: {key} is {value}", "it is damaged; download it again")
        with np.errstate(over="ignore"):  # the architecture refuses what is not finite
            return float(str(np.float32(default if value is None else value)))
