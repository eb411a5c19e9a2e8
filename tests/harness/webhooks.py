"""Webhooks on loopback: one that keeps what it gets, and servers that answer in ways of their own."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Webhook:
    """A server that keeps the texts it gets and answers with ``status``, after a call of ``before``.

    A redirect leads to ``/moved`` of the same server, whose requests are counted in ``redirected``.
    """

    def __init__(self, status: int, before: Callable[[], object]) -> None:
        self.texts: list[str] = []
        self.redirected = 0
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                before()
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert (self.headers["Content-Type"], body["msg_type"]) == ("application/json", "text")
                hook.texts.append(body["content"]["text"])
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/moved")
                self.end_headers()

            def do_GET(self) -> None:
                hook.redirected += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook"


@contextmanager
def webhook_server(status: int = 200, before: Callable[[], object] = lambda: None) -> Iterator[Webhook]:
    """Serve a :class:`Webhook` within the block."""
    hook = Webhook(status, before)
    threading.Thread(target=hook.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hook
    finally:
        hook.server.shutdown()
        hook.server.server_close()


@contextmanager
def answering(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """Yield the address of a server that lets ``answer(connection, stop)`` answer each request, in a thread of its own.

    ``stop`` is set at the end of the block.
    """
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_one(connection: socket.socket) -> None:
            with connection:
                try:
                    request = b""
                    while not request.endswith(b"}}") and (chunk := connection.recv(65536)):
                        request += chunk
                    answer(connection, stop)
                except OSError:  # the client has left
                    return

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the server was shut down
                    return
                threading.Thread(target=answer_one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/hook"
        finally:
            stop.set()
            server.shutdown(socket.SHUT_RDWR)


def silent(connection: socket.socket, stop: threading.Event) -> None:
    """Answer nothing, and keep the connection."""
    stop.wait(30)


def dribbling(connection: socket.socket, stop: threading.Event) -> None:
    """Answer with one byte after the other, so that no read times out."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not stop.wait(0.02):
        connection.sendall(b"x")
