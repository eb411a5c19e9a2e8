"""Alerts at the start, end or failure of a run, by webhook and file.

If a webhook or the file fails, a warning is logged and training continues.
"""

from __future__ import annotations

import functools
import json
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from internlm.config.schema import AlertConfig
from internlm.utils.errors import UserError, first_of_all_ranks
from internlm.utils.logger import get_logger

F = TypeVar("F", bound=Callable[..., Any])
TIMEOUT_SECONDS = 5
log = get_logger()

#: Job name and alert addresses of the run, set within :func:`initialize_monitor_manager`.
_current: tuple[str, AlertConfig] | None = None


def send_alert_message(address: str | None = None, title: str | None = None, message: str = "") -> bool:
    """Post an alert to a webhook, and append it to the run's alert file.

    Args:
        address: URL of the webhook; None: the webhook of the run.
        title: Prefix of the message; None: the job name.
        message: Text of the alert.

    Returns:
        Whether the webhook accepted the alert. Failures are logged, never raised.
    """
    job, alert = _current or ("internlm", AlertConfig())
    address = address or (alert.feishu_alert_address if alert.enable_feishu_alert else None)
    text = f"[{title or job}] {message}"
    if alert.alert_file_path:
        _append(Path(alert.alert_file_path), text)
    if not address:
        return False
    # The message format of Feishu (Lark) bots.
    body = json.dumps({"msg_type": "text", "content": {"text": text}}).encode()
    try:
        request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    # ValueError: the address is not a URL. HTTPException: the response is not HTTP.
    except (OSError, ValueError, HTTPException) as error:
        log.warning(f"alert not delivered to {address}: {error}")
        return False


def _append(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")
    except OSError as error:
        log.warning(f"alert not written to {path}: {error}")


@contextmanager
def initialize_monitor_manager(job_name: str, alert: AlertConfig | None = None) -> Iterator[None]:
    """Send alerts when the ``with`` block starts, ends, or raises an exception, each once per job.

    In the ``with`` block, :func:`send_alert_message` uses ``job_name`` and the addresses in ``alert`` by default.

    Args:
        job_name: Prefix of the messages.
        alert: Webhook and file of the alerts; default: none.
    """
    global _current
    previous, _current = _current, (job_name, alert or AlertConfig())
    try:
        _send_once("started")
        yield
        _send_once("ended")
    # The message of a UserError says what to do, so its alert needs no traceback.
    except UserError as error:
        _send_once("stopped", f": {error}")
        raise
    except Exception:
        _send_once("failed", f":\n{traceback.format_exc()}")
        raise
    finally:
        _current = previous


def _send_once(event: str, details: str = "") -> None:
    if first_of_all_ranks(f"alert: {event}"):  # many ranks may raise the same failure
        send_alert_message(message=event + details)


def internevo_monitor(job_name: str = "internlm", alert: AlertConfig | None = None) -> Callable[[F], F]:
    """Return a decorator that runs a main function within :func:`initialize_monitor_manager`, which sends alerts.

    Args:
        job_name: Prefix of the messages.
        alert: Webhook and file of the alerts; default: none.
    """

    def decorate(main: F) -> F:
        @functools.wraps(main)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with initialize_monitor_manager(job_name, alert):
                return main(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate
