"""Clock that measures the time between two points of a program without blocking the host."""

from __future__ import annotations

import time
from typing import Any

from internlm.accelerator.kinds import device_kind
from internlm.accelerator.transfer import count_host_sync


class Mark:
    """Point in the work of the device: the time at which all work queued before it is done."""

    def __init__(self) -> None:
        self.host_time = time.perf_counter()
        self._event: Any = None
        kind = device_kind()
        if not kind.is_host:
            self._event = kind.module.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: Mark) -> float:
        """Return the time between two marks in seconds; this is a host sync unless the device has reached both."""
        if self._event is None:
            return self.host_time - earlier.host_time
        if not self._event.query():
            count_host_sync("clock")
            self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
