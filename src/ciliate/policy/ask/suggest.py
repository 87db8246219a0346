"""The smallest addition that allows a flow which is denied: one policy that says exactly that, and is tried out."""

import re
from dataclasses import dataclass
from typing import Any

from ciliate.identity.labels import CLUSTER, NAMESPACE
from ciliate.policy.ask.evaluate import Evaluator, Flow, Side, Verdict
from ciliate.policy.ask.flows import ICMP, NAMES
from ciliate.policy.ask.request import HttpRequest
from ciliate.policy.ask.world import End, PodFacts, World, dns_name, own_labels, value_of
from ciliate.policy.image import Direction
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import PORTLESS, PolicyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """``document``: the policy, None: no rule can allow it, ``note`` says why. ``note``: what else to know."""

    document: dict[str, Any] | None
    note: str = ""


def smallest_addition(world: World, flow: Flow, direction: Direction, point: tuple[int, int]) -> Addition:
    """Return what would make one end of a denied flow allow it. Error: AskError."""
    source, destination = world.pair(flow.source, flow.destination)
    here, peer = (source, destination) if direction is Direction.EGRESS else (destination, source)
    assert here.pod is not None
    document = _policy(here.pod, peer, direction, point, flow.request)
    if document is None:
        return Addition(
            document=None, note=f"no rule can name exactly {peer.text} and protocol {point[0]}, port {point[1]}"
        )
    try:
        policy = parse_object(document)
    except PolicyError as error:
        return Addition(document=None, note=f"no rule can say this: {error}")
    side = _tried(world.with_objects([*world.objects, policy]), flow, direction)
    if side.verdict is Verdict.DENIED or side.request_allowed is False:
        return Addition(
            document=None, note="no rule can be added that allows it: what denies it wins, change that rule"
        )
    note = ""
    if not own_labels(here.pod.labels):
        note = f"{here.pod.text} has no labels of its own, so this selects every pod of its namespace"
    elif peer.pod is not None and not own_labels(peer.labels):
        note = f"{peer.text} has no labels of its own, so this means every pod of its namespace"
    return Addition(document=document, note=note)


def _tried(world: World, flow: Flow, direction: Direction) -> Side:
    answer = Evaluator(world).answer(flow)
    side = answer.egress if direction is Direction.EGRESS else answer.ingress
    assert side is not None
    return side


def _policy(
    pod: PodFacts, peer: End, direction: Direction, point: tuple[int, int], request: HttpRequest | None
) -> dict[str, Any] | None:
    section, prefix = ("egress", "to") if direction is Direction.EGRESS else ("ingress", "from")
    peers, ports = _peer(pod, peer, prefix), _ports(point, request)
    if peers is None or ports is None:
        return None
    name = f"allow-{section}-{NAMES.get(point[0], str(point[0])).lower()}-{point[1]}"
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"{pod.workload or pod.name}-{name}", "namespace": pod.namespace},
        "spec": {
            "endpointSelector": _selector(own_labels(pod.labels)),
            "enableDefaultDeny": {section: False},
            section: [{**peers, **ports}],
        },
    }


def _selector(labels: dict[str, str]) -> dict[str, Any]:
    return {"matchLabels": labels} if labels else {}


def _peer(pod: PodFacts, peer: End, prefix: str) -> dict[str, Any] | None:
    namespace, cluster = value_of(peer.labels, NAMESPACE), value_of(peer.labels, CLUSTER)
    if namespace:
        labels = own_labels(peer.labels)
        if namespace != pod.namespace:
            labels[f"k8s:{NAMESPACE}"] = namespace
        if cluster != value_of(pod.labels, CLUSTER):
            labels[f"k8s:{CLUSTER}"] = cluster
        return {f"{prefix}Endpoints": [_selector(labels)]}
    if name := dns_name(peer.text):
        return {f"{prefix}FQDNs": [{"matchName": name}]} if prefix == "to" else None
    if peer.network is not None:
        return {f"{prefix}CIDR": [str(peer.network)]}
    names = sorted(one.removeprefix("reserved:") for one in peer.labels if one.startswith("reserved:"))
    narrowest = next((one for one in names if one not in ("world", "remote-node")), names[0] if names else "")
    return {f"{prefix}Entities": [narrowest]} if narrowest else None


def _ports(point: tuple[int, int], request: HttpRequest | None) -> dict[str, Any] | None:
    protocol, port = point
    if protocol in ICMP:
        family = "IPv4" if NAMES[protocol] == "ICMP" else "IPv6"
        return {"icmps": [{"fields": [{"family": family, "type": port}]}]}
    if protocol not in NAMES or (port == 0 and protocol not in PORTLESS):
        return None  # it would have to allow every port
    block: dict[str, Any] = {"ports": [{"port": str(port), "protocol": NAMES[protocol]}]}
    if request is not None:
        rule = {"method": re.escape(request.method), "path": re.escape(request.path)}
        block["rules"] = {"http": [rule | ({"host": re.escape(request.host)} if request.host else {})]}
    return {"toPorts": [block]}
