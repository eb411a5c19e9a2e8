"""Object store for tests: a server of the S3 protocol on loopback, behind a proxy that can fail on request."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "the-secret-key-of-the-tests"
BUCKET = "bucket"
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test session ends, however it does
"""

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables of a client; files of AWS on this machine play no part."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose method and path match ``request``.

    ``kind``: "reset", "silence", "status" (without asking the server), "late" (the server gets the request when the
    test calls :meth:`ObjectServer.deliver`), "lost" (the server's answer never arrives), "truncated" (half of the
    answer's body arrives), or "then", which calls ``action`` before the answer is sent.
    """

    request: str
    kind: str
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    action: Callable[[], Any] = lambda: None


@dataclass
class ObjectServer:
    """Server of the S3 protocol with the bucket ``BUCKET``, and the proxy in front of it."""

    port: int
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    silence: float = 2.0
    late: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    # The server compares an ETag and replaces the object in two steps, which no real store does.
    one_put_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @property
    def direct(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None

    def deliver(self) -> list[int]:
        """Send the server what is late; return the status of each answer, which the client never gets."""
        late, self.late = self.late, []
        return [self.forward(*request)[0] for request in late]

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            with self.one_put_at_a_time if method == "PUT" else threading.Lock():
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()


def _handler(server: ObjectServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            server.requests.append(request)
            fault = server.next_fault(request)
            if fault and fault.kind == "late":
                server.late.append((self.command, self.path, dict(self.headers), body))
            if fault and fault.kind in ("reset", "silence", "late"):
                time.sleep(server.silence if fault.kind == "silence" else 0)
                return self.reset()
            if fault and fault.kind == "status":
                text = f"<Error><Code>{fault.code}</Code><Message>As the test asked.</Message></Error>"
                return self.answer(fault.status, {"Content-Type": "application/xml"}, text.encode())
            status, headers, content = server.forward(self.command, self.path, dict(self.headers), body)
            if fault and fault.kind == "then":
                fault.action()
            if fault and fault.kind == "lost":
                return self.reset()
            self.answer(status, headers, content, truncated=bool(fault and fault.kind == "truncated"))
            return None

        def answer(self, status: int, headers: dict[str, str], content: bytes, truncated: bool = False) -> None:
            self.send_response_only(status)
            length = headers.pop("Content-Length", str(len(content)))
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            if "Date" not in headers:
                self.send_header("Date", self.date_time_string())
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if truncated else content)
            if truncated:
                self.wfile.flush()
                self.reset()

        def reset(self) -> None:
            self.close_connection = True
            # With this option, closing sends a reset instead of the rest.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                self.connection.close()

        def handle(self) -> None:
            with suppress(OSError, ValueError):
                super().handle()

        def log_message(self, *message: object) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.serve)
    return Handler


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Start the server, create its bucket, and start the proxy."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"S3_UPLOAD_PART_MIN_SIZE": "1", **environment("")},
    )
    assert process.stdin
    assert process.stdout
    try:
        server = ObjectServer(int(process.stdout.readline()))
        status, _, content = server.forward("PUT", f"/{BUCKET}", {"Host": "s3.amazonaws.com"}, b"")
        assert status == 200, content
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
        server.endpoint = f"http://127.0.0.1:{proxy.server_port}"
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()
