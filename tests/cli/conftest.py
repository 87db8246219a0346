"""An agent's socket that answers from a table, and the command line as a process."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

CILIATE = Path(sys.executable).parent / "ciliate"


class FakeAgent:
    """``answers``: path below /v1 -> (status, document), or bytes that are sent as they are."""

    def __init__(self, path):
        self.path, self.answers, self.asked, self.posted = path, {}, [], []
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                agent.asked.append(self.path)
                status, document = agent.answers.get(
                    self.path.partition("?")[0].removeprefix("/v1/"), (404, {"error": "no such thing"})
                )
                self.send_response(status)
                self.end_headers()
                self.wfile.write(document if isinstance(document, bytes) else json.dumps(document).encode())

            def do_POST(self):
                agent.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.do_GET()

            def log_message(self, *_):
                pass

            def address_string(self):
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self._server = Server(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def agent(tmp_path):
    fake = FakeAgent(tmp_path / "agent.sock")
    yield fake
    fake.close()


@pytest.fixture
def ciliate(tmp_path):
    def run(*arguments, socket=None, stdin="", **env):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CILIATE_")}
        environment |= {"CILIATE_SOCKET": str(socket or tmp_path / "agent.sock"), "TZ": "UTC", **env}
        return subprocess.run(
            [CILIATE, *arguments], capture_output=True, text=True, input=stdin, env=environment, check=False, timeout=60
        )

    return run
