"""A real Envoy on the loopback address, told by a real ``ProxyService``, in front of a server that remembers."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import h11
import pytest

from ciliate.proxy import _pb as pb
from ciliate.proxy import compile as compiler
from ciliate.proxy import service as service_module
from ciliate.proxy.api import HttpRuleSpec, RulesetResult, RulesetSpec
from ciliate.proxy.compile import ProxyOptions, XdsResource
from ciliate.proxy.listening import listening
from ciliate.proxy.service import ProxyService

_bases = itertools.count(41000, 20)


def free_ports(count: int = 16) -> tuple[int, int]:
    """Return a range of ports without listeners."""
    taken = listening("tcp") | listening("tcp6")
    for base in _bases:
        if not taken & set(range(base, base + count)):
            return base, base + count - 1
    raise AssertionError


class Backend:
    """Answers every request with 200 and remembers it: ``(method, target, headers)``."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, list[tuple[str, str]]]] = []
        self.connections = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        """End all connections."""
        self.gate.set()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    @property
    def seen(self) -> list[str]:
        """``METHOD target`` of each request."""
        return [f"{method} {target}" for method, target, _ in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        connection = h11.Connection(h11.SERVER)
        with contextlib.suppress(ConnectionError, h11.RemoteProtocolError):
            while data := await reader.read(65536):
                connection.receive_data(data)
                await self._events(connection, writer)
        writer.close()

    async def _events(self, connection: h11.Connection, writer: asyncio.StreamWriter) -> None:
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                headers = [(name.decode(), value.decode()) for name, value in event.headers]
                self.requests.append((event.method.decode(), event.target.decode(), headers))
            elif isinstance(event, h11.EndOfMessage):
                await self.gate.wait()
                response = h11.Response(status_code=200, headers=[("Content-Length", "2")])
                data = (connection.send(response) or b"") + (connection.send(h11.Data(data=b"ok")) or b"")
                writer.write(data + (connection.send(h11.EndOfMessage()) or b""))
                await writer.drain()
                if connection.our_state is h11.DONE and connection.their_state is h11.DONE:
                    connection.start_next_cycle()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    one = Backend()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    yield one
    server.close()
    await one.close()


@pytest.fixture
def redirected(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Listeners and cluster as they are, but for what needs the datapath: the way in and the way out."""

    def listener(ruleset: int, port: int, options: ProxyOptions) -> XdsResource:
        made = pb.Listener.FromString(compiler.compile_listener(ruleset, port, options).body.value)
        made.ClearField("transparent")
        made.ClearField("listener_filters")
        kept = [one for one in made.filter_chains[0].filters if one.name != "envoy.filters.network.rbac"]
        del made.filter_chains[0].filters[:]
        made.filter_chains[0].filters.extend(kept)
        return compiler._resource(compiler.LISTENER_TYPE, made.name, made)

    def cluster() -> XdsResource:
        made = pb.Cluster.FromString(compiler.compile_cluster().body.value)
        made.type, made.lb_policy = pb.Cluster.STATIC, pb.Cluster.ROUND_ROBIN
        made.load_assignment.cluster_name = made.name
        end = made.load_assignment.endpoints.add().lb_endpoints.add().endpoint.address.socket_address
        end.address, end.port_value = "127.0.0.1", backend.port
        return compiler._resource(compiler.CLUSTER_TYPE, made.name, made)

    monkeypatch.setattr(service_module, "compile_listener", listener)
    monkeypatch.setattr(service_module, "compile_cluster", cluster)


class Proxy:
    """A running service; ``start`` and ``stop`` as often as one likes."""

    def __init__(self, folder: Path, ports: tuple[int, int], envoy: str | None = None) -> None:
        self.folder, self.ports, self.envoy = folder, ports, envoy
        self.service: ProxyService
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.service = ProxyService(
            run_dir=self.folder / "run",
            state_dir=self.folder / "state",
            node="test",
            envoy=self.envoy,
            ports=self.ports,
            options=ProxyOptions(ipv6=False),
        )
        await self.service.start()
        self._task = asyncio.get_running_loop().create_task(self.service.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def serve(self, *specs: RulesetSpec, prune: bool = True) -> list[RulesetResult]:
        return await self.service.apply(specs, prune=prune)

    async def allow(self, *rules: HttpRuleSpec, number: int = 1, allow_all: bool = False) -> int:
        """Serve one rule set; return its port."""
        (result,) = await self.serve(RulesetSpec(id=number, http=rules, allow_all=allow_all))
        assert result.error is None and result.port
        return result.port


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose name is short enough for unix sockets."""
    yield tmp_path_factory.mktemp("p")


@pytest.fixture
async def proxy(folder: Path, redirected: None) -> AsyncIterator[Proxy]:
    one = Proxy(folder, free_ports())
    await one.start()
    yield one
    await one.stop()


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Closes connections that a test leaves."""
    yield
    while _open:
        _open[-1].writer.close()
        with contextlib.suppress(ConnectionError):
            await _open.pop().writer.wait_closed()


class Connection:
    """One raw connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    def send(self, raw: bytes) -> None:
        self.writer.write(raw)

    async def response(self) -> tuple[int, bytes]:
        """Return status and body of the next response; (0, b"") when the connection ends instead."""
        try:
            async with asyncio.timeout(20):
                head = await self._reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                lengths = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ]
                return status, await self._reader.readexactly(lengths[0] if lengths else 0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, b""

    async def ask(self, raw: bytes) -> int:
        """Send octets; return the status of the next response."""
        self.send(raw)
        return (await self.response())[0]


_open: list[Connection] = []


async def connect(port: int) -> Connection:
    """A connection to a listener, open until the proxy goes."""
    one = Connection(*await asyncio.open_connection("127.0.0.1", port))
    _open.append(one)
    return one


def request(method: str, target: str, *headers: str, host: str | None = "web.test", body: bytes = b"") -> bytes:
    """A request as octets; ``host`` None: without one."""
    lines = [f"{method} {target} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def once(port: int, raw: bytes) -> int:
    """Return the status of one request on a connection of its own, 0: it was closed without an answer."""
    return await (await connect(port)).ask(raw)


async def eventually(condition: Any, what: str) -> None:
    """Wait until a condition holds."""
    try:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110 the condition is anything
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within 30 s: {what}") from None
