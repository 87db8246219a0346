"""Names and addresses of a lab cluster."""

from ipaddress import ip_address

import pytest

from ciliate.lab.topology import OUTSIDE_V4, SERVICES_V4, SERVICES_V6, LabError, Topology, agent_options, netns_prefix


def test_addresses_are_unique_and_apart_when_a_cluster_is_large():
    topology = Topology(cluster="big", size=200)
    nodes = topology.nodes
    taken = [one.ip for node in nodes for one in node.addresses]
    taken += [one.ip for one in (*topology.router(), *topology.router(outside=True), *topology.outside_addresses)]
    assert len(set(taken)) == len(taken)
    cidrs = [cidr for node in nodes for cidr in node.pod_cidrs]
    assert len(set(cidrs)) == 400
    assert not any(services.overlaps(one) for one in cidrs for services in (SERVICES_V4, SERVICES_V6)
                   if one.version == services.version)  # fmt: skip
    assert not any(address in cidr for address in taken for cidr in cidrs if cidr.version == address.version)


def test_pod_cidrs_follow_the_families_when_one_is_off():
    assert [c.version for c in Topology(size=1, ipv6=False).nodes[0].pod_cidrs] == [4]
    assert [c.version for c in Topology(size=1, ipv4=False).nodes[0].pod_cidrs] == [6]


def test_outside_is_no_neighbour_of_the_nodes():
    topology = Topology(size=1)
    assert not any(ip_address(str(one.ip)) in OUTSIDE_V4 for one in topology.nodes[0].addresses if one.version == 4)


def test_no_cluster_owns_the_namespaces_of_another_when_names_begin_alike():
    for one, other in (("lab", "lab-2"), ("a", "ab"), ("x", "x-fabric")):
        assert not Topology(cluster=other).fabric.startswith(netns_prefix(one))


def test_pod_namespaces_are_distinct_and_short_when_names_are_long():
    topology = Topology(cluster="lab")
    names = {topology.pod_netns("n" * 63, "p" * 200 + str(number)) for number in range(50)}
    assert len(names) == 50
    assert all(len(name) <= 100 and name.startswith(topology.prefix) for name in names)


def test_paths_of_sockets_fit_when_the_name_is_the_longest():
    assert len(str(Topology(cluster="c" * 24).socket("n200"))) < 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cluster": "Lab"}, "'Lab'"),
        ({"cluster": "a.b"}, "'a.b'"),
        ({"cluster": "../x"}, "x"),
        ({"cluster": "c" * 25}, "ccc"),
        ({"size": 0}, "0 nodes"),
        ({"size": 201}, "201 nodes"),
        ({"ipv4": False, "ipv6": False}, "IPv4 and IPv6"),
        ({"routing_mode": "bgp"}, "'bgp'"),
        ({"agent_options": (("routing-mode", "native"),)}, "agent option routing-mode"),
    ],
)
def test_error_names_the_value_when_a_topology_cannot_be(arguments, named):
    with pytest.raises(LabError, match=r".") as caught:
        Topology(**arguments)
    assert named in str(caught.value)


def test_error_names_the_nodes_when_a_node_is_unknown():
    with pytest.raises(LabError, match="n1, n2"):
        Topology().node("n3")


def test_agent_options_are_keys_and_values_and_the_last_of_a_name_counts():
    assert agent_options(["xdp=off", "map-sizes=ct=65536,nat=65536", "xdp=generic"]) == (
        ("xdp", "generic"),
        ("map-sizes", "ct=65536,nat=65536"),
    )


@pytest.mark.parametrize("text", ["", "xdp", "=off", "XDP=off", "--xdp=off", "a b=c"])
def test_error_shows_the_text_when_an_agent_option_is_none(text):
    with pytest.raises(LabError, match="KEY=VALUE") as caught:
        agent_options([text])
    assert repr(text) in str(caught.value)
