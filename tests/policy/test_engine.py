"""What the engine says of a peer's port: one table for each kind of rule."""

from ipaddress import ip_network

import pytest

from ciliate.identity.labels import cidr_labels, k8s
from ciliate.identity.numbers import IdentityId, Reserved
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Members
from ciliate.policy.l7 import L7, DnsRule, L7Protocol, Listener, TlsContext
from ciliate.policy.rules import (
    Action,
    CidrGroup,
    CidrGroupPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    PolicyObject,
    PortSpec,
    Rule,
    ServiceFacts,
    ServicePeer,
    Tier,
)
from tests.policy.build import (
    EGRESS,
    INGRESS,
    MESH,
    NET,
    NODE,
    OTHER_NET,
    SELF,
    UNKNOWN,
    A,
    B,
    C,
    app,
    engine_with,
    http,
    named,
    need,
    net,
    pod,
    policy,
    rule,
    tcp,
    verdict,
)

HOST, WORLD = IdentityId(Reserved.HOST), IdentityId(Reserved.WORLD)
ALLOW, DENY, PASS = Action.ALLOW, Action.DENY, Action.PASS


def admin(order: int, action: Action, *peers: object, ports: tuple[PortSpec, ...] = ()) -> Rule:
    return rule(*ports, peers=peers or None, action=action, tier=Tier.ADMIN, order=(order, 0))  # type: ignore[arg-type]


def baseline(order: int, action: Action, *peers: object) -> Rule:
    return rule(peers=peers or None, action=action, tier=Tier.BASELINE, order=(order, 0))  # type: ignore[arg-type]


# ---- tiers --------------------------------------------------------------------------------------------------

TIERS: list[tuple[str, list[PolicyObject], dict[IdentityId, str]]] = [
    ("nothing selects", [], {A: "allow", B: "allow", UNKNOWN: "allow"}),
    (
        "an admin deny beats a normal allow",
        [policy("n", rule(peers=[app("a"), app("b")])), policy("t", admin(5, DENY, app("a")))],
        {A: "deny", B: "allow", C: "default deny", UNKNOWN: "deny"},
    ),
    (
        "an admin allow beats a normal deny",
        [policy("n", rule(action=DENY)), policy("t", admin(5, ALLOW, app("a")))],
        {A: "allow", B: "deny", UNKNOWN: "deny", HOST: "deny"},
    ),
    (
        "the lower order decides, whichever object it is in",
        [policy("t", admin(7, ALLOW, app("a"))), policy("u", admin(3, DENY, app("a"), app("b")))],
        {A: "deny", B: "deny", C: "allow", UNKNOWN: "deny"},
    ),
    (
        "equal order: deny",
        [policy("t", admin(3, ALLOW, app("a"))), policy("u", admin(3, DENY, app("a")))],
        {A: "deny", B: "allow"},
    ),
    (
        "pass leaves the decision to the normal tier",
        [policy("t", admin(1, PASS, app("a")), admin(2, DENY)), policy("n", rule(peers=[app("a")]))],
        {A: "allow", B: "deny", UNKNOWN: "deny"},
    ),
    (
        "pass, and nothing allows: default deny, though the scope's default allows",
        [policy("t", admin(1, PASS, app("a")), admin(2, ALLOW)), policy("n", rule(peers=[app("b")]))],
        {A: "default deny", B: "allow", C: "allow", UNKNOWN: "default deny", WORLD: "allow"},
    ),
    (
        "default deny ends before baseline",
        [policy("b", baseline(1, ALLOW, app("a"))), policy("n", rule(peers=[app("b")]))],
        {A: "default deny", B: "allow", UNKNOWN: "default deny"},
    ),
    (
        "without default deny baseline is asked, then all is allowed",
        [policy("b", baseline(1, ALLOW, app("a")), baseline(2, DENY, app("a"), app("b")))],
        {A: "allow", B: "deny", C: "allow", UNKNOWN: "deny", HOST: "allow"},
    ),
    (
        "a normal allow without default deny spares from baseline",
        [policy("b", baseline(1, DENY)), policy("n", rule(peers=[app("a")]), deny=())],
        {A: "allow", B: "deny", HOST: "deny"},
    ),
    (
        "admin rules impose no default deny",
        [policy("t", admin(1, DENY, app("a")))],
        {A: "deny", B: "allow", UNKNOWN: "deny", MESH: "allow"},
    ),
    (
        "the host is allowed where default deny would end it, and no further",
        [policy("n", rule(peers=[app("a")])), policy("t", admin(1, DENY, EntityPeer(name="remote-node")))],
        {HOST: "allow", IdentityId(Reserved.REMOTE_NODE): "deny", NODE: "deny", A: "allow"},
    ),
]


