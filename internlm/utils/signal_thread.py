"""Thread that acts on signals, also while the main thread is blocked in C++, where Python calls no handler.

Python calls the handler of a signal between two instructions of the main thread, so never while that thread is blocked
in C++, as in a rendezvous or a collective. Therefore the handlers here do nothing: the interpreter also writes the
number of each signal to a socket (``signal.set_wakeup_fd``), which a thread reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any


def is_free(signum: int) -> bool:
    """Return whether nobody ignores or handles a signal, neither in Python nor in C."""
    handler = signal.getsignal(signum)
    if handler is signal.default_int_handler:
        return True
    # Python does not know handlers that C code has installed, such as those of faulthandler.register.
    return handler is signal.SIG_DFL and not _is_caught(signum)


def _is_caught(signum: int) -> bool:
    """Return whether this process has a handler for the signal, as Linux reports it; False on other systems."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)


class EndedBySignal(SystemExit):
    """Exception that ends the process after a signal, so that code which catches other exits lets it pass."""


class SignalThread:
    """Handlers of signals, and the thread that acts on them; only the main thread can create it.

    Args:
        numbers: Signals to handle, which are free.
        act: Function that acts on a signal. The thread calls it, or the main thread where an event loop of the script
            reads the numbers of signals already.
    """

    def __init__(self, numbers: Iterable[int], act: Callable[[int], None]) -> None:
        self.act = act
        self.closed = threading.Event()
        self._leaving, self._leave_with = False, 0  # exit code to raise in the main thread; 0: none
        self._seen = self._done = 0  # signals of which the main thread was informed, and on which the thread has acted
        self._progress = threading.Condition()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in numbers}
        other = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.has_thread = other == -1
        if self.has_thread:
            threading.Thread(target=self._serve, name="signals", daemon=True).start()
        else:
            signal.set_wakeup_fd(other)
        # A forked child has the socket too: its signals would be taken for those of this process.
        self._mask = threading.local()
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=lambda: self._unblock(child=True)
        )

    def close(self, ignored: Iterable[int] = ()) -> None:
        """Restore the previous handlers, except that the signals ``ignored`` are ignored from here on."""
        if self.closed.is_set():
            return
        self._restore(ignored)
        with contextlib.suppress(OSError):
            self._reader.shutdown(socket.SHUT_RDWR)  # ends the thread, which closes it

    def _restore(self, ignored: Iterable[int] = ()) -> None:
        self.closed.set()
        if self.has_thread:
            signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in ignored else handler)
        self._writer.close()

    def _block(self) -> None:
        """Hold back signals while the process forks."""
        if not self.closed.is_set():
            self._mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)

    def _unblock(self, child: bool = False) -> None:
        before = self._mask.__dict__.pop("before", None)
        if before is None:
            return
        if child and not self.closed.is_set():
            self._restore()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def settle(self) -> None:
        """Block until the thread has acted on the signals that this process has received so far."""
        with self._progress:
            self._progress.wait_for(lambda: self._leaving or self._done >= self._seen, timeout=1)

    def leave(self, code: int, seconds: float) -> bool:
        """Raise ``EndedBySignal(code)`` in the main thread.

        Returns:
            False if the process still runs after ``seconds``, since the main thread is blocked in C++, or no signal
            is handled.
        """
        self._leaving, self._leave_with = True, code
        main = threading.main_thread()
        if threading.current_thread() is main:
            raise EndedBySignal(code)
        if not self._previous:  # no handler can raise it
            return False
        # Python calls the handler now; a signal, rather than _thread.interrupt_main, also interrupts a sleep.
        signal.pthread_kill(main.ident or 0, next(iter(self._previous)))
        return self.closed.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""
        code, self._leave_with = self._leave_with, 0
        if code:
            raise EndedBySignal(code)
        if self.has_thread:
            self._seen += 1
        else:
            self.act(number)

    def _serve(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in self._previous and not self._leaving:  # a script may handle other signals
                    self.act(number)
                    with self._progress:
                        self._done += 1
                        self._progress.notify_all()
        self._reader.close()
