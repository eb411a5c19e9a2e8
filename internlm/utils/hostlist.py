"""Slurm host lists: ``gpu[003-005,9],login`` names gpu003, gpu004, gpu005, gpu9 and login."""

from __future__ import annotations

import re
from collections.abc import Iterator


def expand_host_list(text: str) -> list[str]:
    """Every host of a Slurm host list, in order. Raises ``ValueError`` for one that cannot be read."""
    hosts = [host for part in _split_outside_brackets(text) for host in _expand(part)]
    if not all(re.fullmatch(r"[^\s\[\]]+", host) for host in hosts):
        raise ValueError(f"{text!r} is not a list of hosts such as 'gpu[003-005,9]'")
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    if text.count("[") != text.count("]"):
        raise ValueError(f"{text!r} has an unclosed bracket")
    return re.split(r",(?![^\[]*\])", text.strip())


def _expand(part: str) -> Iterator[str]:
    """Expand the first bracket of ``part`` and go on with the rest: names may hold several."""
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        yield part.strip()
        return
    prefix, ranges, rest = match.groups()
    for number in (number for item in ranges.split(",") for number in _numbers(item)):
        for tail in _expand(rest):
            yield f"{prefix}{number}{tail}"


def _numbers(item: str) -> list[str]:
    """``"003-005"`` → 003, 004, 005: leading zeros are part of the names."""
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
    if match is None:
        raise ValueError(f"{item!r} is not a number or a range such as '003-005'")
    first, last = match.group(1), match.group(2) or match.group(1)
    if int(last) < int(first):
        raise ValueError(f"the range {item!r} runs backwards")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
