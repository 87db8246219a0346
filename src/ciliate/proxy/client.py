"""The agent's way to ``ciliate-proxyd``: HTTP/1.1 and JSON over its unix socket. Imports nothing heavy."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h11
import msgspec

from ciliate.proxy.api import AccessLogEntry, ProxyStatus, PutRulesets, PutRulesetsReply, RulesetResult, RulesetSpec

_CHUNK: Final = 1 << 16
_MAX_LINE: Final = 1 << 20


class ProxyUnavailableError(ConnectionError):
    """Nobody answers on the socket, or the connection broke: the request may be repeated."""


class ProxyRequestError(Exception):
    """The daemon refused the request; ``status`` is the HTTP status, the message is the daemon's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """``count`` access log entries are missing here, because this reader was too slow."""

    count: int


class ProxyClient:
    """One connection per call; safe to use from several tasks."""

    def __init__(self, socket: str | Path, *, timeout: float = 120.0) -> None:
        """``timeout``: seconds for one answer (not for the endless access log)."""
        self._socket = str(socket)
        self._timeout = timeout

    async def put_rulesets(self, rulesets: Iterable[RulesetSpec], *, prune: bool = True) -> list[RulesetResult]:
        """What became of each rule set, in order, once Envoy has acknowledged or refused all of them.

        With ``prune`` it is the full set: others are removed. Raises ProxyUnavailableError, ProxyRequestError.
        """
        body = msgspec.json.encode(PutRulesets(rulesets=tuple(rulesets), prune=prune))
        answer = await self._call("PUT", "/v1/rulesets", body)
        return list(msgspec.json.decode(answer, type=PutRulesetsReply).rulesets)

    async def status(self) -> ProxyStatus:
        """The daemon's state. Raises ProxyUnavailableError, ProxyRequestError."""
        return msgspec.json.decode(await self._call("GET", "/v1/status"), type=ProxyStatus)

    async def accesslog(self) -> AsyncIterator[AccessLogEntry | Lost]:
        """Requests as they end, from now on, until the daemon ends or the caller stops (``aclose()``).

        Raises ProxyUnavailableError when the daemon goes away.
        """
        buffer = b""
        decoder = msgspec.json.Decoder(AccessLogEntry)
        async with _request(self._socket, "GET", "/v1/accesslog", b"") as exchange:
            await exchange.head()
            async for chunk in exchange.body():
                *lines, buffer = (buffer + chunk).split(b"\n")
                if len(buffer) > _MAX_LINE:
                    raise ProxyUnavailableError(f"{self._socket}: a line of the access log is longer than {_MAX_LINE}")
                for line in lines:
                    if line.startswith(b'{"lost":'):
                        yield Lost(count=msgspec.json.decode(line)["lost"])
                    elif line:
                        yield decoder.decode(line)
        raise ProxyUnavailableError(f"{self._socket}: the access log ended")

    async def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        return await http_call(self._socket, method, path, body, seconds=self._timeout)


async def http_call(socket: str, method: str, path: str, body: bytes = b"", *, seconds: float) -> bytes:
    """Body of the answer of an HTTP server on a unix socket. Raises ProxyUnavailableError, ProxyRequestError."""
    try:
        async with asyncio.timeout(seconds), _request(socket, method, path, body) as exchange:
            await exchange.head()
            return b"".join([bytes(chunk) async for chunk in exchange.body()])
    except TimeoutError as error:
        raise ProxyUnavailableError(f"{socket}: no answer in {seconds:g} s") from error


class _Exchange:
    """One request's answer, read piece by piece."""

    def __init__(self, socket: str, reader: asyncio.StreamReader, connection: h11.Connection) -> None:
        self._socket = socket
        self._reader = reader
        self._connection = connection

    async def head(self) -> None:
        """Reads the answer's head; raises ProxyRequestError unless its status is 200."""
        event = await self._event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._event()
        if not isinstance(event, h11.Response):
            raise ProxyUnavailableError(f"{self._socket}: closed without an answer")
        if event.status_code != 200:
            text = b"".join([bytes(chunk) async for chunk in self.body()])
            try:
                message = str(msgspec.json.decode(text)["error"])
            except (msgspec.MsgspecError, KeyError, TypeError):
                message = text.decode(errors="replace").strip() or f"status {event.status_code}"
            raise ProxyRequestError(event.status_code, message)

    async def body(self) -> AsyncIterator[bytes]:
        """Pieces of the body."""
        while isinstance(event := await self._event(), h11.Data):
            yield bytes(event.data)

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._reader.read(_CHUNK))
        return event


@asynccontextmanager
async def _request(socket: str, method: str, path: str, body: bytes) -> AsyncIterator[_Exchange]:
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", "localhost"), ("Connection", "close"), ("Content-Length", str(len(body)))]
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError as error:
        raise ProxyUnavailableError(f"{socket}: {error.strerror or error}") from error
    try:
        writer.write(connection.send(h11.Request(method=method, target=path, headers=headers)) or b"")
        writer.write(connection.send(h11.Data(data=body)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        yield _Exchange(socket, reader, connection)
    except (ConnectionError, h11.RemoteProtocolError) as error:
        if isinstance(error, ProxyUnavailableError):
            raise
        raise ProxyUnavailableError(f"{socket}: {error}") from error
    finally:
        writer.close()
