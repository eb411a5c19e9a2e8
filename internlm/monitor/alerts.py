"""Alerts at the start, end or failure of a run, by webhook and file.

If a webhook or the file fails, a warning is logged and training continues. Webhooks are called in the background
(``webhook.py``).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from internlm.config.schema import AlertConfig
from internlm.monitor.webhook import SENDER
from internlm.utils.errors import UserError, first_of_all_ranks
from internlm.utils.logger import get_logger

NO_NAME = "internlm"
log = get_logger()

#: Job name and alert addresses of the run, set within :func:`initialize_monitor_manager`.
_current: tuple[str, AlertConfig] | None = None


def send_alert_message(address: str | None = None, title: str | None = None, message: str = "") -> bool:
    """Send an alert to a webhook in the background, and append it to the run's alert file.

    Args:
        address: URL (http or https) of the webhook; None: the webhook of the run.
        title: Prefix of the message; None: the job name.
        message: Text of the alert.

    Returns:
        Whether the alert was queued for a webhook. Failures are logged, never raised.
    """
    job, alert = _current or (NO_NAME, AlertConfig())
    address = address or _webhook(alert)
    text = f"[{title or job}] {message}"
    if alert.alert_file_path:
        _append(Path(alert.alert_file_path), text)
    return SENDER.send(address, text) if address else False


def _webhook(alert: AlertConfig) -> str | None:
    return alert.feishu_alert_address if alert.enable_feishu_alert else None


def _append(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        log.warning(f"alert not written to {path}: {error}")


@contextmanager
def initialize_monitor_manager(
    job_name: str | None = None, alert_address: str | None = None, *, alert: AlertConfig | None = None
) -> Iterator[None]:
    """Send alerts when the ``with`` block starts, ends, or raises an exception, each once per job and destination.

    In the ``with`` block, :func:`send_alert_message` uses ``job_name`` and the same destinations by default. The end of
    the block waits for alerts that have not been sent yet, for a bounded time.

    Args:
        job_name: Prefix of the messages; default: ``"internlm"``.
        alert_address: URL of a webhook, instead of the one in ``alert``.
        alert: Webhook and file of the alerts; default: none.
    """
    alert = alert or AlertConfig()
    if alert_address:
        alert = alert.model_copy(update={"enable_feishu_alert": True, "feishu_alert_address": alert_address})
    with _destinations(job_name or NO_NAME, alert):
        _send_once("started")
        try:
            with alerting_failures():
                yield
            _send_once("ended")
        finally:
            SENDER.flush()


@contextmanager
def _destinations(job_name: str, alert: AlertConfig) -> Iterator[None]:
    """Send the alerts of the ``with`` block to the destinations in ``alert``."""
    global _current
    previous, _current = _current, (job_name, alert)
    try:
        yield
    finally:
        _current = previous


@contextmanager
def alerting_failures(destinations: Callable[[], tuple[str, AlertConfig] | None] = lambda: _current) -> Iterator[None]:
    """Send an alert if the ``with`` block raises an exception, once per job and destination, and re-raise it.

    Args:
        destinations: Function that returns the job name and the destinations, called after the exception; default:
            those of the enclosing :func:`initialize_monitor_manager`.
    """
    try:
        yield
    except Exception as error:
        # The message of a UserError says what to do, so its alert needs no traceback.
        details = (
            ("stopped", f": {error}") if isinstance(error, UserError) else ("failed", f":\n{traceback.format_exc()}")
        )
        with _destinations(*(destinations() or (NO_NAME, AlertConfig()))):
            _send_once(*details)
            SENDER.flush()
        raise


def _send_once(event: str, details: str = "") -> None:
    """Send an alert to each destination, unless this or another rank has sent it there.

    Many ranks may raise the same failure, and a script's own monitor may enclose that of the run.
    """
    job, alert = _current or (NO_NAME, AlertConfig())
    webhook, file, text = _webhook(alert), alert.alert_file_path, f"[{job}] {event}{details}"
    if file and first_of_all_ranks(f"alert to {file}: {event}"):
        _append(Path(file), text)
    if webhook and first_of_all_ranks(f"alert to {webhook}: {event}"):
        SENDER.send(webhook, text)
