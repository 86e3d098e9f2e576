"""Packages that are not installed are named together, with one command for them all."""

from __future__ import annotations

import pytest

from merino_edge.errors import MissingExtraError, require, require_all


def test_missing_packages_are_named_together() -> None:
    require_all({"train": ["numpy"], "export": []})
    with pytest.raises(MissingExtraError) as refused:
        require_all({"train": ["numpy", "no_torch"], "export": ["no_onnx", "no_torch"], "plot": ["numpy"]})
    assert str(refused.value) == (
        "this needs no_torch, no_onnx, which are not installed; run: pip install 'merino-edge[train,export]'"
    )


def test_one_missing_package() -> None:
    with pytest.raises(
        MissingExtraError, match=r"needs the package no_torch, which is not installed; run: .*\[train\]"
    ):
        require("no_torch", "train")
