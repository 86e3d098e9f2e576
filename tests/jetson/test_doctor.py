from __future__ import annotations

import pytest

from merino_edge.cli.main import app
from merino_edge.jetson import doctor


def test_every_verb_is_examined() -> None:
    verbs = {command.name for command in app.registered_commands}
    assert set(doctor.NEEDS) | {"doctor"} == verbs


def test_what_is_missing_comes_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    have = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda package: None if package in ("torch", "rich") else have(package))
    verbs = doctor.examine()["verbs"]
    assert (
        verbs["train"]["missing"] == ["rich", "torch"] and verbs["train"]["fix"] == "pip install 'merino-edge[train]'"
    )
    assert verbs["search"] == {"ok": False, "missing": ["rich"], "fix": "pip install merino-edge"}


def test_a_package_that_nobody_has_is_not_installed() -> None:
    assert doctor.installed("no-such-package") is None
    assert doctor.installed("no.such.package") is None
    assert doctor.installed("numpy")