@pytest.mark.parametrize(("objects", "wanted"), [one[1:] for one in TIERS], ids=[one[0] for one in TIERS])
def test_tiers(objects: list[PolicyObject], wanted: dict[IdentityId, str]) -> None:
    assert {identity: verdict(engine_with(*objects), identity, 80) for identity in wanted} == wanted
    assert {identity: verdict(engine_with(*objects[::-1]), identity, 80) for identity in wanted} == wanted


def test_pass_on_one_port_takes_away_only_there() -> None:
    engine = engine_with(
        policy("t", admin(1, PASS, app("a"), ports=(tcp(80),)), admin(2, ALLOW)), policy("n", rule(peers=[app("b")]))
    )
    assert [verdict(engine, A, port) for port in (79, 80, 81)] == ["allow", "default deny", "allow"]
    assert [verdict(engine, UNKNOWN, port) for port in (79, 80, 81)] == ["allow", "default deny", "allow"]


def test_a_default_deny_that_takes_away_names_who_imposes_it() -> None:
    engine = engine_with(policy("t", admin(1, PASS, app("a")), admin(2, ALLOW)), policy("n", rule(peers=[app("b")])))
    image = engine.resolve(SELF)[INGRESS]
    assert image is not None
    row = image.lookup(A, engine.identities.scope(A), 6, 80)
    assert row is not None and row.rules == image.default_rules and row.rules[0].name == "n"


# ---- L7 -----------------------------------------------------------------------------------------------------

DNS = L7(protocol=L7Protocol.DNS, rules=(DnsRule(name="example.com"),))
TLS = L7(protocol=L7Protocol.TLS, server_names=("a.example",))
CONTEXT = TlsContext(namespace="x", name="one")
GET = rule(tcp(80, l7=http("GET")))
L7_TABLE: list[tuple[str, list[Rule], dict[int, str], int]] = [
    ("rules of one protocol add up", [GET, rule(tcp(80, l7=http("PUT")))], {80: "http/GET/PUT"}, 0),
    ("L4 only: the redirect stays, all is allowed", [GET, rule(tcp(80))], {80: "http/GET/*"}, 0),
    ("L3 only: so does it", [GET, rule()], {80: "http/GET/*", 81: "allow"}, 0),
    ("deny wins", [GET, rule(tcp(80), action=DENY)], {80: "deny"}, 0),
    ("of other peers only", [GET, rule(tcp(80), peers=[app("b")])], {80: "http/GET"}, 0),
    (
        "different protocols on one port are denied and reported",
        [rule(tcp(53, l7=http("GET"))), rule(tcp(53, 54, l7=DNS))],
        {53: "deny", 54: "dns"},
        1,
    ),
    ("server names go with HTTP", [rule(tcp(443, l7=TLS)), rule(tcp(443, l7=http("GET")))], {443: "http/GET"}, 0),
    ("server names do not go with DNS", [rule(tcp(443, l7=TLS)), rule(tcp(443, l7=DNS))], {443: "deny"}, 1),
    (
        "two TLS contexts cannot both end the connection",
        [
            rule(tcp(443, l7=http("GET", terminating=CONTEXT))),
            rule(tcp(443, l7=http("GET", terminating=TlsContext(namespace="x", name="two")))),
        ],
        {443: "deny"},
        1,
    ),
    (
        "an admin redirect lets nothing else pass",
        [admin(1, ALLOW, ports=(tcp(80, l7=http("GET")),)), rule()],
        {80: "http/GET"},
        0,
    ),
]


@pytest.mark.parametrize(
    ("rules", "wanted", "problems"), [one[1:] for one in L7_TABLE], ids=[one[0] for one in L7_TABLE]
)
def test_l7_rules_merge(rules: list[Rule], wanted: dict[int, str], problems: int) -> None:
    engine = engine_with(*(policy(f"p{index}", one) for index, one in enumerate(rules)))
    assert {port: verdict(engine, A, port) for port in wanted} == wanted
    assert len(engine.problems()) == problems
    for one in engine.problems():
        assert "CiliumNetworkPolicy x/p0 and CiliumNetworkPolicy x/p1" in one
    assert verdict(engine, HOST, 81) == "allow"


