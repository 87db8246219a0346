"""Answers on ``healthCheckNodePort``: whether this node has a local endpoint of a Service, for who balances in front.

Status, JSON and header are those of kube-proxy (pkg/proxy/healthcheck/service_health.go). The ports are open to the
network: a connection is one short request, and has to come up with it soon.
"""

import asyncio
import socket
from collections.abc import Mapping
from typing import Final

import h11
import msgspec
import structlog

from ciliate.loadbalancer.model import HealthCheck, Owner

log = structlog.get_logger()
RETRY: Final = 2.0
"""Seconds after which a port that was in use is tried again."""
PATIENCE: Final = 5.0
"""Seconds that a connection may last."""
_LARGEST: Final = 8192
"""Octets of a request's head."""
_AT_ONCE: Final = 256
"""Connections at a time, over all ports; more are closed at once."""


class HealthChecks:
    """One listener a port. ``want`` says which; a port that cannot be had is a problem, and is tried again."""

    def __init__(self, *, retry: float = RETRY, patience: float = PATIENCE) -> None:
        self._wanted: Mapping[int, HealthCheck] = {}
        self._servers: dict[int, asyncio.Server] = {}
        self._refused: dict[int, str] = {}
        self._wake = asyncio.Event()
        self._retry, self._patience = retry, patience
        self._open = 0

    @property
    def ports(self) -> frozenset[int]:
        """The ports that are served now."""
        return frozenset(self._servers)

    def want(self, checks: Mapping[int, HealthCheck]) -> None:
        """Serve these ports from now on."""
        changed = checks.keys() != self._wanted.keys()
        self._wanted = dict(checks)
        if changed:
            self._wake.set()

    def problems(self) -> dict[Owner, str]:
        """Return what is not served, by Service."""
        return {
            self._wanted[port].owner: f"spec.healthCheckNodePort: {port}: {text}; it is tried again"
            for port, text in self._refused.items()
            if port in self._wanted
        }

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self._wake.clear()
                await self._settle()
                try:
                    async with asyncio.timeout(self._retry if self._refused else None):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            for server in self._servers.values():
                server.close()

    async def _settle(self) -> None:
        """Close ports that nobody wants, then open those that are missing."""
        for port in self._servers.keys() - self._wanted.keys():
            self._servers.pop(port).close()
        refused: dict[int, str] = {}
        for port in sorted(self._wanted.keys() - self._servers.keys()):
            try:
                self._servers[port] = await asyncio.start_server(self._connected, sock=_listener(port), limit=_LARGEST)
            except OSError as error:
                refused[port] = error.strerror or str(error)
                if port not in self._refused:
                    log.warning("health-check-port-refused", port=port, problem=refused[port])
        self._refused = refused

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= _AT_ONCE:
            writer.transport.abort()
            return
        self._open += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._answer(reader, writer)
        except (OSError, TimeoutError):
            writer.transport.abort()
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        check = self._wanted.get(writer.get_extra_info("sockname")[1])
        if check is None:
            return
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_LARGEST)
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await reader.read(_LARGEST))
        except h11.RemoteProtocolError as error:
            parts = _response(error.error_status_hint, {"error": "not an HTTP request"})
        else:
            if not isinstance(event, h11.Request):
                return
            head, *body = _response(
                200 if check.local_endpoints else 503, health_document(check), check.local_endpoints
            )
            parts = [head, *(body if event.method != b"HEAD" else ())]
        for part in (*parts, h11.EndOfMessage()):
            writer.write(http.send(part) or b"")
        await writer.drain()


def health_document(check: HealthCheck) -> dict[str, object]:
    """Return what a load balancer is told."""
    return {
        "service": {"namespace": check.owner.namespace, "name": check.owner.name},
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": True,
    }


def _response(status: int, document: object, weight: int = 0) -> list[h11.Event]:
    body = msgspec.json.encode(document)
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Load-Balancing-Endpoint-Weight", str(weight)),
        ("Connection", "close"),
    ]
    return [h11.Response(status_code=status, headers=headers), h11.Data(data=body)]


def _listener(port: int) -> socket.socket:
    """Return a socket for a port of all the node's addresses, of both families if it has both. Error: OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
