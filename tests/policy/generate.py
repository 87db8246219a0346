"""Policy documents and identities for property tests: small vocabularies, so that things meet."""

from typing import Any

from hypothesis import strategies as st

from tests.policy.reference import CLUSTER, NS, NS_LABELS, Thing

APPS, SPACES = ("a", "b", "c"), ("x", "y")
CIDRS = (
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "192.0.2.7/32",
    "::/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
)
INNER = {
    "0.0.0.0/0": ("10.0.0.0/8", "10.1.0.0/16"),
    "10.0.0.0/8": ("10.1.0.0/16", "10.1.2.0/24"),
    "10.1.0.0/16": ("10.1.2.0/24",),
    "::/0": ("2001:db8::/32",),
    "2001:db8::/32": ("2001:db8:1::/48",),
}
ENTITIES = ("all", "world", "cluster", "host", "remote-node", "kube-apiserver", "health", "init", "unmanaged")
RESERVED = {
    1: ("host",), 2: ("world",), 3: ("unmanaged",), 4: ("health",), 5: ("init",), 6: ("remote-node",),
    7: ("kube-apiserver", "remote-node"), 8: ("ingress",), 9: ("world", "world-ipv4"), 10: ("world", "world-ipv6"),
}  # fmt: skip
PORTS = (80, 443, 8080, 8081, 9000)
POINTS = [
    *((6, port) for port in (*PORTS, 79, 8079, 65535)),
    (17, 80),
    (17, 53),
    (132, 9000),
    (1, 8),
    (1, 0),
    (58, 128),
    (47, 0),
]
NAMES = frozenset({("web", 6, 8080), ("dns", 17, 53)})


def pod(identity: int, app: str, space: str, *, cluster: str = "default", named: bool = False) -> Thing:
    labels = {
        ("k8s", "app"): app,
        ("k8s", NS): space,
        ("k8s", CLUSTER): cluster,
        ("k8s", f"{NS_LABELS}team"): f"team-{space}",
    }
    return Thing(identity=identity, labels=labels, ports=NAMES if named else frozenset())


FQDNS = ("api.example.com", "**.example.org")
GROUPS = [
    {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumCIDRGroup",
        "metadata": {"name": name, "labels": {"tier": tier}},
        "spec": {"externalCIDRs": list(cidrs)},
    }
    for name, tier, cidrs in (
        ("lan", "inner", ("10.0.0.0/8", "2001:db8::/32")),
        ("dc", "inner", ("10.1.0.0/16",)),
        ("out", "outer", ("192.0.2.7/32", "0.0.0.0/0")),
    )
]
SERVICES: list[dict[str, Any]] = [
    {"metadata": {"name": "a", "namespace": "x", "labels": {"part": "front"}}, "spec": {"selector": {"app": "a"}}},
    {"metadata": {"name": "b", "namespace": "y", "labels": {"part": "front"}}, "spec": {"selector": {"app": "b"}}},
    {
        "metadata": {"name": "db", "namespace": "x", "labels": {"part": "back"}},
        "spec": {},
        "addresses": ["192.0.2.7/32", "2001:db8:1::/48"],
    },
]
NODE_ROLES = ("worker", "edge")
HOST = Thing(identity=1, labels={("reserved", "host"): "", ("k8s", "role"): "worker"})
"""The node's own endpoint, for node policies."""


def more_things() -> list[Thing]:
    """Return identities that only the newer kinds of peers mean: other nodes and learned names."""
    nodes = [
        Thing(identity=(2 << 24) + 1 + index, labels={("reserved", "remote-node"): "", ("node", "role"): role})
        for index, role in enumerate(NODE_ROLES)
    ]
    names = [
        Thing(identity=(1 << 24) + 100 + index, labels={("fqdn", name): "", ("reserved", "world"): ""})
        for index, name in enumerate(FQDNS)
    ]
    return nodes + names


