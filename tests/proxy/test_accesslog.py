"""Envoy's access log: what an entry says, and who loses what."""

import asyncio
from typing import Any

import msgspec
import pytest

from ciliate.proxy import _pb as pb
from ciliate.proxy import accesslog
from ciliate.proxy.accesslog import AccessLogHub, decode_message
from ciliate.proxy.api import AccessLogEntry
from ciliate.proxy.compile import RULESET_STATE


def message(*paths: str, result: str = "allowed", details: str = "via_upstream", code: int = 200) -> bytes:
    made = pb.StreamAccessLogsMessage()
    for path in paths:
        entry = made.http_logs.log_entry.add(protocol_version="HTTP11")
        common = entry.common_properties
        common.downstream_direct_remote_address.socket_address.address = "10.1.0.2"
        common.downstream_direct_remote_address.socket_address.port_value = 40000
        common.downstream_local_address.socket_address.address = "10.2.0.2"
        common.downstream_local_address.socket_address.port_value = 8080
        common.start_time.seconds, common.start_time.nanos = 1700000000, 500_000_000
        common.duration.nanos = 1_500_000
        common.filter_state_objects[RULESET_STATE].Pack(pb.StringValue(value="7"))
        if result:
            fields = common.metadata.filter_metadata["envoy.filters.http.rbac"]
            fields["enforced_engine_result"] = result
            if result == "allowed":
                fields["enforced_effective_policy_id"] = "00000|Kind a/b ingress[0]"
        entry.request.request_method = "GET"
        entry.request.path = path
        entry.request.authority = "web.test"
        entry.response.response_code.value = code
        entry.response.response_code_details = details
    return bytes(made.SerializeToString())


def test_an_entry_has_both_ends_the_request_the_answer_and_the_rule() -> None:
    (entry,) = decode_message(message("/a?b"))
    assert entry == AccessLogEntry(
        ruleset=7, time=1700000000.5, verdict="forwarded", rule="Kind a/b ingress[0]", method="GET", path="/a?b",
        host="web.test", protocol="HTTP/1.1", status=200, latency_ms=1.5, source="10.1.0.2", source_port=40000,
        destination="10.2.0.2", destination_port=8080, bytes_received=0, bytes_sent=0, detail="via_upstream",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "details", "verdict"),
    [
        ("denied", "rbac_access_denied_matched_policy[none]", "denied"),
        ("", "rbac_access_denied_matched_policy[none]", "denied"),
        ("allowed", "upstream_reset_before_response_started", "forwarded"),
        ("", "http1.codec_error", "error"),
    ],
)
def test_the_verdict(result: str, details: str, verdict: str) -> None:
    (entry,) = decode_message(message("/", result=result, details=details))
    assert entry.verdict == verdict
    assert bool(entry.rule) == (result == "allowed")


def test_an_entry_with_nothing_in_it_is_no_error() -> None:
    made = pb.StreamAccessLogsMessage()
    made.http_logs.log_entry.add()
    (entry,) = decode_message(made.SerializeToString())
    assert (entry.ruleset, entry.verdict, entry.method, entry.status) == (0, "error", "", 0)


async def lines(stream: Any, count: int) -> list[Any]:
    found: list[Any] = []
    async with asyncio.timeout(10):
        async for chunk in stream:
            found += [msgspec.json.decode(line) for line in chunk.splitlines()]
            if len(found) >= count:
                return found
    return found


async def test_every_listener_hears_everything() -> None:
    hub = AccessLogHub()
    with hub.subscribe() as one, hub.subscribe() as two:
        hub.publish(message("/a", "/b"))
        for stream in (one, two):
            assert [entry["path"] for entry in await lines(stream, 2)] == ["/a", "/b"]
    assert hub.status().messages == 1


def test_nothing_is_decoded_while_nobody_listens() -> None:
    hub = AccessLogHub()
    hub.publish(b"\xff not protobuf")
    assert (hub.status().messages, hub.status().unread) == (1, 1)


async def test_a_message_that_cannot_be_read_is_left_out() -> None:
    hub = AccessLogHub()
    with hub.subscribe() as stream:
        hub.publish(b"\xff not protobuf")
        hub.publish(message("/a"))
        assert [entry["path"] for entry in await lines(stream, 1)] == ["/a"]


async def test_a_slow_listener_loses_entries_is_told_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = message("/a", "/b")
    size = len(msgspec.json.encode(decode_message(raw)[0])) * 2 + 2
    monkeypatch.setattr(accesslog, "_MAX_QUEUED", 2 * size + 10)
    hub = AccessLogHub()
    with hub.subscribe() as slow:
        for _ in range(5):
            hub.publish(raw)
        assert hub.status().lost == 6
        assert len(await lines(slow, 4)) == 4
        hub.publish(message("/c"))
        told = await lines(slow, 2)
        assert told[0] == {"lost": 6}
        assert told[1]["path"] == "/c"
        with hub.subscribe() as quick:
            hub.publish(raw)
            assert len(await lines(quick, 2)) == 2
    assert hub.status().subscribers == 0


async def test_closing_ends_the_streams() -> None:
    hub = AccessLogHub()
    with hub.subscribe() as stream:
        hub.close()
        assert await lines(stream, 1) == []
