"""Counter of rows that cannot be used as they are, by kind, with the first places of each kind."""

from __future__ import annotations

import re
import threading
from typing import Literal, TypeAlias

from internlm.utils.errors import DataError, Problem
from internlm.utils.logger import get_logger

OnError: TypeAlias = Literal["fail", "skip"]

#: Number of places that are kept of each kind.
PLACES = 3

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class BadRows:
    """Counter of bad rows by kind.

    The first row of each kind is logged, later ones are only counted: a damaged corpus would fill the log.
    :meth:`totals` returns all counts. Threads may share a counter.

    Args:
        on_error: ``"fail"``: raise an error at the first row that cannot be used; ``"skip"``: skip and count it.
    """

    def __init__(self, on_error: OnError = "fail") -> None:
        self._on_error = on_error
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def skip(self, kind: str, problem: Problem, cause: Exception | None = None) -> None:
        """Count a row that cannot be used; the caller skips it.

        Args:
            kind: Kind of damage, such as "invalid JSON".
            problem: Error of this row.
            cause: Exception that revealed the damage.

        Raises:
            DataError: Bad rows are errors, by ``on_error``.
        """
        if self._on_error == "fail":
            raise DataError(problem) from cause
        if self.note(f"{kind}, skipped", problem.where):
            where = escape_control(problem.where)
            skipped = Problem(where, problem.message, "Skipped; more of this kind are only counted")
            get_logger().warning(str(skipped))

    def note(self, kind: str, where: str) -> bool:
        """Count a row that is no error, such as one without text, and return whether it is the first of its kind."""
        with self._lock:
            self._counts[kind] = count = self._counts.get(kind, 0) + 1
            if count <= PLACES:
                self._places.setdefault(kind, []).append(escape_control(where))
        return count == 1

    def replace(self, kind: str, where: str) -> None:
        """Count a row of which characters were replaced."""
        if self.note(kind, where):
            get_logger().warning(f"{escape_control(where)}: {kind}; more of this kind are only counted")

    def count(self, kind: str) -> int:
        """Return the number of rows of ``kind``; a skipped row has the kind ``"KIND, skipped"``."""
        return self._counts.get(kind, 0)

    def totals(self) -> list[str]:
        """Return one line for each kind, in the order of their first rows: the count, and the first places."""
        with self._lock:
            return [self._total(kind) for kind in self._counts]

    def _total(self, kind: str) -> str:
        count = self._counts[kind]
        more = ", …" if count > PLACES else ""
        return f"{kind}: {count:,} ({', '.join(self._places[kind])}{more})"


def escape_control(text: str) -> str:
    """Escape control characters, so that a file name or value cannot forge a line of a log."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
