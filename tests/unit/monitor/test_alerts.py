"""Alerts: to a webhook, to a file, and never in the way."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.config.schema import AlertConfig
from internlm.monitor import initialize_monitor_manager, send_alert_message, webhook
from internlm.monitor.webhook import SENDER
from internlm.utils.errors import DataError, Problem
from tests.harness.webhooks import Webhook, answering, dribbling, silent, webhook_server

TOKEN = "t0ken"
Answer = Callable[[socket.socket, threading.Event], None]


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook_server() as server:
        yield server


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "EXCHANGE_SECONDS", 0.3)
    monkeypatch.setattr(webhook, "FLUSH_SECONDS", 3.0)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture the framework's log, even where its logger has a handler of its own."""
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    return caplog


def config_for(hook: Webhook, **keys: Any) -> AlertConfig:
    return AlertConfig(enable_feishu_alert=True, feishu_alert_address=hook.address, **keys)


# -- messages


def test_a_message_reaches_its_address(hook: Webhook) -> None:
    assert send_alert_message(hook.address, title="7b", message="loss spike: 9.5 at step 3")
    SENDER.flush()
    assert hook.texts == ["[7b] loss spike: 9.5 at step 3"]


def test_without_an_address_nothing_is_sent() -> None:
    assert not send_alert_message(message="hello")


def test_the_run_says_whom_to_tell(hook: Webhook) -> None:
    with initialize_monitor_manager("7b", alert=config_for(hook)):
        assert send_alert_message(message="hello")
    assert hook.texts == ["[7b] started", "[7b] hello", "[7b] ended"]
    assert not send_alert_message(message="the run is over")


def test_an_address_that_is_not_switched_on_gets_nothing(hook: Webhook) -> None:
    with initialize_monitor_manager("7b", alert=AlertConfig(feishu_alert_address=hook.address)):
        assert not send_alert_message(message="hello")
    assert hook.texts == []


def test_alerts_are_appended_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "alerts.txt"
    with initialize_monitor_manager("7b", alert=AlertConfig(alert_file_path=str(path))):
        send_alert_message(message="hello")
    lines = path.read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "[7b] started",
        "[7b] hello",
        "[7b] ended",
    ]


# -- what never harms training


def delivery(address: str, log: pytest.LogCaptureFixture) -> list[str]:
    """Send an alert, assert that the call takes no time, and return the warnings of its delivery."""
    start = time.perf_counter()
    send_alert_message(address, message="hello")
    assert time.perf_counter() - start < 0.1
    SENDER.flush()
    return log.messages


@pytest.mark.parametrize("status", [404, 500])
def test_a_webhook_that_refuses(status: int, log: pytest.LogCaptureFixture) -> None:
    with webhook_server(status) as hook:
        (warning,) = delivery(hook.address, log)
    assert warning == f"alert not delivered to {hook.address.removesuffix('hook')}***: HTTP status {status}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_not_followed(status: int, log: pytest.LogCaptureFixture) -> None:
    with webhook_server(status) as hook:
        (warning,) = delivery(hook.address, log)
        assert (len(hook.texts), hook.redirected) == (1, 0)
    assert warning.endswith(f"***: HTTP status {status}, and redirects are not followed")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda connection, stop: None, "RemoteDisconnected"),
        (lambda connection, stop: connection.sendall(b"SSH-2.0-OpenSSH t0ken\r\n"), "BadStatusLine"),
        (lambda connection, stop: connection.sendall(b"HTTP/1.1 9999 t0ken\r\n\r\n"), "BadStatusLine"),
        (silent, "no response within 0.3 s"),
        (dribbling, "no response within 0.3 s"),
    ],
    ids=["closed", "no http", "wrong status", "silent", "dribbling"],
)
def test_something_else_than_a_webhook(answer: Answer, reason: str, log: pytest.LogCaptureFixture) -> None:
    with answering(answer) as address:
        (warning,) = delivery(address, log)
    assert warning == f"alert not delivered to {address.removesuffix('hook')}***: {reason}"


