"""Numbers with a unit mean what they say; a word that is none is refused with the option's name."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.cli import units
from merino_edge.errors import InputError

Reader = Callable[[str], float]


@pytest.mark.parametrize(
    ("reader", "text", "value"),
    [
        (units.seconds("--a"), "30", 30),
        (units.seconds("--a"), "30s", 30),
        (units.seconds("--a"), "1.5 MIN", 90),
        (units.seconds("--a"), "1h", 3600),
        (units.minutes("--a"), "90s", 1.5),
        (units.minutes("--a"), "5e-1", 0.5),
        (units.megabytes("--a"), "1.2GB", 1200),
        (units.megabytes("--a"), "1 MiB", 1.048576),
        (units.share("--a"), "10%", 0.1),
        (units.share("--a"), ".25", 0.25),
    ],
)
def test_a_unit_scales_the_number(reader: Reader, text: str, value: float) -> None:
    assert reader(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "s", "5 days", "5%", "1..2s", "--3", "1e", "5s5s"])
def test_what_is_no_time_is_refused_by_the_option_s_name(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--seconds {text!r} is no time in seconds")):
        units.seconds("--seconds")(text)


@given(st.floats())
def test_a_number_is_read_as_python_reads_it(value: float) -> None:
    assert units.seconds("--a")(str(value)) == pytest.approx(value, nan_ok=True)