def things() -> list[Thing]:
    """Return one of everything that can have an identity."""
    found = [Thing(identity=n, labels={("reserved", name): "" for name in names}) for n, names in RESERVED.items()]
    number = 256
    for space in SPACES:
        for app in APPS:
            found.append(pod(number, app, space, named=app == "a"))
            number += 1
    found.append(pod((1 << 16) | 300, "a", "x", cluster="other"))
    for index, cidr in enumerate(CIDRS):
        if not cidr.endswith("/0"):
            version = 6 if ":" in cidr else 4
            labels = {("cidr", cidr): "", ("reserved", "world"): "", ("reserved", f"world-ipv{version}"): ""}
            found.append(Thing(identity=(1 << 24) + 1 + index, labels=labels, network=cidr))
    return found


def _lists(of: st.SearchStrategy[Any], least: int = 0, most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, min_size=least, max_size=most)


EXPRESSION = st.one_of(
    st.fixed_dictionaries(
        {
            "key": st.just("app"),
            "operator": st.sampled_from(("In", "NotIn")),
            "values": _lists(st.sampled_from(APPS), 1),
        }
    ),
    st.fixed_dictionaries({"key": st.just("app"), "operator": st.sampled_from(("Exists", "DoesNotExist"))}),
)
LABELS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"matchLabels": st.fixed_dictionaries({"app": st.sampled_from(APPS)})}),
    st.fixed_dictionaries({"matchExpressions": _lists(EXPRESSION, 1)}),
)
ANYWHERE = st.one_of(
    LABELS,
    st.sampled_from(SPACES).map(lambda one: {"matchLabels": {f"k8s:{NS}": one}}),
    st.just({"matchExpressions": [{"key": NS, "operator": "Exists"}]}),
    st.sampled_from(SPACES).map(lambda one: {"matchLabels": {f"k8s:{NS_LABELS}team": f"team-{one}"}}),
    st.just({"matchLabels": {f"k8s:{CLUSTER}": "other", f"k8s:{NS}": "x"}}),
    st.just({"matchLabels": {"reserved:init": ""}}),
)


@st.composite
def cidr_sets(draw: st.DrawFn) -> dict[str, Any]:
    cidr = draw(st.sampled_from(CIDRS))
    inner = INNER.get(cidr, ())
    excepts = draw(_lists(st.sampled_from(inner))) if inner else []
    return {"cidr": cidr, "except": excepts} if excepts else {"cidr": cidr}


@st.composite
def ports(draw: st.DrawFn, *, l7: bool) -> dict[str, Any]:
    if not l7 and draw(st.integers(0, 3)) == 0:
        name, protocol = draw(st.sampled_from((("web", "TCP"), ("dns", "UDP"))))
        return {"port": name, "protocol": protocol}
    low = draw(st.sampled_from(PORTS if l7 else (0, *PORTS)))
    found: dict[str, Any] = {
        "port": str(low),
        "protocol": "TCP" if l7 else draw(st.sampled_from(("TCP", "UDP", "ANY"))),
    }
    if low and draw(st.booleans()):
        found["endPort"] = draw(st.sampled_from([one for one in (*PORTS, 65535) if one >= low]))
    return found


HTTP = st.fixed_dictionaries(
    {}, optional={"method": st.sampled_from(("GET", "POST")), "path": st.sampled_from(("/a", "/b.*"))}
)


DNS = st.sampled_from(({"matchName": "a.example.com"}, {"matchPattern": "*.example.com"}, {"matchPattern": "*"}))
KAFKA = st.sampled_from(({"topic": "orders"}, {"topic": "bills", "clientID": "web"}))


@st.composite
def to_ports(draw: st.DrawFn, *, deny: bool, l7_kinds: tuple[str, ...]) -> dict[str, Any]:
    l7 = not deny and draw(st.integers(0, 2)) == 0
    block: dict[str, Any] = {"ports": draw(_lists(ports(l7=l7), 1))}
    if l7:
        kind = draw(st.sampled_from(l7_kinds))
        block["rules"] = {kind: draw(_lists({"http": HTTP, "dns": DNS, "kafka": KAFKA}[kind], 1))}
        if kind == "dns":
            for one in block["ports"]:
                one.pop("endPort", None)
    return block


