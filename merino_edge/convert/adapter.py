"""LoRA adapters, as the library peft stores them: `adapter_config.json` beside `adapter_model.safetensors`.

Import merges them into the weights of their base: W + scale B A, in float32. Adapters of another kind, and settings
that change more than this, are refused by name.
Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rank-stabilised), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import artefact
from merino_edge.convert.weight_files import StoredWeights
from merino_edge.errors import ArtefactError, UnsupportedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Settings that change nothing once an adapter is trained, and those that this module reads. Any other must be empty.
UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "bias"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "megatron_core", "qalora_group_size", "eva_config"),
)
SAME_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # beginnings that leave the base as it is
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
MERGE = "merge it with peft: model.merge_and_unload().save_pretrained(FOLDER)"


def is_adapter(folder: Path) -> bool:
    """Whether this is the folder of an adapter."""
    return (folder / CONFIG).is_file()


def base_folder(folder: Path, name: str | None = None) -> Path | None:
    """The folder of an adapter's base, where it is on this machine. `name`: as the adapter says it, else read there.

    Raises ArtefactError.
    """
    if name is None:
        config = artefact.parse_json(artefact.read_text(folder / CONFIG), str(folder / CONFIG))
        name = str(config.get("base_model_name_or_path") or "") if isinstance(config, dict) else ""
    places = (Path(name), folder / name, folder) if name else (folder,)
    return next((path for path in places if (path / "config.json").is_file()), None)


@dataclass
class Adapter:
    """An adapter's matrices by module, as `model.layers.0.self_attn.q_proj`, and the weights that it replaces."""

    where: str
    base: str  # the base's name or folder, as the adapter says it
    config: dict[str, Any]
    file: Path
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # A is [R, in], B [out, R]
    replaced: dict[str, np.ndarray] = field(default_factory=dict)  # by the name of the base's weight

    @staticmethod
    def load(folder: Path) -> Adapter:
        """Read the adapter in `folder`. Raises ArtefactError, UnsupportedError, MissingExtraError."""
        where = str(folder / CONFIG)
        config = artefact.parse_json(artefact.read_text(folder / CONFIG), where)
        if not isinstance(config, dict):
            raise ArtefactError(f"{where} is not an object", "download it again")
        _check(config, where)
        if not (folder / WEIGHTS).is_file():
            if (folder / PICKLE).is_file():
                raise UnsupportedError(f"{folder / PICKLE} is a pickle, which can run code when it is read", MERGE)
            raise ArtefactError(f"{folder} holds no {WEIGHTS}", "download the adapter again")
        adapter = Adapter(where, str(config.get("base_model_name_or_path") or ""), config, folder / WEIGHTS)
        stored = StoredWeights([adapter.file])
        for name in stored.file_of:
            adapter._add(name, stored.load(name))
        return adapter

    def _add(self, stored: str, array: np.ndarray) -> None:
        name = stored.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
        name = name.replace(".base_layer.", ".")  # an embedding as it was, beside its change
        name = re.sub(r"\.(default|weight)(?=\.|$)", "", name) if ".lora_" in name else name.replace(".default.", ".")
        if "trainable_tokens" in name or (".lora_" in name and not PART.fullmatch(name)):
            raise UnsupportedError(f"{self.file}: the adapter's {stored} is not supported", MERGE)
        if match := PART.fullmatch(name):
            self.parts.setdefault(match[1], {})[match[2].removeprefix("lora_")] = array
        else:
            self.replaced[name] = array

    # --- merging ---------------------------------------------------------------------------------------

    def touched(self) -> set[str]:
        """The names of the base's weights that this adapter changes or replaces."""
        return {*self.replaced, *(f"{module}.weight" for module in self.parts)}

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ArtefactError where the adapter changes a weight that is none of the base's `names`."""
        if missing := sorted({f"{module}.weight" for module in self.parts} - set(names)):
            raise ArtefactError(f"{self.where}: the base has no {missing[0]}", "give the adapter's own base")

    def apply(self, name: str, array: np.ndarray, *, inputs_first: bool) -> np.ndarray:
        """The base's weight `name`, with the adapter merged. Raises ArtefactError where their shapes differ.

        `inputs_first`: the base stores this matrix as [in, out]. As in peft, `fan_in_fan_out` does not decide that.
        """
        array = self.replaced.get(name, array)
        parts = self.parts.get(name.removesuffix(".weight"), {}) if name.endswith(".weight") else {}
        if not parts:
            return array
        module = name.removesuffix(".weight")
        a, b = parts.get("A", parts.get("embedding_A")), parts.get("B", parts.get("embedding_B"))
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ArtefactError(f"{self.file}: A and B of {module} do not fit together", "download the adapter again")
        delta = self._scale(module, a.shape[0]) * (b @ a)  # [out, in]; of an embedding [E, V]
        turned = "embedding_A" in parts or inputs_first
        delta = delta.T if turned else delta
        if delta.shape != array.shape:
            raise ArtefactError(
                f"{self.where}: the change of {name} is {list(delta.shape)}, the base's weight {list(array.shape)}",
                "adapter and base do not belong together",
            )
        merged = array + delta
        if "embedding_A" in parts and "magnitude_vector" in parts:
            raise UnsupportedError(f"{self.where}: use_dora for an embedding is not supported", MERGE)
        if (magnitude := parts.get("magnitude_vector")) is not None:
            rows = merged.T if turned else merged  # [out, in]
            if magnitude.size != rows.shape[0]:
                raise ArtefactError(f"{self.file}: {module} has a wrong magnitude", "download the adapter again")
            rows = rows * (magnitude.reshape(-1, 1) / np.linalg.norm(rows, axis=1, keepdims=True))
            merged = rows.T if turned else rows
        return np.asarray(merged, np.float32)

    def _scale(self, module: str, rank: int) -> float:
        said = _by_pattern(self.config, "rank_pattern", module, self.config.get("r", 8))
        if said != rank:
            raise ArtefactError(
                f"{self.where}: {module} has the rank {said}, its weights {rank}",
                "configuration and weights do not belong together",
            )
        alpha = _by_pattern(self.config, "alpha_pattern", module, self.config.get("lora_alpha", 8))
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def _by_pattern(config: dict[str, Any], field_name: str, module: str, default: Any) -> Any:
    """The module's own value of a setting, by the end of the module's name, else `default`."""
    for key, value in (config.get(field_name) or {}).items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default


def _check(config: dict[str, Any], where: str) -> None:
    """Raise UnsupportedError for an adapter that is more than W + scale B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{where}: an adapter of kind {kind!r} is not supported", "only LORA is; " + MERGE)
    for name in sorted(config.keys() - set(UNDERSTOOD)):
        if config[name]:
            raise UnsupportedError(f"{where}: {name} {str(config[name])[:80]} is not supported", MERGE)
    if config.get("init_lora_weights") not in SAME_BASE:
        begun = config["init_lora_weights"]
        raise UnsupportedError(f"{where}: init_lora_weights {begun!r} changes the base as well", MERGE)
    own = []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise ArtefactError(f"{where}: {name} is {str(patterns)[:80]}", "download it again")
        # Matching any regular expression of a file can take for ever.
        if regexes := [key for key in patterns if not re.fullmatch(r"[\w.-]+", key)]:
            raise UnsupportedError(f"{where}: {name} has the regular expression {regexes[0][:80]!r}", MERGE)
        own += [(name, value) for value in patterns.values()]
    for name, value in (("r", config.get("r", 8)), ("lora_alpha", config.get("lora_alpha", 8)), *own):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
            raise ArtefactError(f"{where}: {name} is {str(value)[:80]}", "download it again")
