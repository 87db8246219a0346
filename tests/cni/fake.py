"""A stand-in for the agent's side of the plugin, and one for the agent's socket."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from ciliate.cni.protocol import Attachment, AttachRequest, Route, WiringError

PODS = {4: "10.0.0.5", 6: "fd00::5"}
ATTACHMENT = Attachment(
    addresses=(ip_address(PODS[4]), ip_address(PODS[6])),
    mac="0a:00:00:00:00:01",
    host_device="cil0123456789a",
    host_mac="0a:00:00:00:00:02",
    mtu=1450,
    gateways=(ip_address("169.254.0.1"), ip_address("fe80::c111")),
)


class FakeWiring:
    """Remembers what is wired; fails and refuses as told."""

    def __init__(self) -> None:
        self.wired: dict[tuple[str, str], AttachRequest] = {}
        self.deleted: list[tuple[str, str]] = []
        self.checked: list[tuple[Route, ...]] = []
        self.reasons: list[str] = []
        self.short: list[str] = []
        self.problems: list[str] = []
        self.broken: set[tuple[str, str]] = set()

    async def add(self, request: AttachRequest) -> Attachment:
        if request.key in self.broken:
            raise WiringError(f"pod {request.pod_namespace}/{request.pod_name}: no room")
        self.wired[request.key] = request
        return ATTACHMENT

    async def delete(self, container_id: str, ifname: str) -> None:
        if (container_id, ifname) in self.broken:
            raise WiringError(f"{container_id}: the disk is full")
        self.deleted.append((container_id, ifname))
        self.wired.pop((container_id, ifname), None)

    async def check(self, request: AttachRequest, routes: tuple[Route, ...]) -> list[str]:
        self.checked.append(routes)
        return list(self.problems)

    async def attachment(self, container_id: str, ifname: str) -> Attachment | None:
        return ATTACHMENT if (container_id, ifname) in self.wired else None

    def attachments(self, network: str) -> list[tuple[str, str]]:
        return [key for key, request in self.wired.items() if request.network == network]

    def readiness(self) -> list[str]:
        return self.reasons

    def shortages(self) -> list[str]:
        return self.short


def response(status: int, document: object) -> bytes:
    """Return an HTTP response as the agent gives it."""
    body = json.dumps(document).encode()
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def answered(stdout: str = "{}\n", exit_code: int = 0) -> bytes:
    """Return the response to a call that was carried out."""
    return response(200, {"exit_code": exit_code, "stdout": stdout})


def read_request(connection: socket.socket) -> bytes:
    """Return the body of a request; b"" when the caller went away."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        body += chunk
    return body


class FakeAgent:
    """Answers the n-th request with what ``answer`` returns for it; keeps the bodies."""

    def __init__(self, path: Path, answer: Callable[[int], bytes]) -> None:
        self._answer = answer
        self.bodies: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self.bodies.append(read_request(connection))
                    connection.sendall(self._answer(len(self.bodies)))
                except (BrokenPipeError, ConnectionResetError):
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@contextmanager
def agent(path: Path, answer: Callable[[int], bytes]) -> Iterator[FakeAgent]:
    """A fake agent for a while."""
    one = FakeAgent(path, answer)
    try:
        yield one
    finally:
        one.close()
