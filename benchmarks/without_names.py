"""Takes the names of a person and a machine out of a document before it is sent to others."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names that systems give, which tell nothing and occur in other words.
COMMON = {"", "root", "user", "ubuntu", "nvidia", "jetson", "tegra", "tegra-ubuntu", "localhost", "merino", "unknown"}
SERIALS = ("proc/device-tree/serial-number", "sys/firmware/devicetree/base/serial-number", "etc/machine-id")
# Of network cards, and of home networks. Others look like the version of a library.
ADDRESSES = re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b|\b192\.168\.\d{1,3}\.\d{1,3}\b", re.IGNORECASE)


@dataclass(frozen=True)
class Names:
    """What is replaced: folders (longest first) by what stands for them, and words."""

    folders: Mapping[str, str]
    words: Mapping[str, str]

    @staticmethod
    def of_this_machine(out: Path, root: Path = Path("/")) -> Names:
        """The user's, the machine's and the serial numbers of this one. `out` is the report's own folder."""
        folders = {str(out.resolve()): "REPORT", str(Path.cwd()): "FOLDER", str(Path.home()): "~"}
        words = {platform.node(): "HOST", platform.node().split(".")[0]: "HOST", _user(): "USER"}
        for path in SERIALS:
            try:
                words[(root / path).read_text(errors="replace").strip("\0\n ")] = "SERIAL"
            except OSError:
                continue
        kept = {word: shown for word, shown in words.items() if word.lower() not in COMMON}
        by_length = dict(sorted(folders.items(), key=lambda item: -len(item[0])))
        return Names({folder: shown for folder, shown in by_length.items() if folder != "/"}, kept)

    def removed_from(self, value: Any) -> Any:
        """`value`, a JSON value, without the names in any of its texts."""
        if isinstance(value, str):
            return self._without(value)
        if isinstance(value, Mapping):
            return {key: self.removed_from(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.removed_from(item) for item in value]
        return value

    def _without(self, text: str) -> str:
        for folder, shown in self.folders.items():
            text = text.replace(folder, shown)
        text = re.sub(r"(/(?:home|Users)/)[^/\s\"']+", r"\1USER", text)
        for word, shown in self.words.items():
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", shown, text)
        return ADDRESSES.sub("ADDRESS", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return os.environ.get("USER", "")
