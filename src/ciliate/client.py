"""The agent's API for programs on the same machine: HTTP/1.1 with JSON over its unix socket."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote


class UserError(Exception):
    """What is shown to a user in one line: what is wrong, with which object, and what to do about it."""


class AgentError(UserError):
    """The agent does not answer, or answers with an error; the message names the socket and what to do."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AgentClient:
    """One agent. Every call opens a connection of its own, so that a restarted agent is no trouble."""

    def __init__(self, path: Path, *, timeout: float = 60.0) -> None:
        """``timeout``: seconds without an answer after which a call fails."""
        self.path = path
        self._timeout = timeout

    def get(self, path: str) -> Any:
        """Return the document at ``/v1/PATH``. Error: AgentError."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """Return the answer to a document. Error: AgentError."""
        return self._call("POST", path, body)

    def health(self) -> dict[str, Any]:
        """Return ``{"ready", "reasons"}``, also while the agent is not ready. Error: AgentError (no answer)."""
        document: dict[str, Any] = self._call("GET", "healthz", None, accept=(200, 503))
        return document

    def lines(self, path: str) -> Iterator[bytes]:
        """Yield the lines of an endless answer, until the agent ends. Error: AgentError."""
        connection = _Connection(self.path, None)
        try:
            try:
                connection.request("GET", f"/v1/{path}")
                response = connection.getresponse()
            except OSError as error:
                raise self._unreachable(error) from error
            if response.status != 200:
                raise AgentError(f"agent at {self.path}: {_problem(response.status, response.read())}")
            try:
                while line := response.readline():
                    yield line
            except (http.client.HTTPException, OSError):
                return
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: Any, accept: tuple[int, ...] = (200,)) -> Any:
        connection = _Connection(self.path, self._timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, f"/v1/{quote(path, safe='/?=&')}", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        if status not in accept:
            raise AgentError(f"agent at {self.path}: {_problem(status, answer)}")
        try:
            return json.loads(answer)
        except ValueError as error:
            raise AgentError(f"agent at {self.path}: the answer is not JSON ({error})") from error

    def _unreachable(self, error: Exception) -> AgentError:
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return AgentError(f"agent at {self.path}: it is not running; start ciliated, or name another --socket")
        if isinstance(error, PermissionError):
            return AgentError(f"agent at {self.path}: permission denied; run this as root")
        if isinstance(error, TimeoutError):
            return AgentError(f"agent at {self.path}: no answer within {self._timeout:g} s; look at its log")
        return AgentError(f"agent at {self.path}: {error or type(error).__name__}")


def _problem(status: int, answer: bytes) -> str:
    try:
        document = json.loads(answer)
    except ValueError:
        return f"HTTP {status}"
    if isinstance(document, dict) and "error" in document:
        return str(document["error"])
    return f"HTTP {status}"
