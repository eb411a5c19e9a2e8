"""Communication ledger: number of calls and of bytes sent by this rank, for each parallel mode and collective.

The ledger counts the minimum number of bytes that a rank must send, independent of the backend's algorithm. For a
tensor of N bytes over n ranks (Chan et al. 2007, "Collective communication: theory, practice, and experience", table
II):

=================  ===========================================================
all-gather         (n − 1) · N / n, where N is the size of the gathered tensor
reduce-scatter     (n − 1) · N / n, where N is the size of the reduced tensor
all-reduce         2 · (n − 1) · N / n
all-to-all         (n − 1) · N / n
broadcast          N on the root, else 0
reduce             0 on the root, else N
send               N
=================  ===========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from internlm.core.context.layout import ParallelMode

Collective: TypeAlias = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "reduce", "send"
]


class Entry(NamedTuple):
    """Number of calls of one collective in one parallel mode, and bytes that this rank sent in these calls."""

    calls: int = 0
    sent: int = 0


#: Entries by mode and collective, such as ``(ParallelMode.TENSOR, "all-reduce")``.
Traffic = Mapping[tuple[ParallelMode, Collective], Entry]


Observer = Callable[[ParallelMode, Collective, Tensor], None]


class Ledger:
    """Counter of the collectives that this process calls, and of the bytes that it sends."""

    def __init__(self) -> None:
        self._entries: dict[tuple[ParallelMode, Collective], Entry] = {}
        self.observer: Observer | None = None
        """Function called with mode, collective and input tensor before each collective."""

    def record(self, mode: ParallelMode, collective: Collective, sent: int, tensor: Tensor | None = None) -> None:
        """Count one call of ``collective`` on ``tensor`` in ``mode``, in which this rank sends ``sent`` bytes."""
        if self.observer is not None and tensor is not None:
            self.observer(mode, collective, tensor)
        calls, before = self._entries.get((mode, collective), (0, 0))
        self._entries[mode, collective] = Entry(calls + 1, before + sent)

    def snapshot(self) -> Traffic:
        """Return a copy of the counts so far."""
        return dict(self._entries)

    def since(self, earlier: Traffic) -> Traffic:
        """Return the counts since the snapshot ``earlier``, without entries that have not changed."""
        later = {}
        for key, entry in self._entries.items():
            old = earlier.get(key, Entry())
            # Compare calls as well as bytes: a broadcast sends bytes only on the root.
            if entry != old:
                later[key] = Entry(entry.calls - old.calls, entry.sent - old.sent)
        return later


def sum_traffic(records: Iterable[Traffic]) -> Traffic:
    """Sum the calls and bytes of several :data:`Traffic` records by mode and collective."""
    total: dict[tuple[ParallelMode, Collective], Entry] = {}
    for traffic in records:
        for key, entry in traffic.items():
            before = total.get(key, Entry())
            total[key] = Entry(before.calls + entry.calls, before.sent + entry.sent)
    return total


#: Ledger of this process. All models in the process share it: traffic is counted per process.
LEDGER = Ledger()


def format_traffic(traffic: Traffic, steps: int = 1) -> str:
    """Format the counts of ``steps`` steps as a table: calls and MiB per step and in total, by mode and collective."""
    lines = [f"{'mode':<14} {'collective':<16} {'calls/step':>11} {'MiB/step':>11} {'calls':>9} {'MiB':>11}"]
    for (mode, collective), entry in sorted(traffic.items(), key=lambda item: (item[0][0].value, item[0][1])):
        mib = entry.sent / 2**20
        lines.append(
            f"{mode.value:<14} {collective:<16} {entry.calls / steps:>11.1f} {mib / steps:>11.3f} "
            f"{entry.calls:>9} {mib:>11.3f}"
        )
    return "\n".join(lines)
