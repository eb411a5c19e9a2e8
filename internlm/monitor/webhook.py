"""Delivery of alerts to webhooks in the background: http and https only, no redirects, every exchange limited in time.

Training never waits for a webhook: alerts are queued, and a daemon thread sends them one after the other. At the end of
a run, :meth:`WebhookSender.flush` waits for a bounded time.
"""

from __future__ import annotations

import atexit
import json
import queue
import threading
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from internlm.utils.logger import get_logger
from internlm.utils.secrets import is_web_address, mask_url

#: Seconds for a whole exchange with a webhook: name look-up, connection, request and response.
EXCHANGE_SECONDS = 5.0
#: Seconds that the end of a run waits for queued alerts.
FLUSH_SECONDS = 5.0
#: Number of alerts that may wait.
QUEUE_LENGTH = 16
#: Number of exchanges past their time limit that may still be running; more alerts are then refused.
MAX_HANGING = 4
log = get_logger()


class WebhookSender:
    """Sender that posts alerts to webhooks from a daemon thread, in the order in which they were queued."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, str]] = queue.Queue(QUEUE_LENGTH)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._hanging: list[threading.Thread] = []
        self._is_dropping = False  # until the queue is empty again

    def send(self, address: str, text: str) -> bool:
        """Queue ``text`` for the webhook at ``address``, without waiting.

        Returns:
            Whether the alert was queued. If not, and if the delivery fails later, a warning is logged.
        """
        if not is_web_address(address):
            log.warning(f"alert not delivered: {mask_url(address)!r} is not an http or https URL")
            return False
        self._start()
        if self._queue.empty():
            self._is_dropping = False
        try:
            self._queue.put_nowait((address, text))
        except queue.Full:
            if not self._is_dropping:
                log.warning(f"alerts are dropped: {QUEUE_LENGTH} others wait for delivery to {mask_url(address)}")
            self._is_dropping = True
            return False
        return True

    def flush(self) -> None:
        """Wait until all queued alerts have been sent, at most :data:`FLUSH_SECONDS`; then drop those that wait."""
        done = self._queue.all_tasks_done
        with done:
            if done.wait_for(lambda: not self._queue.unfinished_tasks, FLUSH_SECONDS):
                return
        dropped = 0
        while not self._queue.empty():
            try:
                self._queue.get_nowait()
            except queue.Empty:  # the thread took it
                break
            self._queue.task_done()
            dropped += 1
        if dropped:
            log.warning(f"{dropped} alerts were dropped: they were not sent within {FLUSH_SECONDS:g} s")

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
                self._thread.start()
                # For scripts that send an alert and end.
                atexit.register(self.flush)

    def _run(self) -> None:
        while True:
            address, text = self._queue.get()
            if failure := self._deliver(address, text):
                log.warning(f"alert not delivered to {mask_url(address)}: {failure}")
            self._queue.task_done()

    def _deliver(self, address: str, text: str) -> str:
        """Post ``text``; return the reason of a failure, or an empty string."""
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= MAX_HANGING:
            return f"{MAX_HANGING} earlier exchanges hang"
        # The timeout of a socket limits each read, but not their sum, nor the look-up of the name. So every exchange
        # has a thread of its own, which is left behind when the time is over.
        failures: list[str] = []
        thread = threading.Thread(target=lambda: failures.append(_post(address, text)), daemon=True)
        thread.start()
        thread.join(EXCHANGE_SECONDS)
        if failures:
            return failures[0]
        self._hanging.append(thread)
        return f"no response within {EXCHANGE_SECONDS:g} s"


class _NoRedirects(HTTPRedirectHandler):
    # A redirect may lead to an internal address that the sender of the alert can reach, but must not.
    def redirect_request(self, *_: Any) -> None:
        return None


def _post(address: str, text: str) -> str:
    """Post ``text`` in the message format of Feishu (Lark) bots; return the reason of a failure, or an empty string."""
    body = json.dumps({"msg_type": "text", "content": {"text": text}}).encode()
    # No reason quotes the response or the address, since both may contain the token.
    try:
        request = Request(address, data=body, headers={"Content-Type": "application/json"})
        with build_opener(_NoRedirects).open(request, timeout=EXCHANGE_SECONDS):
            return ""
    except HTTPError as error:
        error.close()
        return f"HTTP status {error.code}" + (", and redirects are not followed" if 300 <= error.code < 400 else "")
    except URLError as error:
        return getattr(error.reason, "strerror", None) or type(error.reason).__name__
    except Exception as error:  # whatever the server sends, training goes on
        return type(error).__name__


#: Sender of this process.
SENDER = WebhookSender()
