"""Kubernetes documents to policies. Whatever is not understood is an error: a rule is never ignored."""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from ciliate.identity.labels import Network
from ciliate.identity.selectors import Selector
from ciliate.policy.document import At
from ciliate.policy.image import Direction, RuleRef
from ciliate.policy.parse_ports import icmps, network_policy_ports, to_ports
from ciliate.policy.peers import ENTITIES
from ciliate.policy.rules import Action, CidrPeer, EntityPeer, LabelPeer, Peer, PolicyError, PolicyObject, Rule, Subject
from ciliate.policy.selecting import (
    any_namespace,
    cilium_selector,
    in_namespace,
    mentions_namespace,
    mentions_reserved,
    namespace_selector,
    pod_selector,
)

API_VERSIONS: Final[Mapping[str, str]] = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "CiliumNetworkPolicy": "cilium.io/v2",
    "CiliumClusterwideNetworkPolicy": "cilium.io/v2",
}
_SPEC: Final = {
    "endpointSelector", "ingress", "egress", "ingressDeny", "egressDeny", "enableDefaultDeny", "description", "labels",
    "log",
}  # fmt: skip
_SECTIONS: Final = {
    "ingress": (Direction.INGRESS, False),
    "ingressDeny": (Direction.INGRESS, True),
    "egress": (Direction.EGRESS, False),
    "egressDeny": (Direction.EGRESS, True),
}
_PEERS: Final = ("Endpoints", "CIDR", "CIDRSet", "Entities")
_LATER: Final = {
    Direction.INGRESS: ("fromRequires", "fromGroups", "fromNodes", "authentication"),
    Direction.EGRESS: ("toRequires", "toGroups", "toNodes", "toServices", "toFQDNs", "authentication"),
}


def parse_object(document: Mapping[str, Any], *, source: str = "") -> PolicyObject:
    """Return the policy that a document says. Error: PolicyError, which names ``source`` if it has no name."""
    kind = str(document.get("kind"))
    if kind not in API_VERSIONS:
        raise PolicyError(source or "document", "kind", f"{kind!r} is none of {', '.join(API_VERSIONS)}")
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not isinstance(metadata, Mapping) or not isinstance(name, str) or not name:
        raise PolicyError(source or kind, "metadata.name", "must be set")
    clusterwide = kind == "CiliumClusterwideNetworkPolicy"
    namespace = "" if clusterwide else str(metadata.get("namespace") or "default")
    title = f"{kind} {name}" if clusterwide else f"{kind} {namespace}/{name}"
    root = At(object=title, path="", value=document)
    root.mapping({"apiVersion", "kind", "metadata", "spec", "specs", "status"})
    if document.get("apiVersion") != API_VERSIONS[kind]:
        root.child("apiVersion").fail(f"{document.get('apiVersion')!r} is not {API_VERSIONS[kind]}")
    subjects: tuple[Subject, ...]
    if kind == "NetworkPolicy":
        subjects = (_network_policy(root, namespace, name),)
    else:
        subjects = _cilium(root, kind, namespace, name)
    return PolicyObject(kind=kind, namespace=namespace, name=name, subjects=subjects)


def required_networks(objects: Iterable[PolicyObject]) -> set[Network]:
    """Return every CIDR, and every exception, that needs an identity: /0 is the world, which has one."""
    found: set[Network] = set()
    for one in objects:
        for subject in one.subjects:
            for rule in subject.rules:
                for peer in rule.peers or ():
                    if isinstance(peer, CidrPeer):
                        found |= {network for network in (peer.network, *peer.excepts) if network.prefixlen}
    return found


# ---- cilium.io/v2 -------------------------------------------------------------------------------------------


def _cilium(root: At, kind: str, namespace: str, name: str) -> tuple[Subject, ...]:
    specs = [] if root.child("spec").absent else [root.child("spec")]
    specs += root.child("specs").items()
    if not specs:
        root.child("spec").fail("must be set (or specs)")
    counts = dict.fromkeys(_SECTIONS, 0)
    return tuple(_cilium_spec(spec, kind, namespace, name, counts) for spec in specs)