def test_a_port_at_which_nobody_listens(log: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (warning,) = delivery(f"http://127.0.0.1:{port}/{TOKEN}", log)
    assert warning == f"alert not delivered to http://127.0.0.1:{port}/***: Connection refused"


@pytest.mark.parametrize(
    "address",
    [f"http://127.0.0.1:port/{TOKEN}", TOKEN, f"http://a b/{TOKEN}", f"file:///etc/{TOKEN}", "http://["],
)
def test_what_is_no_web_address_is_refused_at_once(address: str, log: pytest.LogCaptureFixture) -> None:
    assert not send_alert_message(address, message="hello")
    (warning,) = log.messages
    assert warning.endswith(" is not an http or https URL")
    assert TOKEN not in warning


def test_alerts_are_sent_in_order_and_those_that_find_the_queue_full_are_dropped(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "EXCHANGE_SECONDS", 10.0)
    go = threading.Event()
    with webhook_server(before=go.wait) as hook:
        queued = [send_alert_message(hook.address, title="7b", message=str(index)) for index in range(40)]
        go.set()
        SENDER.flush()
    # The first one may have left the queue before the last one came.
    assert queued.index(False) in (webhook.QUEUE_LENGTH, webhook.QUEUE_LENGTH + 1)
    assert hook.texts == [f"[7b] {index}" for index, is_queued in enumerate(queued) if is_queued]
    assert len(log.messages) == 1, "one warning for all that were dropped"


def test_the_end_of_a_run_waits_for_a_bounded_time(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "FLUSH_SECONDS", 0.1)
    with answering(silent) as address:
        start = time.perf_counter()
        with initialize_monitor_manager("7b", alert_address=address):
            send_alert_message(message="hello")
        assert time.perf_counter() - start < 1
        # Before the server ends, which closes the connection of the first alert.
        assert log.messages == ["2 alerts were dropped: they were not sent within 0.1 s"]


def test_exchanges_that_hang_do_not_pile_up(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "EXCHANGE_SECONDS", 0.05)
    with answering(dribbling) as address:
        for _ in range(webhook.MAX_HANGING + 2):
            send_alert_message(address, message="hello")
        SENDER.flush()
    reasons = [message.rpartition(": ")[2] for message in log.messages]
    assert reasons.count("no response within 0.05 s") == webhook.MAX_HANGING
    assert reasons[-2:] == [f"{webhook.MAX_HANGING} earlier exchanges hang"] * 2


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with initialize_monitor_manager("7b", alert=AlertConfig(alert_file_path=str(tmp_path))):
        assert not send_alert_message(message="hello")


# -- the monitor


def test_the_start_and_the_end_are_sent_to_an_address(hook: Webhook) -> None:
    """With the keywords of existing scripts."""
    with initialize_monitor_manager(job_name="7b", alert_address=hook.address):
        assert send_alert_message(message="hello")
    with initialize_monitor_manager("another", None):
        assert not send_alert_message(message="hello")
    assert hook.texts == ["[7b] started", "[7b] hello", "[7b] ended"]


def test_an_exception_is_sent_with_its_traceback_and_raised(hook: Webhook) -> None:
    with (
        pytest.raises(RuntimeError, match="a bug"),
        initialize_monitor_manager("7b", alert=config_for(hook)),
    ):
        raise RuntimeError("a bug")
    started, failed = hook.texts
    assert started == "[7b] started"
    assert failed.startswith("[7b] failed:\nTraceback (most recent call last):")
    assert failed.endswith("RuntimeError: a bug\n")


def test_a_users_mistake_is_sent_without_traceback(hook: Webhook) -> None:
    with pytest.raises(DataError), initialize_monitor_manager("7b", alert=config_for(hook)):
        raise DataError(Problem("data.train_folder", "no such folder", "Check the path"))
    assert hook.texts[1:] == ["[7b] stopped: data.train_folder: no such folder. Check the path"]


def test_an_inner_run_tells_its_own_people(hook: Webhook) -> None:
    with initialize_monitor_manager("outer", alert=config_for(hook)):
        with initialize_monitor_manager("inner"):
            send_alert_message(message="to nobody")
        send_alert_message(message="back")
    assert hook.texts == ["[outer] started", "[outer] back", "[outer] ended"]


def test_a_dead_webhook_does_not_stop_a_run() -> None:
    dead = AlertConfig(enable_feishu_alert=True, feishu_alert_address="http://127.0.0.1:1")
    with initialize_monitor_manager("7b", alert=dead):
        pass
