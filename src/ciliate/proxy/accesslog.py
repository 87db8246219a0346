"""Envoy's access log: protobuf in, NDJSON out to whoever listens.

Messages are decoded only while somebody listens (an entry costs about 10 us). A listener that does not keep up
loses entries, is told how many, and holds up nobody.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog

from ciliate.proxy import _pb as pb
from ciliate.proxy.api import AccessLogEntry, AccessLogStatus, Verdict
from ciliate.proxy.compile import RULESET_STATE, rule_of_policy

_RBAC: Final = "envoy.filters.http.rbac"
_POLICY: Final = "enforced_effective_policy_id"
_RESULT: Final = "enforced_engine_result"
_MAX_QUEUED: Final = 16 << 20  # octets per listener
_PROTOCOLS: Final = {1: "HTTP/1.0", 2: "HTTP/1.1", 3: "HTTP/2", 4: "HTTP/3"}
_METHODS: Final = ("", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_log = structlog.get_logger()


def decode_message(raw: bytes) -> list[AccessLogEntry]:
    """Entries of a StreamAccessLogsMessage. Raises google.protobuf.message.DecodeError."""
    message = pb.StreamAccessLogsMessage.FromString(raw)
    return [_entry(each) for each in message.http_logs.log_entry]


def _entry(entry: pb.Message) -> AccessLogEntry:
    common, request, response = entry.common_properties, entry.request, entry.response
    source, source_port = _address(common.downstream_direct_remote_address)
    destination, destination_port = _address(common.downstream_local_address)
    policy, result = _decision(common)
    code = response.response_code_details
    grpc_status = response.response_trailers.get("grpc-status") or response.response_headers.get("grpc-status")
    return AccessLogEntry(
        ruleset=_ruleset(common),
        time=common.start_time.seconds + common.start_time.nanos / 1e9,
        verdict=_verdict(result, code),
        rule=rule_of_policy(policy),
        method=_METHODS[request.request_method] if request.request_method < len(_METHODS) else "",
        path=request.original_path or request.path,
        host=request.authority,
        protocol=_PROTOCOLS.get(entry.protocol_version, ""),
        status=response.response_code.value,
        grpc_status=int(grpc_status) if grpc_status and grpc_status.isdecimal() else None,
        latency_ms=round(common.duration.seconds * 1e3 + common.duration.nanos / 1e6, 3),
        source=source,
        source_port=source_port,
        destination=destination,
        destination_port=destination_port,
        bytes_received=request.request_headers_bytes + request.request_body_bytes,
        bytes_sent=response.response_headers_bytes + response.response_body_bytes,
        detail=code,
    )


def _address(address: pb.Message) -> tuple[str, int]:
    return address.socket_address.address, address.socket_address.port_value


def _decision(common: pb.Message) -> tuple[str, str]:
    metadata = common.metadata.filter_metadata
    if _RBAC not in metadata:
        return "", ""
    fields = metadata[_RBAC].fields
    policy = fields[_POLICY].string_value if _POLICY in fields else ""
    return policy, fields[_RESULT].string_value if _RESULT in fields else ""


def _ruleset(common: pb.Message) -> int:
    packed = common.filter_state_objects.get(RULESET_STATE)
    if packed is None:
        return 0
    value = pb.StringValue()
    packed.Unpack(value)
    return int(value.value)


def _verdict(result: str, details: str) -> Verdict:
    if result == "denied" or details.startswith("rbac_access_denied"):
        return "denied"
    return "forwarded" if result == "allowed" else "error"


class _Listener:
    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.lost = 0
        self.wake = asyncio.Event()

    def offer(self, chunk: bytes, count: int) -> bool:
        if self.size + len(chunk) > _MAX_QUEUED:
            self.lost += count
            return False
        if self.lost:
            self.chunks.append(b'{"lost":%d}\n' % self.lost)
            self.lost = 0
        self.chunks.append(chunk)
        self.size += len(chunk)
        self.wake.set()
        return True


class AccessLogHub:
    """Hands entries to all listeners."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._closed = False
        self._messages = self._unread = self._lost = 0
        self._encoder = msgspec.json.Encoder()

    def publish(self, raw: bytes) -> None:
        """Takes one message from Envoy. Never blocks; what cannot be decoded is logged and left out."""
        self._messages += 1
        if not self._listeners:
            self._unread += 1
            return
        try:
            entries = decode_message(raw)
        except Exception as error:  # whatever it is: a message that we misread must not end the stream
            _log.warning("accesslog_undecodable", error=str(error), octets=len(raw))
            return
        chunk = self._encoder.encode_lines(entries)
        for listener in self._listeners:
            if not listener.offer(chunk, len(entries)):
                self._lost += len(entries)

    @contextmanager
    def subscribe(self) -> Iterator[AsyncIterator[bytes]]:
        """Pieces of NDJSON from now on; the iterator ends when the hub is closed."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            yield self._drain(listener)
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Ends all subscriptions."""
        self._closed = True
        for listener in self._listeners:
            listener.wake.set()

    def status(self) -> AccessLogStatus:
        """Counters."""
        return AccessLogStatus(
            messages=self._messages, subscribers=len(self._listeners), unread=self._unread, lost=self._lost
        )

    async def _drain(self, listener: _Listener) -> AsyncIterator[bytes]:
        while not self._closed:
            await listener.wake.wait()
            listener.wake.clear()
            while listener.chunks:
                chunk = listener.chunks.popleft()
                listener.size -= len(chunk) if not chunk.startswith(b'{"lost"') else 0
                yield chunk
