"""Signals of a training process: SIGTERM, SIGINT and SIGHUP end it in every phase, SIGUSR1 saves, SIGUSR2 shows stacks.

A process has three phases:

1. Before the first step, signals end it at once: there is nothing to save. The death of its launcher does so too.
2. In training, signals are requests, which all ranks follow after a step (:mod:`internlm.utils.stop_requests`).
3. After the last step, signals set the exit code, and the process ends as it would without them.

A signal more than :data:`REPEAT_SECONDS` after the first one ends the process at once in every phase. The exit code is
always 128 + the signal number. Each case logs one line.

This file must not import torch: signals are handled before that import, which takes seconds.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import TypeVar

from internlm.utils import progress
from internlm.utils.logger import get_logger
from internlm.utils.lost_ranks import record_stop, recorded_exit_code
from internlm.utils.progress import exit_now, launcher_has_died
from internlm.utils.signal_thread import SignalThread, is_free
from internlm.utils.stop_requests import REQUEST_OF_SIGNAL, Inbox, Request

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STACKS_SIGNAL = signal.SIGUSR2
#: Seconds after the first signal in which further signals belong to the same request: whoever ends a job may signal the
#: launcher and the ranks, and the launcher passes its own signal on to the ranks.
REPEAT_SECONDS = 3.0
#: Seconds in which the main thread can leave by an exception, after which the process is ended under it.
GRACE_SECONDS = 2.0
#: Seconds between two looks at the launcher before the first step.
LAUNCHER_SECONDS = 0.5
#: Bound of a log line or an entry in the store, in seconds, where it must not delay the end of the process.
LAST_WORDS_SECONDS = 2.5
log = get_logger()


class Phase(Enum):
    """Phase of a training process."""

    BEFORE = auto()
    TRAINING = auto()
    AFTER = auto()


class StopSignals:
    """Handlers of the signals of this process, whose effect depends on the phase of training.

    Args:
        installed: Whether to handle signals, which only the main thread can do. Signals that are ignored, or that have
            a handler already, are left alone.
    """

    def __init__(self, installed: bool = True) -> None:
        self.phase = Phase.BEFORE
        self.inbox = Inbox()
        self.exit_code = 0
        """Exit code of the process if nothing else happens: 0, or 128 + the number of the signal that stopped it."""
        self._applied = 0  # exit code that the main thread knows
        self._saved = ""  # what the run has saved at its end, in words
        self._first: float | None = None  # time of the first signal in this phase
        self.thread = SignalThread(_free_signals(), self._receive) if installed else None
        if self.thread:
            threading.Thread(target=self._watch_launcher, args=[self.thread], name="launcher", daemon=True).start()

    # -- phases -------------------------------------------------------------------------------------------------------
    def restart(self) -> None:
        """Begin with the phase before the first step of another run."""
        self.phase, self.exit_code, self._applied, self._first = Phase.BEFORE, 0, 0, None

    def begin_training(self, inbox: Inbox) -> None:
        """Add signals to ``inbox`` from here on."""
        self.inbox, self._first = inbox, None
        self.phase = Phase.TRAINING

    def end_training(self, saved: str, exit_code: int) -> None:
        """Let signals set the exit code from here on, unless ``exit_code`` is not 0; ``saved`` is for the log line."""
        self._saved, self.exit_code, self._applied, self._first = saved, exit_code, exit_code, None
        self.phase = Phase.AFTER

    def final_exit_code(self) -> int:
        """Return the exit code for the main function to exit with; a later signal ends the process with its own."""
        self.settle()
        self._applied = self.exit_code
        return self.exit_code

    def settle(self) -> None:
        """Block until the thread has acted on the signals that this process has received so far."""
        if self.thread:
            self.thread.settle()

    def close(self) -> None:
        """Restore the previous handlers. After a stop, ignore the signals that stop a run.

        When one rank exits, the launcher sends SIGTERM to the others, which must not change their exit code.
        """
        if self.thread:
            self.thread.close(ignored=STOP_SIGNALS if self.exit_code else ())
        self.thread = None

    # -- what a signal does -------------------------------------------------------------------------------------------
    def _receive(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            if self.phase is Phase.TRAINING:
                self.inbox.add(REQUEST_OF_SIGNAL[signal.Signals(number)])
            return
        if progress.is_failing():  # the launcher ends what is left of the job, but the reason is to be printed before
            return
        name, code, now = f"{signal.Signals(number).name}{_on_this_rank()}", 128 + number, time.monotonic()
        if self._first is not None:
            if now - self._first > REPEAT_SECONDS:
                self._quit(code, f"{name} again: exiting {code} at once. Complete checkpoints stay intact")
            return
        self._first = now
        if self.phase is Phase.BEFORE:
            self._quit_before_training(name, code)
        elif self.phase is Phase.TRAINING:
            self.inbox.add(REQUEST_OF_SIGNAL[signal.Signals(number)])
            hint = f"another signal after {REPEAT_SECONDS:g} s or more quits at once"
            _bounded(lambda: log.info(f"{name}: finishing the step before exiting {code}; {hint}"))
        elif not self.exit_code:
            self.exit_code = code
            _bounded(lambda: log.warning(f"{name} after the last step: {self._saved}, exiting {code}"))

    def _watch_launcher(self, thread: SignalThread) -> None:
        """End the process if its launcher dies before the first step; after each step the hook of requests looks."""
        while "TORCHELASTIC_RUN_ID" in os.environ and not thread.closed.wait(LAUNCHER_SECONDS):
            if self.phase is Phase.BEFORE and launcher_has_died() and not progress.is_failing():
                effect = Request.LAUNCHER_DIED.value
                self._quit_before_training(effect.source.format(rank=os.environ.get("RANK")), effect.exit_code)
                return

    def _quit_before_training(self, cause: str, code: int) -> None:
        # The launcher ends all ranks if one has stopped, and that rank has said why.
        ended = _bounded(recorded_exit_code)
        self._quit(ended or code, "" if ended else f"{cause} before the first step: nothing to save, exiting {code}")

    def _quit(self, code: int, line: str) -> None:
        """End the process: by an exception in the main thread, or under it if it does not react."""
        if line:
            _bounded(lambda: log.warning(line))
        _bounded(lambda: record_stop(code))
        if self.thread and not self.thread.leave(code, GRACE_SECONDS):
            exit_now(code)

    def at_exit(self) -> None:
        """Apply a signal that arrived since the main function returned, and ignore any later one."""
        self.settle()
        if self.exit_code != self._applied:
            exit_now(self.exit_code)  # the interpreter has another exit code already
        if self.thread:
            self.thread.close(ignored=STOP_SIGNALS)


_signals = StopSignals(installed=False)


def stop_signals() -> StopSignals:
    """Return what the signals of this process do; they do nothing if they are not handled."""
    return _signals


def catch_signals() -> StopSignals:
    """Handle the signals of this process from here to its end; to be called first in a main function.

    SIGUSR2 prints the Python stacks of all threads to stderr.
    """
    global _signals
    _signals.close()
    _signals = StopSignals(installed=threading.current_thread() is threading.main_thread())
    atexit.register(_signals.at_exit)
    if is_free(STACKS_SIGNAL):
        faulthandler.register(STACKS_SIGNAL)
    return _signals


@contextmanager
def catching_signals() -> Iterator[None]:
    """Handle the signals of this process in the ``with`` block, unless :func:`catch_signals` has been called."""
    global _signals
    if _signals.thread is not None:
        _signals.restart()
        yield
        return
    _signals = StopSignals(installed=threading.current_thread() is threading.main_thread())
    try:
        yield
    finally:
        _signals.close()


def _free_signals() -> list[signal.Signals]:
    """Return the signals that nobody ignores or handles; log which ones do not stop the run."""
    free = [number for number in REQUEST_OF_SIGNAL if is_free(number)]
    for number in {*STOP_SIGNALS} - {*free}:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup is to have this effect
            continue
        log.info(f"{number.name} does not save and stop this run, since it is ignored or has a handler already")
    return free


def _on_this_rank() -> str:
    rank = os.environ.get("RANK")
    return f" on rank {rank}" if rank else ""


def _bounded(function: Callable[[], T]) -> T | None:
    """Call ``function`` in a thread, and return its result, or None if it takes too long.

    The main thread may be blocked in C++ with the lock of the store or of stderr.
    """
    result: list[T] = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)
    return result[0] if result else None
