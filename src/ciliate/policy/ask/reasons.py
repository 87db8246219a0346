"""Why a rule is not about a flow, in words: which label, port or protocol differs, what it has and what is wanted.

Only words: whether a rule is about a flow is for the engine to say (``probe``).
"""

from collections.abc import Iterator
from typing import Final

from ciliate.identity.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS, Network, split
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.ask.flows import ICMP, NAMES
from ciliate.policy.ask.world import End, PodFacts, World, value_of
from ciliate.policy.image import Direction
from ciliate.policy.rules import (
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    PortSpec,
    Rule,
    ServicePeer,
)

_SHOWN: Final = 3


def selector_text(selector: Selector) -> str:
    """Return a selector as kubectl writes it: ``app=web,tier in (a,b),!old``."""
    return ",".join(requirement_text(one) for one in selector.requirements) or "everything"


def requirement_text(one: Requirement) -> str:
    """Return a requirement as kubectl writes it, with Cilium's long keys shortened."""
    key = key_text(one.key)
    match one.operator:
        case Operator.IN if len(one.values) == 1:
            return f"{key}={one.values[0]}"
        case Operator.IN:
            return f"{key} in ({','.join(one.values)})"
        case Operator.NOT_IN:
            return f"{key} not in ({','.join(one.values)})"
        case Operator.EXISTS:
            return key
        case Operator.DOES_NOT_EXIST:
            return f"!{key}"


def key_text(key: str) -> str:
    """Return a label key as people say it."""
    source, _, name = key.partition(":")
    if name == NAMESPACE:
        return "namespace"
    if name == CLUSTER:
        return "cluster"
    if name.startswith(f"{NAMESPACE_LABELS}."):
        return f"namespace label {name.removeprefix(NAMESPACE_LABELS + '.')}"
    return name if source in ("k8s", "any") else f"{source}:{name}"


def peer_text(peer: Peer) -> str:
    """Return whom a peer means, in a few words."""
    match peer:
        case LabelPeer(selector=selector):
            return f"pods with {selector_text(selector)}"
        case CidrPeer(network=network, excepts=excepts):
            return f"{network}" + (f" without {', '.join(map(str, excepts))}" if excepts else "")
        case EntityPeer(name=name):
            return f"entity {name}"
        case CidrGroupPeer(name=name, selector=chosen):
            return f"CIDR group {name}" if chosen is None else f"CIDR groups with {selector_text(chosen)}"
        case NodePeer(selector=selector):
            return f"nodes with {selector_text(selector)}"
        case ServicePeer(namespace=namespace, name=name, selector=chosen):
            what = name if chosen is None else f"services with {selector_text(chosen)}"
            return f"service {namespace}/{what}" if namespace else f"service {what}"
        case FqdnPeer(name=name, pattern=pattern):
            return f"name {name or pattern}"


# ---- peers --------------------------------------------------------------------------------------------------


def peer_reasons(world: World, rule: Rule, peer: End) -> list[str]:
    """Return why a rule's peers do not mean ``peer``: of the closest alternatives, what differs."""
    if not rule.peers:
        return ["it names no peer at all, so it means nobody"]
    listed = [_peer_problems(world, rule, one, peer) for one in rule.peers]
    fewest = min(map(len, listed))
    texts = list(dict.fromkeys(" and ".join(one) for one in listed if len(one) == fewest))
    more = len(texts) - _SHOWN
    return [*texts[:_SHOWN], *([f"{more} more of its peers do not either"] if more > 0 else [])]


def _peer_problems(world: World, rule: Rule, wanted: Peer, peer: End) -> list[str]:
    is_pod = bool(value_of(peer.labels, NAMESPACE))
    match wanted:
        case LabelPeer(selector=selector):
            reserved = any(one.key.startswith("reserved:") for one in selector.requirements)
            if not is_pod and not reserved:
                return [f"{peer.text} is no pod of the cluster, the rule means {peer_text(wanted)}"]
            return list(selector_problems(selector, peer, rule.ref.namespace)) or [_elsewhere(world, peer)]
        case CidrPeer():
            return [_cidr_problem(wanted, peer, is_pod=is_pod)]
        case _:
            return [f"{peer.text} is not of {peer_text(wanted)}"]


