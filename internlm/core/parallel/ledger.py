"""The communication ledger: calls of each collective in each :class:`ParallelMode`, and the bytes this rank sent.

It counts the least number of bytes that a rank must send, whichever algorithm the backend uses. For a tensor of N bytes
over n ranks (Chan et al. 2007, "Collective communication: theory, practice, and experience", table II):

=================  ===========================================
all-gather         (n − 1) · N / n, with N of the gathered tensor
reduce-scatter     (n − 1) · N / n, with N of the reduced tensor
all-reduce         2 · (n − 1) · N / n
all-to-all         (n − 1) · N / n
broadcast          N on the root, else 0
reduce             0 on the root, else N
send               N
=================  ===========================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from internlm.core.context.layout import ParallelMode

Collective: TypeAlias = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "reduce", "send"
]


class Entry(NamedTuple):
    """Calls of one collective in one mode, and the bytes that this rank sent in them."""

    calls: int = 0
    sent: int = 0


#: Entries by mode and collective, such as ``(ParallelMode.TENSOR, "all-reduce")``.
Traffic = Mapping[tuple[ParallelMode, Collective], Entry]


class Ledger:
    """Counts of the collectives of this process."""

    def __init__(self) -> None:
        self._entries: dict[tuple[ParallelMode, Collective], Entry] = {}

    def record(self, mode: ParallelMode, collective: Collective, sent: int) -> None:
        """Count one call that sends ``sent`` bytes."""
        calls, before = self._entries.get((mode, collective), (0, 0))
        self._entries[mode, collective] = Entry(calls + 1, before + sent)

    def snapshot(self) -> Traffic:
        """Return a copy of the counts so far."""
        return dict(self._entries)

    def since(self, earlier: Traffic) -> Traffic:
        """Return the counts since the snapshot ``earlier``, without unchanged entries."""
        later = {}
        for key, entry in self._entries.items():
            old = earlier.get(key, Entry())
            # Compared by calls as well as bytes: a broadcast sends nothing on all ranks but the root.
            if entry != old:
                later[key] = Entry(entry.calls - old.calls, entry.sent - old.sent)
        return later


def sum_traffic(traffics: Iterable[Traffic]) -> Traffic:
    """Add up calls and bytes by mode and collective."""
    total: dict[tuple[ParallelMode, Collective], Entry] = {}
    for traffic in traffics:
        for key, entry in traffic.items():
            before = total.get(key, Entry())
            total[key] = Entry(before.calls + entry.calls, before.sent + entry.sent)
    return total


#: Ledger of this process. All models in the process share it: traffic is counted per process.
LEDGER = Ledger()


def format_traffic(traffic: Traffic, steps: int = 1) -> str:
    """Format ``traffic`` as a table with one row per mode and collective: per step, and over all ``steps``."""
    lines = [f"{'mode':<14} {'collective':<16} {'calls/step':>11} {'MiB/step':>11} {'calls':>9} {'MiB':>11}"]
    for (mode, collective), entry in sorted(traffic.items(), key=lambda item: (item[0][0].value, item[0][1])):
        mib = entry.sent / 2**20
        lines.append(
            f"{mode.value:<14} {collective:<16} {entry.calls / steps:>11.1f} {mib / steps:>11.3f} "
            f"{entry.calls:>9} {mib:>11.3f}"
        )
    return "\n".join(lines)