@st.composite
def cilium_rules(draw: st.DrawFn, side: str, *, deny: bool, every: bool, host: bool) -> dict[str, Any]:
    kinds = ["", "Endpoints", "CIDR", "CIDRSet", "Entities"]
    if every:
        kinds += ["Nodes"] + (["Services"] if side == "to" else []) + (["FQDNs"] if side == "to" and not deny else [])
    kind = draw(st.sampled_from(kinds))
    inside = {
        "Endpoints": ANYWHERE,
        "CIDR": st.sampled_from(CIDRS),
        "CIDRSet": st.one_of(cidr_sets(), group_sets()) if every else cidr_sets(),
        "Entities": st.sampled_from((*ENTITIES, "cluster-mesh") if every else ENTITIES),
        "Nodes": st.sampled_from(({}, {"matchLabels": {"role": "edge"}})),
        "Services": st.sampled_from(SERVICE_PEERS),
        "FQDNs": st.sampled_from(({"matchName": FQDNS[0]}, {"matchPattern": FQDNS[1]})),
    }
    l7_kinds: tuple[str, ...] = ("http",)
    if every:
        l7_kinds = ("http", "kafka", "dns") if side == "to" else ("http", "kafka")
    rule: dict[str, Any] = {side + kind: draw(_lists(inside[kind], 0 if kind == "Endpoints" else 1))} if kind else {}
    what = draw(st.integers(0, 3))
    if what in (1, 2):
        rule["toPorts"] = draw(_lists(to_ports(deny=deny or host, l7_kinds=l7_kinds), 1))
    elif what == 3:
        fields = st.sampled_from(({"type": 8}, {"type": 128, "family": "IPv6"}, {"type": 0, "family": "IPv4"}))
        rule["icmps"] = [{"fields": draw(_lists(fields, 1))}]
    return rule


SERVICE_PEERS = (
    {"k8sService": {"serviceName": "a", "namespace": "x"}},
    {"k8sService": {"serviceName": "db", "namespace": "x"}},
    {"k8sServiceSelector": {"selector": {"matchLabels": {"part": "front"}}}},
    {"k8sServiceSelector": {"selector": {"matchLabels": {"part": "front"}}, "namespace": "y"}},
)


