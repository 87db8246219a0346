"""The verdict of flows, by the images that the policy engine makes: both ends, and what comes of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ciliate.identity.labels import Labels, Network
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import NamedPorts
from ciliate.policy.ask.request import HttpRequest, judge_request
from ciliate.policy.ask.world import AskError, End, PodFacts, World, dns_name
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Direction, PolicyImage, Row, RowVerdict, RuleRef, RuleSet
from ciliate.policy.l7 import L7Protocol

Images = tuple[PolicyImage | None, PolicyImage | None]


class Verdict(StrEnum):
    """What happens to a connection's first packet."""

    ALLOWED = "allowed"
    DENIED = "denied"
    REDIRECTED = "redirected"
    """Allowed as far as L7 rules let requests pass."""


_VERDICTS = {
    RowVerdict.ALLOW: Verdict.ALLOWED,
    RowVerdict.DENY: Verdict.DENIED,
    RowVerdict.REDIRECT: Verdict.REDIRECTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A question. ``port``: number (ICMP: type); ``where``: how errors name it."""

    source: str
    destination: str
    protocol: int = 6
    port: int = 0
    port_name: str = ""
    request: HttpRequest | None = None
    expect: "Expectation | None" = None
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a user says must come out; None: no matter."""

    final: Verdict | None = None
    egress: Verdict | None = None
    ingress: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One end's answer. ``rules``: what decided, the first of them by itself; none: no policy selects the pod."""

    verdict: Verdict
    rules: tuple[RuleRef, ...] = ()
    ruleset: RuleSet | None = None
    request_allowed: bool | None = None
    """What the L7 rules say to the flow's request, None: they are not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Both ends' answers; None: no pod is there. ``parts``: networks within a CIDR whose final verdict is another."""

    flow: Flow
    protocol: int
    port: int
    egress: Side | None
    ingress: Side | None
    parts: tuple[tuple[Network, Verdict], ...] = ()

    @property
    def final(self) -> Verdict:
        """What the client sees: any denial denies, a request that L7 rules refuse is denied too."""
        return final_of(self.egress, self.ingress)

    @property
    def as_expected(self) -> bool | None:
        """Whether the answer is what the flow says must come out, None: it says nothing."""
        wanted = self.flow.expect
        if wanted is None:
            return None
        return (
            wanted.final in (None, self.final)
            and (wanted.egress is None or (self.egress is not None and self.egress.verdict is wanted.egress))
            and (wanted.ingress is None or (self.ingress is not None and self.ingress.verdict is wanted.ingress))
        )


def final_of(*sides: Side | None) -> Verdict:
    """Return what both ends together come to."""
    there = [one for one in sides if one is not None]
    if any(one.verdict is Verdict.DENIED or one.request_allowed is False for one in there):
        return Verdict.DENIED
    open_requests = [one for one in there if one.verdict is Verdict.REDIRECTED and one.request_allowed is None]
    return Verdict.REDIRECTED if open_requests else Verdict.ALLOWED


def side_of(image: PolicyImage | None, row: Row | None, request: HttpRequest | None = None) -> Side:
    """Return the answer that a row is; no row: default deny; no image: no policy selects the endpoint."""
    if image is None:
        return Side(verdict=Verdict.ALLOWED)
    if row is None:
        return Side(verdict=Verdict.DENIED, rules=image.default_rules)
    allowed = None
    if request is not None and row.ruleset is not None and row.ruleset.protocol is L7Protocol.HTTP:
        allowed = judge_request(row.ruleset, request).allowed
    return Side(verdict=_VERDICTS[row.verdict], rules=row.rules, ruleset=row.ruleset, request_allowed=allowed)


class Evaluator:
    """Answers for one world. Images and rows are looked up once for all flows that share them."""

    def __init__(self, world: World, engine: PolicyEngine | None = None) -> None:
        self.world = world
        self.engine = engine or world.engine()
        self._images: dict[tuple[Labels, NamedPorts], Images] = {}
        self._pairs: dict[tuple[str, str], tuple[End, End]] = {}
        self._rows: dict[tuple[int, IdentityId, int, int], Row | None] = {}

    def images(self, pod: PodFacts) -> Images:
        """Return a pod's (egress, ingress) images."""
        key = (pod.labels, pod.named_ports)
        if key not in self._images:
            self._images[key] = self.engine.resolve(*key)
        return self._images[key]

    def answer(self, flow: Flow) -> Answer:
        """Return the answer to a flow. Error: AskError."""
        source, destination = self._pair(flow.source, flow.destination)
        protocol, port = port_of(flow, destination)
        answer = self._answer(flow, source, destination, protocol, port)
        parts = [*self._parts(source), *self._parts(destination)]
        if not parts:
            return answer
        other = []
        for end, network in parts:
            part = self.world.end(str(network))
            ends = (part, destination) if end is source else (source, part)
            final = self._answer(flow, *ends, protocol, port).final
            if final is not answer.final:
                other.append((network, final))
        return Answer(
            flow=flow,
            protocol=protocol,
            port=port,
            egress=answer.egress,
            ingress=answer.ingress,
            parts=tuple(other),
        )

    def side(self, direction: Direction, pod: PodFacts, peer: IdentityId, point: tuple[int, int]) -> Side:
        """Return one end's answer. ``point``: protocol number and port."""
        image = self.images(pod)[direction]
        return side_of(image, self._row(image, peer, *point))

    def _pair(self, source: str, destination: str) -> tuple[End, End]:
        key = (source, destination)
        if key not in self._pairs:
            self._pairs[key] = self.world.pair(source, destination)
        return self._pairs[key]

    def _parts(self, end: End) -> list[tuple[End, Network]]:
        if end.network is None or end.network.prefixlen == end.network.max_prefixlen:
            return []
        return [(end, network) for network in self.world.parts(end.network)]

    def _answer(self, flow: Flow, source: End, destination: End, protocol: int, port: int) -> Answer:
        sides: list[Side | None] = []
        for direction, here, peer in (
            (Direction.EGRESS, source, destination),
            (Direction.INGRESS, destination, source),
        ):
            if here.pod is None:
                sides.append(None)
                continue
            image = self.images(here.pod)[direction]
            sides.append(side_of(image, self._row(image, peer.identity, protocol, port), flow.request))
        return Answer(flow=flow, protocol=protocol, port=port, egress=sides[0], ingress=sides[1])

    def _row(self, image: PolicyImage | None, peer: IdentityId, protocol: int, port: int) -> Row | None:
        if image is None:
            return None
        key = (id(image), peer, protocol, port)
        if key not in self._rows:
            self._rows[key] = image.lookup(peer, self.world.scope(peer), protocol, port)
        return self._rows[key]


def port_of(flow: Flow, destination: End) -> tuple[int, int]:
    """Return (protocol, port) of a flow; a name is one of the destination pod's. Error: AskError."""
    if not flow.port_name:
        return flow.protocol, flow.port
    if destination.pod is None:
        raise AskError(f"port {flow.port_name!r}: only a pod gives names to ports, {flow.destination} is none")
    named = {(protocol, port) for name, protocol, port in destination.pod.named_ports if name == flow.port_name}
    found = sorted(one for one in named if one[0] == flow.protocol) or sorted(named)
    if not found:
        names = ", ".join(sorted({name for name, _, _ in destination.pod.named_ports})) or "none"
        raise AskError(f"port {flow.port_name!r}: {destination.pod.text} has no port of that name (it has: {names})")
    if len(found) > 1:
        raise AskError(f"port {flow.port_name!r}: {destination.pod.text} gives that name to several ports")
    return found[0]


def default_flows(world: World, ports: Sequence[tuple[int, int]] = ()) -> Iterator[Flow]:
    """Yield a flow for every pair of different pods, to ``ports``, else to those that the destination declares.

    Of a workload's replicas two stand for all. A pod that declares no port is asked for TCP/80. A pod on the host's
    network is an end as well, though policies do not select it.
    """
    pods = _standing_for_all(world)
    for source in pods:
        for destination in pods:
            if source is destination:
                continue
            for protocol, port in ports or destination.declared or ((6, 80),):
                yield Flow(source=source.text, destination=destination.text, protocol=protocol, port=port)


def _standing_for_all(world: World) -> list[PodFacts]:
    seen: dict[tuple[str, str], int] = {}
    found = []
    for pod in world.pods.values():
        if pod.workload:
            key = (pod.namespace, pod.workload)
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > 2:
                continue
        found.append(pod)
    return found


def prepared(world: World, flows: Iterable[Flow]) -> World:
    """Return the world with the DNS names that flows are about. Error: AskError."""
    names = {dns_name(text) for flow in flows for text in (flow.source, flow.destination)} - {"", *world.names}
    return world.with_objects(world.objects, sorted(names)) if names else world
