"""Calibration: what an interrupted export has collected is what it goes on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import Interrupted
from merino_edge.export import prepare_weights
from merino_edge.export.quantization.calibration import CalibrationStatistics, collect_statistics
from merino_edge.unfinished import Unfinished


def test_statistics_are_collected_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    calls = 0

    def collect() -> CalibrationStatistics:
        nonlocal calls
        calls += 1
        return collect_statistics(tiny_checkpoint.architecture, tiny_checkpoint.weights, 2, 8)

    def interrupted() -> None:
        with Unfinished(tmp_path / "bundle", 1, resume=False) as unfinished:
            prepare_weights._kept(unfinished, collect)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="add --continue"):
        interrupted()
    with Unfinished(tmp_path / "bundle", 1, resume=True) as unfinished:
        found = prepare_weights._kept(unfinished, collect)
        assert calls == 1
        (unfinished.folder / "calibration.npz").write_bytes(b"altered")
        prepare_weights._kept(unfinished, collect)
        assert calls == 2
    expected = collect()
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine) == list(theirs) and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    shared = [len({id(array) for array in kind.moments.values()}) for kind in (found, expected)]
    assert shared[0] == shared[1] < len(expected.moments)
    assert list(tmp_path.iterdir()) == []
