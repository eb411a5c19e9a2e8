"""What is known about a run beside its config."""

from __future__ import annotations

from dataclasses import dataclass

#: How rules and derivations say that they read a fact.
WORLD_SIZE = "world_size"
DEVICE_TYPE = "device_type"


@dataclass(frozen=True)
class Facts:
    """Facts of the run; None where not known, and then whatever reads it is skipped."""

    world_size: int | None = None  # processes
    device_type: str | None = None  # "cpu" or "cuda"

    def unknown(self) -> set[str]:
        """Names of the facts that are not known."""
        return {name for name in (WORLD_SIZE, DEVICE_TYPE) if getattr(self, name) is None}
