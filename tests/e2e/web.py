"""HTTP inside pods: ``python web.py server PORT``, ``... talk ADDRESS PORT``, ``... once ADDRESS PORT METHOD PATH``,
``... pipeline ADDRESS PORT "METHOD PATH"...``.

``talk`` keeps one connection: each line ``METHOD PATH`` on its standard input is a request on it, answered by one line
of JSON. It never connects a second time.
"""

import http.client
import json
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

PATIENCE: Final = 3.0
"""Seconds without an answer: it was dropped."""
SLOW: Final = 4.0
"""Seconds that the server thinks about a path with ``slow`` in it; a third of that with ``sedate``."""


class Handler(BaseHTTPRequestHandler):
    """Answers 200 with what it saw, and how many requests it has answered so far."""

    protocol_version = "HTTP/1.1"
    answered = 0
    seen: ClassVar[list[str]] = []

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Handler.seen.append(f"{self.command} {self.path}")
        time.sleep(SLOW if "slow" in self.path else SLOW / 3 if "sedate" in self.path else 0)
        Handler.answered += 1
        seen: dict[str, Any] = {
            "you": self.client_address[0].removeprefix("::ffff:"),
            "method": self.command,
            "path": self.path,
        }
        if self.path == "/seen":
            seen["seen"] = Handler.seen
        body = json.dumps(seen | {"answered": Handler.answered}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Listens on both families."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "web", self.server_address[1]


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> dict[str, Any]:
    """Return ``{"status", "body", "port", "error"}``; status 0: no answer. ``port``: the client's."""
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return {"status": 0, "body": "", "port": 0, "error": type(error).__name__}
    port = connection.sock.getsockname()[1] if connection.sock else 0
    return {"status": response.status, "body": body, "port": port, "error": ""}


def talk(address: str, port: int) -> None:
    """Ask over one connection what standard input says."""
    connection = http.client.HTTPConnection(address, port, PATIENCE)
    connection.connect()
    connection.auto_open = 0
    print(json.dumps({"port": connection.sock.getsockname()[1]}), flush=True)
    for line in sys.stdin:
        method, path = line.split()
        print(json.dumps(ask(connection, method, path)), flush=True)


def pipeline(address: str, port: int, *requests: str) -> None:
    """Send ``METHOD PATH`` requests in one go; print what comes back within twice the time of a slow one."""
    with socket.create_connection((address, port), PATIENCE) as connection:
        text = "".join(f"{one} HTTP/1.1\r\nHost: web\r\n\r\n" for one in requests)
        connection.sendall(text.encode())
        print("sent", flush=True)
        connection.settimeout(2 * SLOW)
        try:
            while data := connection.recv(65536):
                print(data.decode(), flush=True)
        except OSError as error:
            print(error, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server", port]:
            Server(("::", int(port)), Handler).serve_forever()
        case ["talk", address, port]:
            talk(address, int(port))
        case ["pipeline", address, port, *requests]:
            pipeline(address, int(port), *requests)
        case ["once", address, port, method, path]:
            print(json.dumps(ask(http.client.HTTPConnection(address, int(port), PATIENCE), method, path)))
        case _:
            sys.exit(__doc__)
