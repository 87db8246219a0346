"""Events of the datapath and of the proxy as JSON documents, for whoever listens."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.ipcache import IpTable
from ciliate.datapath.conntrack import boot_clock
from ciliate.datapath.maps import addr_text
from ciliate.identity.numbers import IdentityId, Reserved
from ciliate.identity.selectors import IdentityIndex
from ciliate.policy.image import RuleRef
from ciliate.policy.rules import PolicyObject
from ciliate.proxy.api import AccessLogEntry

PROTOCOLS: Final[Mapping[int, str]] = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_BEHIND: Final = 4096
"""Documents that one listener may be behind before it loses some."""
_VERDICTS: Final = ("DROPPED", "ALLOWED", "REDIRECTED", "AUDIT")
_END, _SOCKET = 3, 4
_TYPES: Final = {1: "verdict", 2: "drop", _END: "end", _SOCKET: "socket"}
_DENIED: Final = frozenset({"POLICY_DENIED", "POLICY_DENY", "NO_POLICY"})
_FLAGS: Final = ((1, "FIN"), (2, "SYN"), (4, "RST"), (8, "PSH"), (16, "ACK"))
_STATES: Final = ("new", "established", "reply", "related")


class Hub:
    """Fans documents out. A slow listener loses documents, and is told how many; it never slows the agent."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[bytes]] = set()
        self._lost: dict[asyncio.Queue[bytes], int] = {}

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    @contextmanager
    def subscription(self) -> Iterator[asyncio.Queue[bytes]]:
        """A queue of JSON lines, as long as the context lasts."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(_BEHIND)
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)
            self._lost.pop(queue, None)

    def publish(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Hand documents to every listener."""
        for document in documents:
            line = msgspec.json.encode(document) + b"\n"
            for queue in self._listeners:
                self._offer(queue, line)

    def _offer(self, queue: asyncio.Queue[bytes], line: bytes) -> None:
        lost = self._lost.get(queue, 0)
        if lost and queue.qsize() < _BEHIND // 2:
            queue.put_nowait(msgspec.json.encode({"type": "lost", "count": lost}) + b"\n")
            self._lost[queue] = lost = 0
        if lost or queue.full():
            self._lost[queue] = lost + 1
        else:
            queue.put_nowait(line)