def _cilium_spec(at: At, kind: str, namespace: str, name: str, counts: dict[str, int]) -> Subject:
    """``counts``: rules of each section so far, so that a rule's index is unique in the object."""
    at.mapping(_SPEC, unsupported={"nodeSelector"})
    if at.child("endpointSelector").absent:
        at.child("endpointSelector").fail("must be set; {} selects every pod")
    selector = cilium_selector(at.child("endpointSelector"))
    if namespace:
        if mentions_namespace(selector):
            _check_own_namespace(at.child("endpointSelector"), selector, namespace)
        selector = Selector(requirements=(*selector.requirements, in_namespace(namespace)))
    elif not mentions_reserved(selector):
        selector = Selector(requirements=(*selector.requirements, any_namespace()))
    rules: list[Rule] = []
    present = set()
    for section, (direction, deny) in _SECTIONS.items():
        child = at.child(section)
        if child.absent:
            continue
        listed = list(child.items())
        present.add(direction)
        for item in listed:
            ref = RuleRef(kind=kind, namespace=namespace, name=name, section=section, index=counts[section])
            counts[section] += 1
            rules += _cilium_rule(item, ref, direction, deny=deny, namespace=namespace)
    if not present:
        at.fail("must have at least one of ingress, ingressDeny, egress, egressDeny")
    return Subject(
        selector=selector, rules=tuple(rules), default_deny=_default_deny(at.child("enableDefaultDeny"), present)
    )


def _check_own_namespace(at: At, selector: Selector, namespace: str) -> None:
    for one in selector.requirements:
        if one.key.partition(":")[2] == "io.kubernetes.pod.namespace" and one.values and namespace not in one.values:
            at.fail(f"a policy of namespace {namespace} cannot select pods of {', '.join(one.values)}")


def _default_deny(at: At, present: set[Direction]) -> frozenset[Direction]:
    wanted = set(present)
    if not at.absent:
        at.mapping({"ingress", "egress"})
        for name, direction in (("ingress", Direction.INGRESS), ("egress", Direction.EGRESS)):
            value = at.child(name)
            if value.absent:
                continue
            if not isinstance(value.value, bool):
                value.fail(f"true or false is expected, not {value.value!r}")
            wanted = wanted | {direction} if value.value else wanted - {direction}
    return frozenset(wanted)


def _cilium_rule(at: At, ref: RuleRef, direction: Direction, *, deny: bool, namespace: str) -> list[Rule]:
    prefix = "from" if direction is Direction.INGRESS else "to"
    fields = {f"{prefix}{one}" for one in _PEERS} | {"toPorts", "icmps"}
    at.mapping(fields, unsupported=_LATER[direction])
    peers = _cilium_peers(at, prefix, namespace)
    ports, types = to_ports(at.child("toPorts"), deny=deny), icmps(at.child("icmps"))
    if ports and types:
        at.child("icmps").fail("cannot be combined with toPorts: write two rules")
    if peers is None and ports is None and types is None:
        return []  # a rule that names nobody and nothing allows nothing; its section still imposes default deny
    action = Action.DENY if deny else Action.ALLOW
    return [Rule(ref=ref, direction=direction, action=action, peers=peers, ports=types if types is not None else ports)]


def _cilium_peers(at: At, prefix: str, namespace: str) -> tuple[Peer, ...] | None:
    given = [name for name in _PEERS if not at.child(prefix + name).absent]
    if len(given) > 1:
        names = " and ".join(prefix + name for name in given)
        at.fail(f"{names} cannot be combined in one rule: write one rule for each")
    if not given:
        return None
    child = at.child(prefix + given[0])
    match given[0]:
        case "Endpoints":
            return tuple(LabelPeer(selector=_peer_selector(one, namespace)) for one in child.items())
        case "CIDR":
            return tuple(CidrPeer(network=_network(one)) for one in child.items())
        case "CIDRSet":
            return tuple(_cidr_set(one) for one in child.items())
        case _:
            return tuple(_entity(one) for one in child.items())


def _peer_selector(at: At, namespace: str) -> Selector:
    selector = cilium_selector(at)
    if mentions_reserved(selector) or mentions_namespace(selector):
        return selector
    extra = in_namespace(namespace) if namespace else any_namespace()
    return Selector(requirements=(*selector.requirements, extra))


