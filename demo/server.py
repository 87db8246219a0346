"""A small HTTP server for the demo: it answers every request with the client's address that it saw, as JSON.

python3 demo/server.py PORT
"""

import json
import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            self.rfile.read(length)
        address = self.client_address[0].removeprefix("::ffff:")
        body = json.dumps(
            {"server": os.environ.get("POD_NAME", "outside"), "you": address, "path": self.path, "method": self.command}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) + 1))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body + b"\n")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def log_message(self, format: str, *args: object) -> None:
        print(self.client_address[0], format % args, flush=True)


class Server(ThreadingHTTPServer):
    """Listens on IPv6 and IPv4."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "demo", self.server_address[1]


if __name__ == "__main__":
    Server(("::", int(sys.argv[1])), Handler).serve_forever()