class Decoder:
    """Turns event records into documents: numbers become names."""

    def __init__(
        self,
        *,
        node: str,
        reasons: Mapping[int, str],
        explain: Callable[[int], tuple[RuleRef, ...]],
        ruleset: Callable[[int], tuple[RuleRef, ...]],
        policies: Mapping[tuple[str, str, str], PolicyObject],
        endpoints: EndpointTable,
        table: IpTable,
        identities: IdentityIndex,
        service: Callable[[int], str] = lambda _: "",
        own_netns: int = 0,
    ) -> None:
        """``service``: name of what a frontend of this number belongs to; ``own_netns``: cookie of the node's."""
        self._node = node
        self._reasons = reasons
        self._explain = explain
        self._ruleset = ruleset
        self._policies = policies
        self._endpoints = endpoints
        self._table = table
        self._identities = identities
        self._service = service
        self._own_netns = own_netns

    def documents(self, records: Any) -> list[dict[str, Any]]:
        """Return one document for each record of an event array."""
        boot = time.time_ns() - boot_clock()
        return [self._document(record, boot) for record in records]

    def _document(self, record: Any, boot: int) -> dict[str, Any]:
        kind = int(record["type"])
        reason = self._reasons.get(int(record["reason"]), str(int(record["reason"]))) if record["reason"] else ""
        verdict = "DENIED" if reason in _DENIED else _VERDICTS[int(record["verdict"]) & 3]
        protocol = int(record["protocol"])
        icmp, sport, dport = protocol in (1, 58), int(record["sport"]), int(record["dport"])
        egress, ingress = (self._explain(int(number)) for number in record["rule"])
        direction = "ingress" if int(record["direction"]) else "egress"
        denying = ingress if direction == "ingress" else egress
        translated = kind == _SOCKET and not reason
        return {
            "time": _time(boot + int(record["time"])),
            "node": self._node,
            "type": _TYPES.get(kind, str(kind)),
            "verdict": "ENDED" if kind == _END else "TRANSLATED" if translated else verdict,
            "reason": reason,
            "direction": direction,
            "protocol": PROTOCOLS.get(protocol, str(protocol)),
            "icmp_type": sport if icmp else None,
            "tcp_flags": [name for bit, name in _FLAGS if int(record["tcp_flags"]) & bit],
            "state": _STATES[int(record["ct_state"]) & 3],
            "source": self._caller(record) if kind == _SOCKET else self._end(record, 0, 0 if icmp else sport),
            "service": self._asked(record),
            "destination": self._given(record) if kind == _SOCKET else self._end(record, 1, 0 if icmp else dport),
            "rules": [self._rule(one) for one in (denying if verdict == "DENIED" else (*egress, *ingress))],
            "length": int(record["length"]),
            "packets": 0 if kind == _SOCKET else int(record["packets"]),
            "bytes": 0 if kind == _SOCKET else int(record["bytes"]),
        }

    def _asked(self, record: Any) -> dict[str, Any] | None:
        """Return the frontend that the client asked for; None: it named its peer itself."""
        frontend = record["frontend"].tobytes()
        if not any(frontend):
            return None
        return {
            "name": self._service(int(record["service"])),
            "address": addr_text(frontend),
            "port": int(record["frontend_port"]),
        }

    def _given(self, record: Any) -> dict[str, Any]:
        """Return whom a socket was given: no packet has been looked at, so no identity either."""
        address = addr_text(record["daddr"].tobytes())
        return self.end(address, int(record["dport"]), self._identity_of(address))

    def _caller(self, record: Any) -> dict[str, Any]:
        """Return whose socket it was. It need not have an address yet: then it is the one that it will have."""
        cookie, to = int(record["bytes"]), addr_text(record["daddr"].tobytes())
        given = record["saddr"].tobytes()
        if (local := self._endpoints.by_cookie(cookie)) is not None:
            own = next((one for one in local.addresses if (":" in one) == (":" in to)), "")
            address = addr_text(given) if any(given) else own
            return self.end(address, int(record["sport"]), local.identity, local.id)
        address = addr_text(given) if any(given) else ""
        if cookie and cookie == self._own_netns:
            return self.end(address, int(record["sport"]), int(Reserved.HOST))
        return self.end(address, int(record["sport"]), int(record["identity"][0]))

    def _end(self, record: Any, index: int, port: int) -> dict[str, Any]:
        address = addr_text(record["daddr" if index else "saddr"].tobytes())
        return self.end(address, port, int(record["identity"][index]), int(record["endpoint"][index]))

    def end(self, address: str, port: int, identity: int, endpoint: int = 0) -> dict[str, Any]:
        """Return what is known of one end of a flow."""
        local = self._endpoints.by_id(endpoint) if endpoint else None
        row = self._identities.rows.get(IdentityId(identity))
        return {
            "address": address,
            "port": port,
            "identity": identity,
            "endpoint": endpoint,
            "pod": local.pod if local else self._table.name_of(address),
            "labels": sorted(row.labels) if row else [],
        }

    def http(self, entry: AccessLogEntry) -> dict[str, Any]:
        """Return the document of a request that the proxy has judged.

        Its rules are the one that allowed it, or all those that were asked and did not.
        """
        asked = self._ruleset(entry.ruleset)
        rules = [ref for ref in asked if not entry.rule or rule_text(ref) == entry.rule]
        ends = {
            which: self.end(address, port, self._identity_of(address))
            for which, address, port in (
                ("source", entry.source, entry.source_port),
                ("destination", entry.destination, entry.destination_port),
            )
        }
        return {
            "time": _time(int(entry.time * 1e9)),
            "node": self._node,
            "type": "http",
            "verdict": {"forwarded": "HTTP_ALLOWED", "denied": "HTTP_DENIED"}.get(entry.verdict, "HTTP_ERROR"),
            "reason": "NO_HTTP_RULE" if entry.verdict == "denied" else entry.detail,
            "direction": "egress" if asked and asked[0].section.startswith("egress") else "ingress",
            "protocol": "TCP",
            "rules": [self._rule(one) for one in rules],
            "rule_text": "" if rules else entry.rule,
            "http": {
                "method": entry.method,
                "path": entry.path,
                "host": entry.host,
                "protocol": entry.protocol,
                "code": entry.status,
            },
            "latency_ms": entry.latency_ms,
            **ends,
        }

    def _rule(self, ref: RuleRef) -> dict[str, Any]:
        """A rule, with the labels of its policy and the text that it asks to have in the log (``log.value``)."""
        policy = self._policies.get((ref.kind, ref.namespace, ref.name))
        return {
            "kind": ref.kind,
            "namespace": ref.namespace,
            "name": ref.name,
            "section": ref.section,
            "index": ref.index,
            "labels": sorted(policy.labels) if policy else [],
            "log": policy.log if policy else "",
        }

    def _identity_of(self, address: str) -> int:
        row = self._table.row(address)
        return row.identity if row else 0


def rule_text(ref: RuleRef) -> str:
    """Return how a rule is named to people: ``CiliumNetworkPolicy default/api ingress[0]``."""
    name = f"{ref.namespace}/{ref.name}" if ref.namespace else ref.name
    if ref.index < 0:
        return f"{ref.kind} {name} {ref.section}".rstrip()
    return f"{ref.kind} {name} {ref.section}[{ref.index}]"


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
