"""The gRPC server that Envoy talks to, on a unix socket: incremental ADS, and the access log service."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import structlog

from ciliate.proxy import _pb as pb
from ciliate.proxy.accesslog import AccessLogHub
from ciliate.proxy.xds import XdsSession, XdsStore

_MAX_MESSAGE: Final = 64 << 20
_log = structlog.get_logger()


class XdsServer:
    """Serves one store to one Envoy. A newer stream takes over from an older one."""

    def __init__(self, store: XdsStore, accesslog: AccessLogHub) -> None:
        self._store = store
        self._accesslog = accesslog
        self._session: XdsSession | None = None
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._server: Any = None

    @property
    def connected(self) -> bool:
        """Whether an Envoy has a stream open."""
        return self._session is not None

    async def start(self, socket: Path) -> None:
        """Listens. Raises RuntimeError if it cannot."""
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.max_send_message_length", _MAX_MESSAGE)]
        )
        ads = grpc.stream_stream_rpc_method_handler(
            self._delta,
            request_deserializer=pb.DeltaDiscoveryRequest.FromString,
            response_serializer=pb.DeltaDiscoveryResponse.SerializeToString,
        )
        als: Any = grpc.stream_unary_rpc_method_handler(self._stream_access_logs)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "envoy.service.discovery.v3.AggregatedDiscoveryService", {"DeltaAggregatedResources": ads}
                ),
                grpc.method_handlers_generic_handler(
                    "envoy.service.accesslog.v3.AccessLogService", {"StreamAccessLogs": als}
                ),
            )
        )
        self._server.add_insecure_port(f"unix:{socket}")
        await self._server.start()
        socket.chmod(0o600)

    async def stop(self) -> None:
        """Closes all streams and the socket."""
        if self._server is not None:
            await self._server.stop(grace=None)

    def push(self) -> None:
        """Sends what changed in the store."""
        touched = self._store.take_touched()
        if self._session is not None:
            self._session.touch(touched)
        self._wake.set()

    async def progress(self) -> None:
        """Returns when Envoy has said something."""
        await self._progress.wait()

    def _advance(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _delta(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        session = XdsSession(self._store)
        self._session = session
        wake = self._wake = asyncio.Event()
        _log.info("envoy_connected")
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(session, wake, requests))
                while not reader.done() and self._session is session:
                    await wake.wait()
                    wake.clear()
                    for response in session.pending():
                        yield response
                reader.cancel()
        finally:
            if self._session is session:
                self._session = None
                self._store.acknowledged.clear()
            _log.info("envoy_disconnected")

    async def _read(self, session: XdsSession, wake: asyncio.Event, requests: AsyncIterator[Any]) -> None:
        try:
            async for request in requests:
                if self._session is not session:
                    break
                if request.HasField("error_detail"):
                    _log.warning("envoy_refused", type_url=request.type_url, error=request.error_detail.message)
                session.receive(request)
                session.touch(self._store.take_touched())
                self._advance()
                wake.set()
        finally:
            wake.set()

    async def _stream_access_logs(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async for raw in messages:
            self._accesslog.publish(raw)
        return b""
