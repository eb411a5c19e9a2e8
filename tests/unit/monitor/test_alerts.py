"""Alerts: to a webhook, to a file, and never in the way."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internlm.config.schema import AlertConfig
from internlm.monitor import alerts, initialize_monitor_manager, send_alert_message
from internlm.utils.errors import DataError, Problem


class Webhook:
    """A loopback server that keeps the texts it is sent."""

    def __init__(self, status: int) -> None:
        self.texts: list[str] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert (self.headers["Content-Type"], body["msg_type"]) == ("application/json", "text")
                hook.texts.append(body["content"]["text"])
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def webhook(request: pytest.FixtureRequest) -> Iterator[Webhook]:
    hook = Webhook(getattr(request, "param", 200))
    yield hook
    hook.close()


def config_for(webhook: Webhook, **keys: Any) -> AlertConfig:
    return AlertConfig(enable_feishu_alert=True, feishu_alert_address=webhook.address, **keys)


# -- messages


def test_a_message_reaches_its_address(webhook: Webhook) -> None:
    assert send_alert_message(webhook.address, title="7b", message="loss spike: 9.5 at step 3")
    assert webhook.texts == ["[7b] loss spike: 9.5 at step 3"]


def test_without_an_address_nothing_is_sent() -> None:
    assert not send_alert_message(message="hello")


def test_the_run_says_whom_to_tell(webhook: Webhook) -> None:
    with initialize_monitor_manager("7b", alert=config_for(webhook)):
        assert send_alert_message(message="hello")
    assert webhook.texts == ["[7b] started", "[7b] hello", "[7b] ended"]
    assert not send_alert_message(message="the run is over")


def test_an_address_that_is_not_switched_on_gets_nothing(webhook: Webhook) -> None:
    with initialize_monitor_manager("7b", alert=AlertConfig(feishu_alert_address=webhook.address)):
        assert not send_alert_message(message="hello")
    assert webhook.texts == []


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


@pytest.mark.parametrize("webhook", [404, 500], indirect=True)
def test_a_webhook_that_refuses(webhook: Webhook) -> None:
    assert not send_alert_message(webhook.address, message="hello")


def listening(answer: bytes | None) -> Iterator[str]:
    """The address of something that answers once, in its own way."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                if answer is None:
                    stop.wait(10)
                else:
                    connection.sendall(answer)

        stop = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        stop.set()
        thread.join()


@pytest.fixture(params=[b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 9999 ?\r\n\r\n", None], ids=repr)
def no_webhook(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from listening(request.param)


def test_something_else_than_a_webhook(no_webhook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "TIMEOUT_SECONDS", 0.2)
    assert not send_alert_message(no_webhook, message="hello")


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1",
        "http://127.0.0.1:port",
        "not an address",
        "http://a b/c",
        "file:///etc/hostname/x",
        "http://[",
    ],
)
def test_a_dead_or_senseless_address(address: str) -> None:
    assert not send_alert_message(address, message="hello")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with initialize_monitor_manager("7b", alert=AlertConfig(alert_file_path=str(tmp_path))):
        assert not send_alert_message(message="hello")


# -- the monitor


def test_the_start_and_the_end_are_sent_to_an_address(webhook: Webhook) -> None:
    """With the keywords of existing scripts."""
    with initialize_monitor_manager(job_name="7b", alert_address=webhook.address):
        assert send_alert_message(message="hello")
    with initialize_monitor_manager("another", None):
        assert not send_alert_message(message="hello")
    assert webhook.texts == ["[7b] started", "[7b] hello", "[7b] ended"]


def test_an_exception_is_sent_with_its_traceback_and_raised(webhook: Webhook) -> None:
    with (
        pytest.raises(RuntimeError, match="a bug"),
        initialize_monitor_manager("7b", alert=config_for(webhook)),
    ):
        raise RuntimeError("a bug")
    started, failed = webhook.texts
    assert started == "[7b] started"
    assert failed.startswith("[7b] failed:\nTraceback (most recent call last):")
    assert failed.endswith("RuntimeError: a bug\n")


def test_a_users_mistake_is_sent_without_traceback(webhook: Webhook) -> None:
    with pytest.raises(DataError), initialize_monitor_manager("7b", alert=config_for(webhook)):
        raise DataError(Problem("data.train_folder", "no such folder", "Check the path"))
    assert webhook.texts[1:] == ["[7b] stopped: data.train_folder: no such folder. Check the path"]


def test_an_inner_run_tells_its_own_people(webhook: Webhook) -> None:
    with initialize_monitor_manager("outer", alert=config_for(webhook)):
        with initialize_monitor_manager("inner"):
            send_alert_message(message="to nobody")
        send_alert_message(message="back")
    assert webhook.texts == ["[outer] started", "[outer] back", "[outer] ended"]


def test_a_dead_webhook_does_not_stop_a_run() -> None:
    dead = AlertConfig(enable_feishu_alert=True, feishu_alert_address="http://127.0.0.1:1")
    with initialize_monitor_manager("7b", alert=dead):
        pass