def test_without_default_deny_what_the_redirect_does_not_ask_for_goes_on() -> None:
    assert verdict(engine_with(policy("n", rule(tcp(80, l7=http("GET"))), deny=())), A, 80) == "http/GET/*"
    closed = engine_with(policy("n", rule(tcp(80, l7=http("GET"))), deny=()), policy("b", baseline(1, DENY)))
    assert verdict(closed, A, 80) == "http/GET"


def test_names_of_servers_add_up_unless_a_rule_names_none() -> None:
    other = L7(protocol=L7Protocol.TLS, server_names=("b.example",))
    engine = engine_with(policy("p", rule(tcp(443, l7=TLS)), rule(tcp(443, l7=other))))
    image = engine.resolve(SELF)[INGRESS]
    assert image is not None
    row = image.lookup(A, engine.identities.scope(A), 6, 443)
    assert row is not None and row.ruleset is not None
    assert row.ruleset.server_names == ("a.example", "b.example")


def test_the_listener_of_the_first_priority_serves() -> None:
    def custom(name: str, priority: int) -> L7:
        listener = Listener(kind="CiliumEnvoyConfig", config="c", name=name, priority=priority)
        return L7(protocol=L7Protocol.CUSTOM, listener=listener)

    engine = engine_with(policy("p", rule(tcp(80, l7=custom("late", 0))), rule(tcp(80, l7=custom("early", 7)))))
    image = engine.resolve(SELF)[INGRESS]
    row = image.lookup(A, engine.identities.scope(A), 6, 80) if image else None
    assert row is not None and row.ruleset is not None and row.ruleset.listener is not None
    assert row.ruleset.listener.name == "early"


def test_an_unknown_identity_gets_no_plain_access_where_an_admin_rule_may_ask_for_more() -> None:
    engine = engine_with(policy("t", admin(1, ALLOW, app("a"), ports=(tcp(80, l7=http("GET")),)), admin(2, ALLOW)))
    assert [verdict(engine, one, 80) for one in (A, B, UNKNOWN)] == ["http/GET", "allow", "deny"]
    assert verdict(engine, UNKNOWN, 81) == "allow"


# ---- named ports --------------------------------------------------------------------------------------------


def test_a_named_port_is_each_endpoints_own_when_two_pods_of_one_identity_differ() -> None:
    engine = engine_with(policy("p", rule(named("http"))), policy("e", rule(named("http"), direction=EGRESS)))
    first, second = frozenset({("http", 6, 8080)}), frozenset({("http", 6, 9090), ("http", 17, 9090)})
    for _ in range(2):
        assert [verdict(engine, A, port, ports=first) for port in (8080, 9090)] == ["allow", "default deny"]
        assert [verdict(engine, A, port, ports=second) for port in (8080, 9090)] == ["default deny", "allow"]
    engine.set_named_ports(B, first | second)
    assert [verdict(engine, B, port, direction=EGRESS) for port in (8080, 9090)] == ["allow", "allow"]
    assert [verdict(engine, A, port, direction=EGRESS) for port in (8080, 9090)] == ["default deny", "default deny"]
    engine.set_named_ports(B, second)
    assert [verdict(engine, B, port, direction=EGRESS) for port in (8080, 9090)] == ["default deny", "allow"]


def test_ports_said_before_their_identity_is_known_count_when_it_comes() -> None:
    engine = engine_with(policy("e", rule(named("http"), peers=[app("d")], direction=EGRESS)))
    number = IdentityId(400)
    engine.set_named_ports(number, frozenset({("http", 6, 8080)}))
    assert verdict(engine, number, 8080, direction=EGRESS) == "default deny"
    engine.identities.add(number, pod("d"))
    assert verdict(engine, number, 8080, direction=EGRESS) == "allow"
    engine.identities.add(number, pod("e"))
    assert verdict(engine, number, 8080, direction=EGRESS) == "default deny"