def selector_problems(selector: Selector, end: End, own: str = "") -> Iterator[str]:
    """Yield which requirements an end's labels do not meet. ``own``: namespace of the policy."""
    for one in selector.requirements:
        if one.matches(end.labels):
            continue
        source, _, key = one.key.partition(":")
        have = sorted({v for s, k, v in map(split, end.labels) if k == key and source in (s, "any")})
        has = f"is {', '.join(have)}" if have else "is absent"
        yield f"{key_text(one.key)} {has}, wanted {_wanted(one)}{_implied(one, own)}"


def _wanted(one: Requirement) -> str:
    match one.operator:
        case Operator.IN:
            return " or ".join(one.values)
        case Operator.NOT_IN:
            return f"anything but {' and '.join(one.values)}"
        case Operator.EXISTS:
            return "any value"
        case Operator.DOES_NOT_EXIST:
            return "absent"


def _implied(one: Requirement, own: str) -> str:
    if own and one.key == f"k8s:{NAMESPACE}" and one.values == (own,):
        return " (the policy's own namespace, which is meant where a selector names none)"
    return ""


def _elsewhere(world: World, peer: End) -> str:
    cluster = value_of(peer.labels, CLUSTER)
    if cluster != world.cluster:
        return f"cluster is {cluster}, wanted {world.cluster} (its own, which is meant where a selector names none)"
    return f"{peer.text} is not among those that it means"


def _cidr_problem(wanted: CidrPeer, peer: End, *, is_pod: bool) -> str:
    if is_pod:
        return f"{peer.text} is a pod, CIDRs mean only what is outside the cluster"
    if peer.network is None:
        return f"{peer.text} is not an address of {wanted.network}"
    if not _within(peer.network, wanted.network):
        return f"{peer.network} is not within {wanted.network}"
    for one in wanted.excepts:
        if _within(peer.network, one):
            return f"{peer.network} is within {one}, which is excepted from {wanted.network}"
    return f"{peer.network} is only in part within {peer_text(wanted)}"


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


# ---- ports --------------------------------------------------------------------------------------------------


def port_reasons(rule: Rule, named: PodFacts | None, point: tuple[int, int]) -> list[str]:
    """Return why a rule's ports do not have a protocol and port. ``named``: the pod whose port names count."""
    protocol, port = point
    if not rule.ports:
        return ["it names no port at all"]
    same = [one for one in rule.ports if one.protocol in (0, protocol)]
    if not same:
        wanted = sorted({NAMES.get(one.protocol, str(one.protocol)) for one in rule.ports})
        return [f"protocol is {NAMES.get(protocol, protocol)}, wanted {' or '.join(wanted)}"]
    word = "type" if protocol in ICMP else "port"
    texts = [_port_text(one, named) for one in same]
    more = len(texts) - _SHOWN
    wanted_text = " or ".join(texts[:_SHOWN]) + (f" or {more} others" if more > 0 else "")
    return [f"{word} is {port}, wanted {wanted_text}"]


def _port_text(spec: PortSpec, named: PodFacts | None) -> str:
    if spec.name:
        ports = named.named_ports if named else frozenset()
        found = sorted(port for name, protocol, port in ports if (name, protocol) == (spec.name, spec.protocol))
        meant = f"{found[0]} there" if found else "no port there"
        return f"{spec.name} ({meant})"
    return str(spec.low) if spec.low == spec.high else f"{spec.low}-{spec.high}"


def named_by(direction: Direction, pod: PodFacts, peer: End) -> PodFacts | None:
    """Return whose port names a rule means: the selected pod's for ingress, the peer's for egress."""
    return pod if direction is Direction.INGRESS else peer.pod
