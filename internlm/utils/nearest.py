"""The nearest known name for a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` where a known name is near ``name``, else a list of what is known."""
    known = sorted(known)
    by_folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f"Did you mean '{by_folded[near[0]]}'?" if near else f"Known: {', '.join(known)}."