def test_a_denied_name_may_be_any_port_of_an_unknown_identity() -> None:
    everybody = rule(peers=[EntityPeer(name="all")], direction=EGRESS)
    engine = engine_with(policy("e", everybody, rule(named("db"), action=DENY, direction=EGRESS)))
    engine.set_named_ports(A, frozenset({("db", 6, 5432)}))
    assert [verdict(engine, A, port, direction=EGRESS) for port in (5432, 80)] == ["deny", "allow"]
    assert verdict(engine, UNKNOWN, 80, direction=EGRESS) == "deny"
    assert verdict(engine, UNKNOWN, 80, direction=EGRESS, protocol=17) == "allow"


# ---- peers --------------------------------------------------------------------------------------------------


def to(*peers: object) -> PolicyObject:
    return policy("e", rule(peers=peers, direction=EGRESS))  # type: ignore[arg-type]


def allowed(engine: PolicyEngine, *identities: IdentityId) -> list[bool]:
    return [verdict(engine, one, 80, direction=EGRESS) == "allow" for one in identities]


def test_a_cidr_group_means_its_networks_as_they_change() -> None:
    engine = engine_with(to(CidrGroupPeer(name="g", excepts=(ip_network("10.1.0.0/16"),))))
    assert allowed(engine, NET, OTHER_NET) == [False, False]
    assert engine.required_networks() == {ip_network("10.1.0.0/16")}
    engine.set_cidr_group(CidrGroup(name="g", labels=frozenset(), networks=(ip_network("10.0.0.0/8"),)))
    assert allowed(engine, NET, OTHER_NET, A, WORLD) == [True, False, False, False]
    assert engine.required_networks() == {ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16")}
    engine.remove_cidr_group("g")
    assert allowed(engine, NET, OTHER_NET) == [False, False]


def test_cidr_groups_are_selected_by_label() -> None:
    engine = engine_with(to(CidrGroupPeer(selector=need(team="one"))))
    group = CidrGroup(name="g", labels=frozenset({k8s("team", "one")}), networks=(ip_network("10.1.0.0/16"),))
    engine.set_cidr_group(group)
    assert allowed(engine, NET, OTHER_NET) == [False, True]
    engine.set_cidr_group(CidrGroup(name="g", labels=frozenset({k8s("team", "two")}), networks=group.networks))
    assert allowed(engine, NET, OTHER_NET) == [False, False]
    assert not engine.required_networks()


def test_subtraction_is_of_one_rule_only() -> None:
    engine = engine_with(to(net("10.0.0.0/8", "10.1.0.0/16")))
    assert allowed(engine, NET, OTHER_NET) == [True, False]
    both = engine_with(to(net("10.0.0.0/8", "10.1.0.0/16"), net("10.1.0.0/16")))
    assert allowed(both, NET, OTHER_NET) == [True, True]


def test_all_addresses_of_an_ip_version_are_the_world_without_pods_and_nodes() -> None:
    v4, v6 = IdentityId(Reserved.WORLD_IPV4), IdentityId(Reserved.WORLD_IPV6)
    engine = engine_with(to(net("0.0.0.0/0", "10.1.0.0/16")))
    assert allowed(engine, WORLD, v4, v6, NET, OTHER_NET) == [True, True, False, True, False]
    assert allowed(engine, A, MESH, NODE, HOST) == [False] * 4
    six = engine_with(to(net("::/0")))
    assert allowed(six, WORLD, v4, v6, NET, A) == [True, False, True, False, False]


def test_a_service_with_a_selector_means_its_pods_and_one_without_its_addresses() -> None:
    engine = engine_with(to(ServicePeer(namespace="x", name="pods"), ServicePeer(namespace="", selector=need(of="us"))))
    assert allowed(engine, A, NET) == [False, False]
    engine.set_service(ServiceFacts(namespace="x", name="pods", labels=frozenset(), selector={"app": "a"}))
    engine.set_service(
        ServiceFacts(
            namespace="y",
            name="outside",
            labels=frozenset({k8s("of", "us")}),
            selector={},
            addresses=(ip_network("10.1.0.0/16"),),
        )
    )
    assert allowed(engine, A, B, MESH, NET, OTHER_NET) == [True, False, False, False, True]
    assert engine.required_networks() == {ip_network("10.1.0.0/16")}
    engine.set_service(ServiceFacts(namespace="x", name="pods", labels=frozenset(), selector={"app": "b"}))
    assert allowed(engine, A, B) == [False, True]
    engine.remove_service("x", "pods")
    engine.remove_service("y", "outside")
    assert allowed(engine, A, B, OTHER_NET) == [False, False, False]


def test_the_selector_of_a_service_is_about_its_namespace() -> None:
    engine = engine_with(to(ServicePeer(namespace="y", name="pods")))
    engine.set_service(ServiceFacts(namespace="y", name="pods", labels=frozenset(), selector={"app": "a"}))
    engine.identities.add(IdentityId(400), pod("a", "y"))
    assert allowed(engine, A, IdentityId(400)) == [False, True]


def test_nodes_are_told_apart_by_their_labels() -> None:
    def zone(name: str) -> Selector:
        return Selector(requirements=(Requirement(key="node:zone", operator=Operator.IN, values=(name,)),))

    engine = engine_with(to(NodePeer(selector=zone("west"))))
    assert allowed(engine, NODE, IdentityId(Reserved.REMOTE_NODE), A) == [True, False, False]
    assert allowed(engine_with(to(NodePeer(selector=zone("east")))), NODE) == [False]
    everywhere = engine_with(to(NodePeer(selector=Selector())))
    assert allowed(everywhere, NODE, IdentityId(Reserved.REMOTE_NODE), HOST, A) == [True, True, False, False]


def test_a_name_means_nothing_until_it_is_learned() -> None:
    engine = engine_with(to(FqdnPeer(name="example.com"), FqdnPeer(pattern="*.example.com")))
    number = IdentityId((1 << 24) + 9)
    assert allowed(engine, number, WORLD) == [False, False]
    engine.identities.add(number, frozenset({"fqdn:*.example.com", "reserved:world"}))
    assert allowed(engine, number, WORLD) == [True, False]
    engine.identities.add(number, frozenset({"fqdn:other.example", "reserved:world"}))
    assert allowed(engine, number) == [False]


ENTITY_TABLE = {
    "all": [A, MESH, NET, NODE, HOST, WORLD, UNKNOWN],
    "world": [NET, OTHER_NET, WORLD],
    "cluster": [A, NODE, HOST, UNKNOWN],
    "cluster-mesh": [A, MESH, NODE, HOST, UNKNOWN],
    "host": [HOST],
    "remote-node": [NODE],
    "world-ipv4": [NET, OTHER_NET, WORLD],
    "world-ipv6": [WORLD],
    "none": [],
}


@pytest.mark.parametrize("name", ENTITY_TABLE)
def test_entities(name: str) -> None:
    everybody = [A, MESH, NET, OTHER_NET, NODE, HOST, WORLD, UNKNOWN]
    engine = engine_with(to(EntityPeer(name=name)))
    wanted = ENTITY_TABLE[name] + ([OTHER_NET] if name == "all" else [])
    assert [one for one in everybody if allowed(engine, one)[0]] == [one for one in everybody if one in wanted]


def test_an_api_server_outside_the_cluster_is_told_by_its_label() -> None:
    engine = engine_with(to(EntityPeer(name="kube-apiserver")))
    number, network = IdentityId((1 << 24) + 9), ip_network("203.0.113.1/32")
    engine.identities.add(number, cidr_labels(network) | {"reserved:kube-apiserver"}, network)
    assert allowed(engine, number, IdentityId(Reserved.KUBE_APISERVER), NET) == [True, True, False]


def test_a_deny_for_labels_of_nodes_closes_to_unknown_nodes_alone() -> None:
    node = IdentityId((2 << 24) + 77)
    west = Selector(requirements=(Requirement(key="node:zone", operator=Operator.IN, values=("west",)),))
    deny = rule(peers=[NodePeer(selector=west)], action=DENY, direction=EGRESS)
    engine = engine_with(policy("e", rule(direction=EGRESS), deny))
    assert allowed(engine, NODE, node, UNKNOWN, A) == [False, False, True, True]


# ---- the node itself ----------------------------------------------------------------------------------------

NODE_LABELS = frozenset({"reserved:host", "node:zone=west"})


def test_policies_of_nodes_and_of_pods_do_not_mix() -> None:
    west = Selector(requirements=(Requirement(key="node:zone", operator=Operator.IN, values=("west",)),))
    engine = engine_with(
        policy("host", rule(tcp(22), peers=[app("a")]), selector=west, nodes=True),
        policy("pods", rule(tcp(80)), selector=Selector()),
    )
    egress, ingress = engine.resolve_host(NODE_LABELS)
    assert egress is None and ingress is not None
    assert ingress.lookup(A, engine.identities.scope(A), 6, 22) is not None
    assert ingress.lookup(A, engine.identities.scope(A), 6, 80) is None
    assert not isinstance(ingress.members, Members) or HOST not in ingress.members
    assert engine.resolve_host(frozenset({"reserved:host", "node:zone=east"})) == (None, None)
    assert engine.selecting(SELF) == [("CiliumNetworkPolicy", "x", "pods")]
    assert verdict(engine, A, 22) == "default deny"


# ---- small things -------------------------------------------------------------------------------------------


def test_the_pair_is_the_same_object_until_something_changes() -> None:
    engine = engine_with(policy("p", rule(tcp(80), peers=[app("a")])))
    pair = engine.resolve(SELF)
    engine.identities.add(IdentityId(400), pod("z"))
    assert engine.resolve(SELF) is pair
    engine.identities.add(IdentityId(401), pod("a"))
    assert engine.resolve(SELF)[INGRESS] is not pair[INGRESS]
    assert engine.resolve(SELF) is engine.resolve(SELF)


def test_all_that_share_an_image_see_it_change() -> None:
    engine = engine_with(policy("p", rule(tcp(80), peers=[app("a")])))
    who = [(SELF, frozenset({("web", 6, 1)})), (SELF, frozenset({("web", 6, 2)})), (SELF | {"k8s:more=1"}, frozenset())]
    first = [engine.resolve(*one)[INGRESS] for one in who]
    engine.identities.remove(A)
    second = [engine.resolve(*one)[INGRESS] for one in who]
    for image, before in zip(second, first, strict=True):
        assert image is second[0] is not before and image is not None and A not in image.members


def test_a_changed_rule_leaves_images_alone_that_do_not_have_it() -> None:
    one = policy("p", rule(tcp(80), peers=[app("a")]))
    other = policy("q", rule(tcp(80), peers=[app("a")]), selector=need(app="other"))
    engine = engine_with(one, other)
    kept = engine.resolve(pod("other"))
    engine.set_object(policy("p", rule(tcp(81), peers=[app("a")])))
    assert engine.resolve(pod("other")) is kept
    assert [verdict(engine, A, port) for port in (80, 81)] == ["default deny", "allow"]


def test_classes_have_rows_only_where_they_differ() -> None:
    rules = [rule(tcp(20000 + index)) for index in range(60)]
    engine = engine_with(policy("p", *rules, rule(tcp(80), peers=[app("a")])))
    image = engine.resolve(SELF)[INGRESS]
    assert image is not None
    assert [len(rows) for rows in image.defaults.values()] == [60] * 5
    assert len(image.members[A]) == 1


def test_a_rule_for_all_ports_is_one_row_beside_the_ports_that_are_open_to_anyone() -> None:
    rules = [rule(tcp(20000 + index)) for index in range(60)]
    engine = engine_with(policy("p", *rules, rule(peers=[app("a")]), rule(tcp(20001), action=DENY, peers=[app("a")])))
    image = engine.resolve(SELF)[INGRESS]
    assert image is not None
    assert [(row.key.port, row.verdict.name) for row in image.members[A]] == [(0, "ALLOW"), (20001, "DENY")]
    assert [row.rules[0].index for row in image.members[A]] == [60, 61]


def test_all_ports_but_one_are_two_rows() -> None:
    engine = engine_with(policy("p", rule(PortSpec(protocol=6)), rule(tcp(80), action=DENY)))
    image = engine.resolve(SELF)[INGRESS]
    assert image is not None
    for rows in image.defaults.values():
        assert [(row.key.bits, row.key.port, row.verdict.name) for row in rows] == [(0, 0, "ALLOW"), (16, 80, "DENY")]


def test_a_pod_peer_of_any_namespace_is_the_whole_cluster() -> None:
    anywhere = Requirement(key="k8s:io.kubernetes.pod.namespace", operator=Operator.EXISTS)
    engine = engine_with(to(LabelPeer(selector=Selector(requirements=(anywhere,)))))
    assert allowed(engine, A, UNKNOWN, MESH, WORLD) == [True, True, False, False]
