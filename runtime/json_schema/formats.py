"""Formats of strings: patterns that are at least as strict as the readers of the formats are.

The grammar engine has formats of its own. Those for times let through a 29th of February of any year, a leap second and
fractions without end, which readers such as pydantic refuse. These do not. They are narrower than their RFCs: an
address is one of http or https, and a duration has at most three digits of each unit.
Source: RFC 3339 (times, durations), RFC 5321 (mail), RFC 3986 (addresses).
"""

from __future__ import annotations

_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIMES = r"T(?:[0-9]{1,3}H(?:[0-9]{1,3}M)?(?:[0-9]{1,3}S)?|[0-9]{1,3}M(?:[0-9]{1,3}S)?|[0-9]{1,3}S)"
_REST = r"(?:-?[A-Za-z0-9]){0,30}"  # of a part of a host's name: two hyphens would make it another alphabet's
_HOST = rf"(?:[A-Za-z0-9]{_REST}\.)*[A-Za-z]{_REST}"  # a last part that begins with a digit would be an address

# {format: pattern}; as a pattern of a schema each is put between ^ and $.
OURS = {
    "date": f"{_YEAR}-{_DAY}",
    "date-time": f"{_YEAR}-{_DAY}T{_CLOCK}{_ZONE}",
    "time": f"{_CLOCK}{_ZONE}",
    "duration": f"P(?:[0-9]{{1,3}}W|[0-9]{{1,3}}D(?:{_TIMES})?|{_TIMES})",
    "email": rf"[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@(?:[A-Za-z0-9]{_REST}\.)+[A-Za-z]{{2,24}}",
    "uri": rf"https?://{_HOST}(?::[1-9][0-9]{{0,3}})?(?:/[A-Za-z0-9._~-]*)*"
    r"(?:\?[A-Za-z0-9=&._~-]*)?(?:#[A-Za-z0-9._~-]*)?",
}
OF_THE_ENGINE = frozenset({"hostname", "ipv4", "ipv6", "uuid"})


def pattern(name: str) -> str | None:
    """The pattern of a format, for a whole string; None for a format of the engine or an unknown one."""
    return f"^(?:{OURS[name]})$" if name in OURS else None