@st.composite
def group_sets(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = draw(
        st.sampled_from(
            (
                {"cidrGroupRef": "lan"},
                {"cidrGroupRef": "out"},
                {"cidrGroupRef": "absent"},
                {"cidrGroupSelector": {"matchLabels": {"tier": "inner"}}},
            )
        )
    )
    excepts = draw(_lists(st.sampled_from(("10.1.0.0/16", "10.1.2.0/24"))))
    return {**found, "except": excepts} if excepts else dict(found)


@st.composite
def cilium_specs(draw: st.DrawFn, *, every: bool, clusterwide: bool) -> dict[str, Any]:
    host = every and clusterwide and draw(st.integers(0, 3)) == 0
    spec: dict[str, Any] = {"endpointSelector": draw(LABELS)}
    if host:
        spec = {
            "nodeSelector": draw(
                st.sampled_from(({}, {"matchLabels": {"role": "worker"}}, {"matchLabels": {"role": "x"}}))
            )
        }
    sections = draw(st.sets(st.sampled_from(("ingress", "egress", "ingressDeny", "egressDeny")), min_size=1))
    for section in sorted(sections):
        deny = section.endswith("Deny")
        side = "from" if section.startswith("ingress") else "to"
        spec[section] = draw(_lists(cilium_rules(side, deny=deny, every=every, host=host)))
    if draw(st.integers(0, 3)) == 0:
        spec["enableDefaultDeny"] = {draw(st.sampled_from(("ingress", "egress"))): draw(st.booleans())}
    return spec


NATIVE_PEER = st.one_of(
    st.fixed_dictionaries({"podSelector": LABELS}),
    st.fixed_dictionaries(
        {"namespaceSelector": st.sampled_from(({}, {"matchLabels": {"team": "team-x"}}))},
        optional={"podSelector": LABELS},
    ),
    st.fixed_dictionaries({"ipBlock": cidr_sets()}),
)


@st.composite
def native_ports(draw: st.DrawFn) -> dict[str, Any]:
    protocol = draw(st.sampled_from(("TCP", "UDP", None)))
    found: dict[str, Any] = {"protocol": protocol} if protocol else {}
    which = draw(st.integers(0, 3))
    if which == 1:
        found["port"] = "web"
    elif which:
        found["port"] = draw(st.sampled_from(PORTS))
        if which == 3:
            found["endPort"] = draw(st.sampled_from([one for one in PORTS if one >= found["port"]]))
    return found


@st.composite
def native_specs(draw: st.DrawFn) -> dict[str, Any]:
    spec: dict[str, Any] = {"podSelector": draw(LABELS)}
    for section, side in (("ingress", "from"), ("egress", "to")):
        rule = st.fixed_dictionaries({}, optional={side: _lists(NATIVE_PEER), "ports": _lists(native_ports())})
        if draw(st.booleans()):
            spec[section] = draw(_lists(rule))
    if draw(st.booleans()):
        spec["policyTypes"] = draw(st.lists(st.sampled_from(("Ingress", "Egress")), min_size=1, unique=True))
    return spec


@st.composite
def cluster_specs(draw: st.DrawFn, priority: int) -> dict[str, Any]:
    spaces = st.sampled_from(({}, {"matchLabels": {"team": "team-x"}}))
    pods = st.fixed_dictionaries({"podSelector": LABELS}, optional={"namespaceSelector": spaces})
    inner = st.one_of(spaces.map(lambda one: {"namespaces": one}), pods.map(lambda one: {"pods": one}))
    outer = st.one_of(
        st.lists(st.sampled_from(CIDRS), min_size=1, max_size=2, unique=True).map(lambda one: {"networks": one}),
        st.sampled_from(({}, {"matchLabels": {"role": "edge"}})).map(lambda one: {"nodes": one}),
    )
    names = st.sampled_from((["api.example.com"], ["*.example.org"])).map(lambda one: {"domainNames": one})
    spec: dict[str, Any] = {
        "tier": draw(st.sampled_from(("Admin", "Baseline"))),
        "priority": priority,
        "subject": draw(inner),
    }
    for section, side in (("ingress", "from"), ("egress", "to")):
        rules = []
        for _ in range(draw(st.integers(0, 3))):
            action = draw(st.sampled_from(("Accept", "Deny", "Pass")))
            to = st.one_of(inner, outer, names) if action == "Accept" else st.one_of(inner, outer)
            rule: dict[str, Any] = {"action": action, side: draw(_lists(inner if side == "from" else to, 1))}
            if draw(st.booleans()):
                outside = any(one.keys() & {"networks", "nodes", "domainNames"} for one in rule[side])
                rule["protocols"] = draw(_lists(cluster_protocols(named=not outside), 1))
            rules.append(rule)
        if rules:
            spec[section] = rules
    return spec


@st.composite
def cluster_protocols(draw: st.DrawFn, *, named: bool) -> dict[str, Any]:
    if named and draw(st.integers(0, 3)) == 0:
        return {"destinationNamedPort": draw(st.sampled_from(("web", "dns")))}
    port = draw(
        st.one_of(
            st.none(),
            st.sampled_from(PORTS).map(lambda one: {"number": one}),
            st.sampled_from(((80, 443), (443, 9000), (8080, 8081))).map(
                lambda r: {"range": {"start": r[0], "end": r[1]}}
            ),
        )
    )
    return {draw(st.sampled_from(("tcp", "udp", "sctp"))): {} if port is None else {"destinationPort": port}}


@st.composite
def documents(draw: st.DrawFn, *, every: bool = False) -> list[dict[str, Any]]:
    """A handful of policies of all kinds. ``every``: also with peers and tiers that the older kinds do not have."""
    kinds = ["NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"]
    kinds += ["ClusterNetworkPolicy"] if every else []
    found = []
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(kinds))
        metadata = {"name": f"p{index}"}
        if not kind.startswith(("Cluster", "CiliumCluster")):
            metadata["namespace"] = draw(st.sampled_from(SPACES))
        match kind:
            case "NetworkPolicy":
                spec, version = draw(native_specs()), "networking.k8s.io/v1"
            case "ClusterNetworkPolicy":
                spec, version = (
                    draw(cluster_specs(draw(st.integers(0, 9)) * 10 + index)),
                    "policy.networking.k8s.io/v1alpha2",
                )
            case _:
                clusterwide = kind != "CiliumNetworkPolicy"
                spec, version = draw(cilium_specs(every=every, clusterwide=clusterwide)), "cilium.io/v2"
        found.append({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
    return found
