"""The communication ledger: how often this rank spoke in each :class:`ParallelMode`, and how many bytes it sent.

Counted is what a rank must send at the least, whatever algorithm the backend takes; for a tensor of N bytes over n
ranks (Chan et al. 2007, table II):

=================  ===========================================
all-gather         (n − 1) · N / n, N being the gathered tensor
reduce-scatter     (n − 1) · N / n, N being the tensor that is reduced
all-reduce         2 · (n − 1) · N / n
all-to-all         (n − 1) · N / n
broadcast          N on the rank that has it, else 0
reduce             0 on the rank that wants it, else N
=================  ===========================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from internlm.core.context.layout import ParallelMode


class Entry(NamedTuple):
    """Calls of one collective in one mode, and the bytes that this rank sent by them."""

    calls: int = 0
    sent: int = 0


#: Entries by mode and collective, such as ``(ParallelMode.TENSOR, "all-reduce")``.
Traffic = Mapping[tuple[ParallelMode, str], Entry]


class Ledger:
    """Counts the collectives of this process."""

    def __init__(self) -> None:
        self._entries: dict[tuple[ParallelMode, str], Entry] = {}

    def record(self, mode: ParallelMode, collective: str, sent: int) -> None:
        """Count one call."""
        calls, before = self._entries.get((mode, collective), (0, 0))
        self._entries[mode, collective] = Entry(calls + 1, before + sent)

    def snapshot(self) -> Traffic:
        """Everything so far."""
        return dict(self._entries)

    def since(self, earlier: Traffic) -> Traffic:
        """What came after ``earlier``."""
        later = {}
        for key, entry in self._entries.items():
            old = earlier.get(key, Entry())
            if entry != old:
                later[key] = Entry(entry.calls - old.calls, entry.sent - old.sent)
        return later


def summed(parts: Iterable[Traffic]) -> Traffic:
    """All of them together."""
    total: dict[tuple[ParallelMode, str], Entry] = {}
    for part in parts:
        for key, entry in part.items():
            before = total.get(key, Entry())
            total[key] = Entry(before.calls + entry.calls, before.sent + entry.sent)
    return total


#: The ledger of this process.
LEDGER = Ledger()


def format_traffic(traffic: Traffic, steps: int = 1) -> str:
    """``traffic`` as lines of text, a row for each mode and collective: per step, and in all."""
    lines = [f"{'mode':<14} {'collective':<16} {'calls/step':>11} {'MB/step':>11} {'calls':>9} {'MB':>11}"]
    for (mode, collective), entry in sorted(traffic.items(), key=lambda item: (item[0][0].value, item[0][1])):
        mb = entry.sent / 2**20
        lines.append(
            f"{mode.value:<14} {collective:<16} {entry.calls / steps:>11.1f} {mb / steps:>11.3f} "
            f"{entry.calls:>9} {mb:>11.3f}"
        )
    return "\n".join(lines)
