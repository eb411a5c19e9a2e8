"""Checks after every step: the stop file, and whether the launcher would wait as long as the step took."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from time import monotonic

from internlm.utils.logger import get_logger
from internlm.utils.stop_requests import Request

log = get_logger()

#: Content of a stop file, with at most 18 digits so that it fits into an int64.
STEP_NUMBER = re.compile(r"\s*([+-]?\d{1,18})\s*", re.ASCII)
#: Bytes of a stop file that are read.
MOST_BYTES = 64
#: Seconds after which an unchanged file is not read again; file systems store times of modification in coarse ticks.
SETTLED_SECONDS = 2.0


class StopFile:
    """Stop file, read by one rank: "N" saves and stops after step N, "-N" saves after step N and goes on.

    The file may appear, change and vanish during the run. "0" and no file are no request. Any other content is ignored
    with one warning, and so is a step that has passed.

    Args:
        path: Path of the file (``ckpt.stop_file_path``), which may begin with ``local:``.
    """

    def __init__(self, path: str) -> None:
        self.path = path.removeprefix("local:")
        self._status: tuple[int, ...] | None = None  # of the file, when it was read last
        self._since = 0.0  # time at which it had this status first
        self._step = 0  # content of the file; 0: no request
        self._followed = 0  # step of the last request
        self._warned: set[str] = set()

    def due(self, earliest: int) -> Request | None:
        """Return the request for step ``earliest``, if the file has one.

        Args:
            earliest: Earliest step after which the ranks can still follow a request.
        """
        self._update()
        step = abs(self._step)
        if step == earliest:
            self._followed = step
            return Request.STOP_FILE if self._step > 0 else Request.SAVE_BY_FILE
        if 0 < step < earliest and step != self._followed:
            self._warn(f"asks for step {step}, but step {earliest} is the earliest that is left", key=f"passed {step}")
        return None

    def _update(self) -> None:
        """Read the file if it has changed."""
        try:
            status = os.stat(self.path)  # cheaper than opening it in every step
        except FileNotFoundError:
            self._status, self._step = None, 0
            return
        except (OSError, ValueError) as error:
            self._status, self._step = None, 0
            self._warn(f"cannot be read ({getattr(error, 'strerror', None) or error})")
            return
        now = monotonic()
        numbers = (status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if numbers != self._status:
            self._status, self._since = numbers, now
        elif now - self._since > SETTLED_SECONDS:
            return
        self._step = 0
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block
            self._warn("is not a file")
        elif status.st_size > MOST_BYTES:
            self._warn(f"has {status.st_size} bytes, expected a step number")
        else:
            self._read()

    def _read(self) -> None:
        try:
            # The file may have been replaced by a FIFO in the meantime, which would block.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            self._warn(f"cannot be read ({error.strerror})")
            return
        try:
            content = os.read(descriptor, MOST_BYTES)
        except OSError as error:
            self._warn(f"cannot be read ({error.strerror})")
            return
        finally:
            os.close(descriptor)
        number = STEP_NUMBER.fullmatch(content.decode(errors="replace"))
        if number:
            self._step = int(number[1])
        else:
            shown = ascii(content.decode(errors="replace")) if content else "nothing"
            self._warn(f"holds {shown}, expected a step number N (save and stop) or -N (save and go on)")

    def _warn(self, message: str, key: str = "") -> None:
        """Log a warning, once for each ``key`` (default: the message)."""
        if (key or message) not in self._warned:
            self._warned.add(key or message)
            log.warning(f"ckpt.stop_file_path: {self.path} {message}. It is ignored, and training goes on")


class LauncherPatience:
    """Time for which the launcher of this rank, torchrun or ``internlm train``, waits for it after a signal.

    Args:
        environment: Environment variables of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.launched = "TORCHELASTIC_RUN_ID" in environment
        #: Seconds after a signal to the launcher in which it kills its ranks. Ranks do not see --shutdown-timeout.
        self.seconds = _number(environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        self._last_step: float | None = None
        self._warned = False

    def note_step(self) -> None:
        """Warn once if the time since the last call is nearly as long as the launcher waits for a rank after a signal.

        It is called after each step, and between the batches of a validation, which a request to stop ends.
        """
        now, last = monotonic(), self._last_step
        self._last_step = now
        if not self.launched or last is None or self._warned or now - last < self.seconds * 2 / 3:
            return
        self._warned = True
        log.warning(
            f"a step with its save took {now - last:.1f} s, and the launcher kills ranks {self.seconds:g} s after a "
            "signal, unless --shutdown-timeout is set: raise it, or signal the ranks in place of the launcher"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 30.0