def _entity(at: At) -> EntityPeer:
    if at.text() not in ENTITIES:
        at.fail(f"{at.value!r} is none of {', '.join(ENTITIES)}")
    return EntityPeer(name=at.value)


def _cidr_set(at: At) -> CidrPeer:
    at.mapping({"cidr", "except"}, unsupported={"cidrGroupRef", "cidrGroupSelector"})
    if at.child("cidr").absent:
        at.child("cidr").fail("must be set")
    return _with_excepts(_network(at.child("cidr")), at.child("except"))


def _with_excepts(network: Network, at: At) -> CidrPeer:
    excepts = []
    for one in at.items():
        inner = _network(one)
        if inner.version != network.version or not inner.subnet_of(network):  # type: ignore[arg-type]
            one.fail(f"{inner} is not within {network}")
        excepts.append(inner)
    return CidrPeer(network=network, excepts=tuple(excepts))


def _network(at: At) -> IPv4Network | IPv6Network:
    """A CIDR; a plain address is one of full length, and host bits are cut off, as under Cilium."""
    try:
        return ip_network(at.text(), strict=False)
    except ValueError:
        at.fail(f"{at.value!r} is not a CIDR (10.0.0.0/8, fd00::/8)")


# ---- networking.k8s.io/v1 -----------------------------------------------------------------------------------


def _network_policy(root: At, namespace: str, name: str) -> Subject:
    at = root.child("spec")
    if at.absent:
        at.fail("must be set")
    at.mapping({"podSelector", "ingress", "egress", "policyTypes"})
    requirements = () if at.child("podSelector").absent else pod_selector(at.child("podSelector"))
    rules: list[Rule] = []
    for section, direction in (("ingress", Direction.INGRESS), ("egress", Direction.EGRESS)):
        for index, item in enumerate(at.child(section).items()):
            ref = RuleRef(kind="NetworkPolicy", namespace=namespace, name=name, section=section, index=index)
            rules.append(_network_policy_rule(item, ref, direction, namespace))
    types = _policy_types(at)
    return Subject(
        selector=Selector(requirements=(*requirements, in_namespace(namespace))),
        rules=tuple(rules),
        default_deny=types | {rule.direction for rule in rules},
    )


def _policy_types(at: At) -> frozenset[Direction]:
    known = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
    child = at.child("policyTypes")
    listed = list(child.items())
    for one in listed:
        if one.value not in known:
            one.fail(f"{one.value!r} is neither Ingress nor Egress")
    if listed:
        return frozenset(known[one.value] for one in listed)
    implied = {Direction.INGRESS} | ({Direction.EGRESS} if at.child("egress").value else set())
    return frozenset(implied)


def _network_policy_rule(at: At, ref: RuleRef, direction: Direction, namespace: str) -> Rule:
    field = "from" if direction is Direction.INGRESS else "to"
    at.mapping({field, "ports"})
    peers = tuple(_network_policy_peer(one, namespace) for one in at.child(field).items())
    return Rule(ref=ref, direction=direction, peers=peers or None, ports=network_policy_ports(at.child("ports")))


def _network_policy_peer(at: At, namespace: str) -> Peer:
    at.mapping({"podSelector", "namespaceSelector", "ipBlock"})
    pods, namespaces, block = (at.child(name) for name in ("podSelector", "namespaceSelector", "ipBlock"))
    if not block.absent:
        if not pods.absent or not namespaces.absent:
            at.fail("ipBlock cannot be combined with podSelector or namespaceSelector")
        block.mapping({"cidr", "except"})
        if block.child("cidr").absent:
            block.child("cidr").fail("must be set")
        return _with_excepts(_network(block.child("cidr")), block.child("except"))
    if pods.absent and namespaces.absent:
        at.fail("one of podSelector, namespaceSelector, ipBlock must be set")
    within = (in_namespace(namespace),) if namespaces.absent else namespace_selector(namespaces)
    return LabelPeer(selector=Selector(requirements=(*(() if pods.absent else pod_selector(pods)), *within)))
