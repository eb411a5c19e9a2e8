"""Files that hold the records of a run: ``metrics.jsonl``, ``train.log`` and TensorBoard's event files.

A record is written whole or not at all, so that a full disk leaves no torn one, and a file that is deleted during the
run is created again.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from internlm.monitor.console import format_line
from internlm.utils.lazy import require
from internlm.utils.logger import FailureNotice, get_logger

Metrics = Mapping[str, float | int]
log = get_logger()


class AppendedFile:
    """File to which records are appended.

    Args:
        path: File to append to; its folder is created.
        header: Function that returns the first record of each opened file.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, header: Callable[[], bytes] = bytes) -> None:
        self.path, self._header = path, header
        self._descriptor: int | None = None
        self._open()

    def append(self, record: bytes) -> None:
        """Write ``record``; on failure, nothing of it is left in the file.

        Raises:
            OSError: The record cannot be written, for example because the disk is full.
            ValueError: The file was closed.
        """
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        if os.fstat(self._descriptor).st_nlink == 0:
            self.close()
            self._open()
            log.warning(f"{self.path} was deleted and is created again")
        self._write(record)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: a FIFO without a reader is an error, and does not block for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        self._write(self._header())

    def _write(self, record: bytes) -> None:
        assert self._descriptor is not None
        size, rest = os.fstat(self._descriptor).st_size, record
        try:
            # A disk that becomes full takes a part of the record first.
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):  # a device cannot be truncated
                os.ftruncate(self._descriptor, size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


class JsonLines:
    """Writer of one JSON object per step, appended to a file; inf and NaN are written as strings."""

    def __init__(self, path: Path) -> None:
        self._file = AppendedFile(path)

    def write(self, step: int, metrics: Metrics) -> None:
        """Append the metrics of a step as a JSON object."""
        # JSON has no inf and nan, and most parsers reject Python's.
        safe = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self._file.append(f"{json.dumps(safe)}\n".encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LogFile:
    """Writer of a log file, to which all lines that the framework logs on this rank are copied.

    Args:
        path: File to append to.
        write_metrics: Also write the metrics of each step as one line. Set it if the console writer does not log them.
    """

    def __init__(self, path: Path, write_metrics: bool) -> None:
        self._handler = _LogFileHandler(path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._write_metrics = write_metrics
        log.addHandler(self._handler)

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the metrics of ``step`` as one line, unless the console writer already logs them."""
        if self._write_metrics:
            line = format_line(metrics)
            self._handler.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None))

    def close(self) -> None:
        """Detach the file from the logger and close it."""
        log.removeHandler(self._handler)
        self._handler.close()


class _LogFileHandler(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file, self._notice = AppendedFile(path), FailureNotice(str(path))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.append(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception as error:  # logging must not end a run
            self._notice.failed(error)
        else:
            self._notice.succeeded()

    def close(self) -> None:
        self._file.close()
        super().close()


class TensorBoard:
    """Writer of metrics to a TensorBoard event file, as scalars.

    TensorBoard's own writer has a queue and a thread, after whose death a run writes nothing more, or blocks.

    Args:
        folder: Folder of the event file.
        queue: Number of scalars that are buffered.
        first_step: Step at which a resumed run begins; earlier records of this and later steps are hidden.

    Raises:
        UserError: TensorBoard is not installed.
        OSError: The file cannot be opened.
    """

    def __init__(self, folder: Path, queue: int, first_step: int = 0) -> None:
        require("tensorboard", "enable_tb", "pip install tensorboard")
        # Imported here because TensorBoard is optional.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary, self._records = Event, SessionLog, Summary, RecordWriter
        self._queue, self._first_step = queue, first_step
        self._buffer, self._scalars = b"", 0
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name, self._header)

    def write(self, step: int, metrics: Metrics) -> None:
        """Add a scalar for each metric; write the buffer to the file if it is full."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._buffer += self._record(step=step, summary=self._summary(value=values))
        self._scalars += len(values)
        if self._scalars >= self._queue:
            self._flush()

    def close(self) -> None:
        """Write the buffer and close the event file."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        # What cannot be written is dropped: a disk may stay full for the rest of the run.
        buffered, self._buffer, self._scalars = self._buffer, b"", 0
        self._file.append(buffered)

    def _header(self) -> bytes:
        header = self._record(file_version="brain.Event:2")
        if self._first_step:
            started = self._session(status=self._session.START)
            header += self._record(step=self._first_step, session_log=started)
        return header

    def _record(self, **fields: object) -> bytes:
        """Return an event with ``fields``, with the length and the checksums of a TFRecord."""
        framed = io.BytesIO()
        self._records(framed).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        return framed.getvalue()
