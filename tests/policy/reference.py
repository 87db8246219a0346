"""A slow, obvious evaluator of policy documents. It reads the documents and shares no code with the product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

NS = "io.kubernetes.pod.namespace"
CLUSTER = "io.cilium.k8s.policy.cluster"
NS_LABELS = "io.cilium.k8s.namespace.labels."
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
CLUSTER_RESERVED = {"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that has an identity. ``labels``: (source, key) -> value; ``network``: of a CIDR identity."""

    identity: int
    labels: Mapping[tuple[str, str], str]
    network: str = ""
    ports: frozenset[tuple[str, int, int]] = frozenset()

    def reserved(self, name: str) -> bool:
        return ("reserved", name) in self.labels

    @property
    def pod(self) -> bool:
        return ("k8s", NS) in self.labels

    @property
    def own_cluster(self) -> bool:
        return self.labels.get(("k8s", CLUSTER)) == "default"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What policies refer to besides pods: CiliumCIDRGroups and Services, as documents."""

    groups: Sequence[Mapping[str, Any]] = ()
    services: Sequence[Mapping[str, Any]] = ()


def judge(
    documents: Sequence[Mapping[str, Any]],
    subject: Thing,
    peer: Thing,
    direction: str,
    protocol: int,
    port: int,
    setting: Setting = Setting(),
) -> tuple[str, frozenset[str]]:
    """Return ("allow" | "deny" | "l7", the L7 rules; "*" among them: anything is allowed)."""
    asked = (subject, peer, direction, protocol, port, setting)
    verdict = tiered("Admin", documents, *asked)
    if verdict == "next":
        verdict, conditions = normal(documents, *asked)
        if verdict != "next":
            return verdict, conditions
        verdict = tiered("Baseline", documents, *asked)
    return ("allow" if verdict == "next" else verdict), frozenset()


def tiered(
    tier: str,
    documents: Sequence[Mapping[str, Any]],
    subject: Thing,
    peer: Thing,
    direction: str,
    protocol: int,
    port: int,
    setting: Setting,
) -> str:
    """The first rule of the tier that matches decides; "next": none does, or it passes."""
    ours = [one for one in documents if one["kind"] == "ClusterNetworkPolicy" and one["spec"]["tier"] == tier]
    for document in sorted(ours, key=lambda one: one["spec"]["priority"]):
        spec = document["spec"]
        if not subject.pod or not subject.own_cluster or not meets_cluster_peer(spec["subject"], subject):
            continue
        for rule in spec.get(direction, []):
            peers = rule["from" if direction == "ingress" else "to"]
            if not any(meets_cluster_peer(one, peer) for one in peers):
                continue
            named = subject if direction == "ingress" else peer
            if "protocols" in rule and not any(at_protocol(one, named, protocol, port) for one in rule["protocols"]):
                continue
            return {"Accept": "allow", "Deny": "deny", "Pass": "next"}[rule["action"]]
    return "next"


def meets_cluster_peer(one: Mapping[str, Any], thing: Thing) -> bool:
    if "networks" in one:
        return any(within(thing, cidr, []) for cidr in one["networks"])
    if "nodes" in one:
        return meets_node(one["nodes"], thing)
    if "domainNames" in one:
        return any(
            ("fqdn", f"**{name[1:]}" if name.startswith("*") else name) in thing.labels for name in one["domainNames"]
        )
    if not thing.pod or not thing.own_cluster:
        return False
    if "namespaces" in one:
        return matches(one["namespaces"], thing, "k8s", NS_LABELS)
    pods = one["pods"]
    spaces = pods.get("namespaceSelector", {})
    return matches(spaces, thing, "k8s", NS_LABELS) and matches(pods["podSelector"], thing, "k8s", "")


def at_protocol(one: Mapping[str, Any], named: Thing, protocol: int, port: int) -> bool:
    if "destinationNamedPort" in one:
        return (one["destinationNamedPort"], protocol, port) in named.ports
    ((name, body),) = one.items()
    if NUMBERS[name.upper()] != protocol:
        return False
    wanted = body.get("destinationPort")
    if wanted is None:
        return True
    if "number" in wanted:
        return wanted["number"] == port
    return wanted["range"]["start"] <= port <= wanted["range"]["end"]


def normal(
    documents: Sequence[Mapping[str, Any]],
    subject: Thing,
    peer: Thing,
    direction: str,
    protocol: int,
    port: int,
    setting: Setting,
) -> tuple[str, frozenset[str]]:
    """The unordered tier: deny, then L7, then allow, then default deny; "next": nothing is said."""
    rules, denying = [], False
    for document in documents:
        if document["kind"] == "ClusterNetworkPolicy":
            continue
        for spec in [document[name] for name in ("spec",) if name in document] + list(document.get("specs", [])):
            if selects(document, spec, subject):
                found, imposes = rules_of(document, spec, direction)
                rules += found
                denying |= imposes
    host = direction == "ingress" and peer.reserved("host") and subject.pod
    allowed, plain, protocols, l7 = False, not denying or host, set(), set()
    for rule in rules:
        if not meets_peer(rule, peer, setting):
            continue
        hit, conditions = meets_port(rule, subject if direction == "ingress" else peer, protocol, port)
        if not hit:
            continue
        if rule["deny"]:
            return "deny", frozenset()
        allowed = True
        if conditions is None or host:
            plain = True
            continue
        for kind, condition in conditions:
            if kind == "*":
                plain = True
            else:
                protocols.add(kind)
                l7 |= {f"{kind} {sorted(condition.items())}"} if condition is not None else set()
    if len(protocols) > 1:
        return "deny", frozenset()
    if protocols:
        return "l7", frozenset(l7 | ({"*"} if plain else set()))
    if allowed or (host and denying):
        return "allow", frozenset()
    return ("deny" if denying else "next"), frozenset()


# ---- whom a policy selects, and what it says ----------------------------------------------------------------


def selects(document: Mapping[str, Any], spec: Mapping[str, Any], subject: Thing) -> bool:
    if "nodeSelector" in spec:
        return subject.reserved("host") and matches(spec["nodeSelector"], subject, "any", "")
    if not subject.pod:
        return False
    namespace = document["metadata"].get("namespace", "default")
    if document["kind"] != "CiliumClusterwideNetworkPolicy" and subject.labels[("k8s", NS)] != namespace:
        return False
    if document["kind"] == "NetworkPolicy":
        return matches(spec.get("podSelector") or {}, subject, "k8s", "")
    return matches(spec["endpointSelector"], subject, "any", "")


def rules_of(document: Mapping[str, Any], spec: Mapping[str, Any], direction: str) -> tuple[list[dict[str, Any]], bool]:
    """Return (rules, whether default deny is imposed)."""
    native = document["kind"] == "NetworkPolicy"
    found = [{"rule": one, "deny": False} for one in spec.get(direction) or []]
    if not native:
        found += [{"rule": one, "deny": True} for one in spec.get(f"{direction}Deny") or []]
    for one in found:
        one |= {"native": native, "document": document, "from": "from" if direction == "ingress" else "to"}
    if native:
        types = spec.get("policyTypes") or (["Ingress"] + (["Egress"] if spec.get("egress") else []))
        return found, direction.capitalize() in types or bool(found)
    wanted = (spec.get("enableDefaultDeny") or {}).get(direction, True)
    return [one for one in found if one["rule"]], bool(found) and wanted


# ---- peers --------------------------------------------------------------------------------------------------


def meets_peer(rule: Mapping[str, Any], peer: Thing, setting: Setting) -> bool:
    side, body = rule["from"], rule["rule"]
    namespace = rule["document"]["metadata"].get("namespace", "default")
    if rule["native"]:
        peers = body.get(side) or []
        return not peers or any(meets_native(one, peer, namespace) for one in peers)
    clusterwide = rule["document"]["kind"] == "CiliumClusterwideNetworkPolicy"
    for kind, test in (
        ("Endpoints", lambda one: meets_endpoint(one, peer, "" if clusterwide else namespace)),
        ("CIDR", lambda one: within(peer, one, [])),
        ("CIDRSet", lambda one: meets_cidr_set(one, peer, setting)),
        ("Entities", lambda one: meets_entity(one, peer)),
        ("Nodes", lambda one: meets_node(one, peer)),
        ("Services", lambda one: meets_service(one, peer, setting, "" if clusterwide else namespace)),
        ("FQDNs", lambda one: ("fqdn", one.get("matchName") or one["matchPattern"]) in peer.labels),
    ):
        if side + kind in body:
            return any(test(one) for one in body[side + kind])
    return True


def meets_cidr_set(one: Mapping[str, Any], peer: Thing, setting: Setting) -> bool:
    excepts = one.get("except", [])
    if "cidr" in one:
        return within(peer, one["cidr"], excepts)
    for group in setting.groups:
        if "cidrGroupRef" in one:
            meant = group["metadata"]["name"] == one["cidrGroupRef"]
        else:
            have = {("cidrgroup", key): value for key, value in group["metadata"].get("labels", {}).items()}
            meant = matches(one["cidrGroupSelector"], Thing(identity=0, labels=have), "any", "")
        if meant and any(within(peer, cidr, excepts) for cidr in group["spec"]["externalCIDRs"]):
            return True
    return False


def meets_node(selector: Mapping[str, Any], peer: Thing) -> bool:
    return peer.reserved("remote-node") and matches(selector, peer, "node", "")


def meets_service(one: Mapping[str, Any], peer: Thing, setting: Setting, namespace: str) -> bool:
    for service in setting.services:
        metadata = service["metadata"]
        if "k8sService" in one:
            wanted = one["k8sService"]
            meant = metadata["name"] == wanted["serviceName"]
            space = wanted.get("namespace") or namespace
        else:
            wanted = one["k8sServiceSelector"]
            have = {("k8s", key): value for key, value in metadata.get("labels", {}).items()}
            meant = matches(wanted["selector"], Thing(identity=0, labels=have), "any", "")
            space = wanted.get("namespace")  # none: Services of any namespace
        if not meant or (space and metadata["namespace"] != space):
            continue
        selector = service["spec"].get("selector")
        if selector:
            local = peer.pod and peer.own_cluster and peer.labels[("k8s", NS)] == metadata["namespace"]
            if local and matches({"matchLabels": selector}, peer, "k8s", ""):
                return True
        elif any(within(peer, cidr, []) for cidr in service["addresses"]):
            return True
    return False


def meets_native(one: Mapping[str, Any], peer: Thing, namespace: str) -> bool:
    if "ipBlock" in one:
        return within(peer, one["ipBlock"]["cidr"], one["ipBlock"].get("except", []))
    if not peer.pod or not peer.own_cluster:
        return False
    if "namespaceSelector" in one:
        if not matches(one["namespaceSelector"] or {}, peer, "k8s", NS_LABELS):
            return False
    elif peer.labels[("k8s", NS)] != namespace:
        return False
    return matches(one.get("podSelector") or {}, peer, "k8s", "")


def meets_endpoint(selector: Mapping[str, Any], peer: Thing, namespace: str) -> bool:
    keys = [*selector.get("matchLabels", {}), *(one["key"] for one in selector.get("matchExpressions", []))]
    if any(key.startswith("reserved") for key in keys):
        return matches(selector, peer, "any", "")
    if not any(CLUSTER in key for key in keys) and not peer.own_cluster:
        return False
    if not any(NS in key or NS_LABELS in key for key in keys):
        if namespace and peer.labels.get(("k8s", NS)) != namespace:
            return False
        if not peer.pod:
            return False
    return matches(selector, peer, "any", "")


def meets_entity(name: str, peer: Thing) -> bool:
    if name == "all":
        return True
    if name == "cluster":
        return (peer.pod and peer.own_cluster) or any(peer.reserved(one) for one in CLUSTER_RESERVED)
    if name == "cluster-mesh":
        return peer.pod or any(peer.reserved(one) for one in CLUSTER_RESERVED)
    if name == "world":
        return peer.reserved("world")
    return peer.reserved(name)


def within(peer: Thing, cidr: str, excepts: Sequence[str]) -> bool:
    outer = ip_network(cidr)
    if outer.prefixlen == 0 and not peer.network:
        return peer.identity in (2, 9 if outer.version == 4 else 10)
    if not peer.network:
        return False
    network = ip_network(peer.network)
    return inside(network, outer) and not any(inside(network, ip_network(one)) for one in excepts)


def inside(one: Any, other: Any) -> bool:
    return one.version == other.version and one.subnet_of(other)


def matches(selector: Mapping[str, Any], thing: Thing, source: str, prefix: str) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if value not in values(thing, key, source, prefix):
            return False
    for one in selector.get("matchExpressions") or []:
        have = values(thing, one["key"], source, prefix)
        wanted = set(one.get("values", []))
        good = {
            "In": bool(have & wanted),
            "NotIn": not have & wanted,
            "Exists": bool(have),
            "DoesNotExist": not have,
        }[one["operator"]]
        if not good:
            return False
    return True


def values(thing: Thing, key: str, source: str, prefix: str) -> set[str]:
    if source == "any":
        for one in ("k8s", "reserved", "any", "cidr"):
            if key.startswith((f"{one}:", f"{one}.")):
                source, key = one, key[len(one) + 1 :]
                break
    return {value for (s, k), value in thing.labels.items() if k == prefix + key and source in (s, "any")}


# ---- ports --------------------------------------------------------------------------------------------------


Conditions = Sequence[tuple[str, Mapping[str, Any] | None]]


def meets_port(rule: Mapping[str, Any], named: Thing, protocol: int, port: int) -> tuple[bool, Conditions | None]:
    """Return (whether the rule is about the port, L7 conditions or None). ``named``: whose port names count.

    A condition is (protocol, fields); fields None: nothing of that protocol is allowed; protocol "*": anything is.
    """
    body = rule["rule"]
    if rule["native"]:
        ports = body.get("ports") or []
        return not ports or any(at_port(one, named, protocol, port, "TCP") for one in ports), None
    if "icmps" in body:
        for block in body["icmps"]:
            for one in block["fields"]:
                if (1 if one.get("family", "IPv4") == "IPv4" else 58, one["type"]) == (protocol, port):
                    return True, None
        return False, None
    if "toPorts" not in body:
        return True, None
    hit, plain, found = False, False, []
    for block in body["toPorts"]:
        ports = block.get("ports") or []
        if ports and not any(at_port(one, named, protocol, port, "ANY") for one in ports):
            continue
        hit = True
        rules = block.get("rules") or {}
        plain |= not rules
        for kind, conditions in rules.items():
            found += [(kind, one) for one in conditions] or [(kind, None)]
    if found and plain:
        found.append(("*", None))
    return hit, found or None


def at_port(one: Mapping[str, Any], named: Thing, protocol: int, port: int, default: str) -> bool:
    name = one.get("protocol", default)
    wanted = {6, 17, 132} if name == "ANY" else {NUMBERS[name]}
    value = one.get("port")
    if value in (None, "0"):
        return (name == "ANY" and value == "0") or protocol in wanted
    if protocol not in wanted:
        return False
    text = str(value)
    if not text.isdigit():
        return (text, protocol, port) in named.ports
    return int(text) <= port <= max(int(one.get("endPort", 0)), int(text))
