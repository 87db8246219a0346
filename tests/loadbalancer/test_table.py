"""The table changes step by step: it never differs from one that was made at once of what there is."""

import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.loadbalancer.model import (
    SCTP,
    TCP,
    UDP,
    Address,
    Endpoint,
    EndpointSlice,
    HostPort,
    LocalNode,
    Owner,
    PodPorts,
    Service,
    ServicePort,
    ServiceType,
    TrafficPolicy,
)
from ciliate.loadbalancer.redirect import LocalRedirectPolicy, RedirectPort
from ciliate.loadbalancer.table import LoadBalancer
from tests.loadbalancer.casebook import Object, Watched

# Few names, addresses and ports, so that objects meet.
ADDRESSES: tuple[Address, ...] = tuple(map(ip_address, ("10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2")))
PORTS = (80, 81)
NAMES = ("x", "y", "z")
NAMESPACES = ("n", "m")
STAMPS = ("", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")
addresses = st.lists(st.sampled_from(ADDRESSES), max_size=2, unique=True).map(tuple)
protocols = st.sampled_from((TCP, UDP, SCTP))

service_ports = st.builds(
    ServicePort,
    name=st.sampled_from(("a", "b")),
    protocol=protocols,
    port=st.sampled_from(PORTS),
    target=st.sampled_from((0, 80, "a")),
    node_port=st.sampled_from((0, 30080, 30081)),
)
services = st.builds(
    Service,
    namespace=st.sampled_from(NAMESPACES),
    name=st.sampled_from(NAMES),
    type=st.sampled_from(ServiceType),
    headless=st.sampled_from((False, False, False, True)),
    cluster_ips=addresses,
    external_ips=addresses,
    ingress_ips=addresses,
    ports=st.lists(service_ports, max_size=2).map(tuple),
    created=st.sampled_from(STAMPS),
    labels=st.sampled_from(({}, {}, {"service.kubernetes.io/service-proxy-name": "mesh"})),
    annotations=st.sampled_from(
        (
            {},
            {"service.cilium.io/type": "LoadBalancer"},
            {"service.cilium.io/node": "beefy"},
            {"service.cilium.io/unheard-of": "1"},
        )
    ),
    external_policy=st.sampled_from(TrafficPolicy),
    internal_policy=st.sampled_from(TrafficPolicy),
    health_check_port=st.sampled_from((0, 32000, 32001)),
    source_ranges=st.sampled_from(((), (ip_network("10.0.0.0/8"),))),
)
endpoints = st.builds(
    Endpoint,
    address=st.sampled_from(ADDRESSES),
    ready=st.booleans(),
    serving=st.booleans(),
    terminating=st.booleans(),
    node=st.sampled_from(("here", "there")),
    for_zones=st.sampled_from((frozenset[str](), frozenset({"a"}), frozenset({"b"}))),
)
slices = st.builds(
    EndpointSlice,
    namespace=st.sampled_from(NAMESPACES),
    name=st.sampled_from(NAMES),
    service=st.sampled_from(("", *NAMES)),
    endpoints=st.lists(endpoints, max_size=3).map(tuple),
    ports=st.lists(
        st.tuples(st.sampled_from(("a", "b")), protocols, st.sampled_from(PORTS)),
        max_size=2,
        unique_by=lambda one: one[0],
    ).map(tuple),
    weight=st.sampled_from((0, 1, 2)),
)
pods = st.builds(
    PodPorts,
    namespace=st.sampled_from(NAMESPACES),
    name=st.sampled_from(NAMES),
    created=st.sampled_from(STAMPS),
    addresses=addresses,
    labels=st.sampled_from(({}, {"app": "web"})),
    host_ports=st.lists(
        st.builds(
            HostPort,
            protocol=protocols,
            host_port=st.sampled_from((80, 30080)),
            port=st.sampled_from(PORTS),
            address=st.sampled_from((None, *ADDRESSES)),
        ),
        max_size=2,
    ).map(tuple),
    ready=st.booleans(),
)
redirects = st.builds(
    LocalRedirectPolicy,
    namespace=st.sampled_from(NAMESPACES),
    name=st.sampled_from(NAMES),
    created=st.sampled_from(STAMPS),
    address=st.none(),
    service=st.sampled_from(NAMES),
    frontend_ports=st.sampled_from(((), (RedirectPort(port=80),))),
    backend_selector=st.just(
        Selector(requirements=(Requirement(key="k8s:app", operator=Operator.IN, values=("web",)),))
    ),
    backend_ports=st.just((RedirectPort(port=8080),)),
    skip_from_backend=st.booleans(),
)
address_redirects = st.builds(
    replace,
    redirects,
    address=st.sampled_from(ADDRESSES),
    service=st.just(""),
    frontend_ports=st.just((RedirectPort(port=80),)),
)
nodes = st.builds(
    LocalNode,
    name=st.just("here"),
    zone=st.sampled_from(("a", "b")),
    labels=st.sampled_from(({}, {"service.cilium.io/node": "beefy"})),
    families=st.sampled_from((frozenset({4}), frozenset({4, 6}))),
    addresses=st.sampled_from((frozenset[Address](), frozenset(ADDRESSES[:2]))),
)
objects = st.one_of(services, slices, pods, redirects, address_redirects)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), objects),
        st.tuples(st.just("remove"), objects),
        st.tuples(st.just("node"), nodes),
    ),
    max_size=40,
)


def key_of(one: Object) -> tuple[type, str, str]:
    return type(one), one.namespace, one.name


@settings(max_examples=400, deadline=None)
@given(steps=steps, seed=st.integers(0, 99))
def test_is_what_the_objects_make_it_whatever_was_before(
    steps: list[tuple[str, Object | LocalNode]], seed: int
) -> None:
    node = LocalNode(name="here", zone="a")
    there: dict[tuple[type, str, str], Object] = {}
    seen, dice = Watched(node), random.Random(seed)
    for what, one in steps:
        if isinstance(one, LocalNode):
            node = one
            seen.table.set_node(node)
        elif what == "set":
            there[key_of(one)] = one
            seen.add(one)
        else:
            there.pop(key_of(one), None)
            seen.remove(one)
        if dice.random() < 0.7:
            seen.collect()
    seen.collect()
    anew = Watched(node)
    for one in dice.sample(list(there.values()), len(there)):
        anew.add(one)
    assert seen.state() == anew.collect().state()
    for one in there.values():
        seen.remove(one)
    assert seen.collect().state() == ({}, {}, {})
    assert seen.table.idle


def many(count: int) -> Iterator[tuple[Service, EndpointSlice]]:
    for number in range(count):
        namespace, name = f"ns{number % 100}", f"service-{number}"
        service = Service(
            namespace=namespace,
            name=name,
            cluster_ips=(ip_address(0x0A600000 + number),),
            ports=(ServicePort(name="http", port=80, target=8080),),
        )
        pods = tuple(
            Endpoint(address=ip_address(0x0A000000 + 2 * number + one), node=f"node-{one}") for one in range(2)
        )
        yield (
            service,
            EndpointSlice(
                namespace=namespace, name=f"{name}-x", service=name, ports=(("http", TCP, 8080),), endpoints=pods
            ),
        )


@pytest.fixture(scope="module")
def loaded() -> tuple[LoadBalancer, list[tuple[Service, EndpointSlice]]]:
    everything = list(many(30000))
    table = LoadBalancer(LocalNode(name="node-0"))
    start = process_time()
    for service, one in everything:
        table.set_service(service)
        table.set_slice(one)
    assert len(table.changes()) == len(everything)
    # 1.5 s on the slowest machine seen; more than twice that is another complexity.
    assert process_time() - start < 5
    return table, everything


def test_costs_what_one_service_costs_when_one_of_many_changes(
    loaded: tuple[LoadBalancer, list[tuple[Service, EndpointSlice]]],
) -> None:
    table, everything = loaded
    spent = []
    for service, one in everything[:301]:
        start = process_time()
        table.set_slice(replace(one, endpoints=one.endpoints[:1]))
        changes = table.changes()
        spent.append(process_time() - start)
        assert list(changes) == [service.owner]
    assert sorted(spent)[150] < 0.001


def test_tells_addresses_of_nodes_to_those_services_only_that_have_them() -> None:
    table = LoadBalancer(LocalNode(name="here"))
    for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
        table.set_service(
            Service(
                namespace="n",
                name=name,
                type=ServiceType.LOAD_BALANCER,
                ports=(ServicePort(port=80),),
                ingress_ips=(ip_address(address),),
            )
        )
    table.changes()
    table.set_node(LocalNode(name="here", addresses=frozenset({ip_address("192.0.2.1"), ip_address("192.0.2.9")})))
    changes = table.changes()
    assert list(changes) == [Owner("Service", "n", "a")]
    assert all(one.at.port for one in changes[Owner("Service", "n", "a")])


def test_moves_endpoints_when_a_slice_changes_its_service() -> None:
    table = LoadBalancer(LocalNode(name="here"))
    for name, number in (("a", 1), ("b", 2)):
        address = ip_address(f"10.96.0.{number}")
        table.set_service(Service(namespace="n", name=name, cluster_ips=(address,), ports=(ServicePort(port=80),)))
    pods = (Endpoint(address=ip_address("10.0.0.1")),)
    table.set_slice(EndpointSlice(namespace="n", name="s", service="a", endpoints=pods, ports=(("", TCP, 80),)))
    assert sum(len(one.backends) for told in table.changes().values() for one in told) == 1
    table.set_slice(EndpointSlice(namespace="n", name="s", service="b", endpoints=pods, ports=(("", TCP, 80),)))
    told = table.changes()
    assert [len(one.backends) for one in told[Owner("Service", "n", "a")] if one.at.port] == [0]
    assert [len(one.backends) for one in told[Owner("Service", "n", "b")] if one.at.port] == [1]


def test_names_one_service_for_a_health_check_port_that_two_have() -> None:
    table = LoadBalancer(LocalNode(name="here"))
    for name in ("b", "a"):
        table.set_service(
            Service(
                namespace="n",
                name=name,
                type=ServiceType.LOAD_BALANCER,
                external_policy=TrafficPolicy.LOCAL,
                health_check_port=32000,
            )
        )
    table.changes()
    assert table.health()[32000].owner.name == "a"
    assert table.problems() == {
        Owner("Service", "n", "b"): ("healthCheckNodePort 32000: Service n/a answers on it",),
    }
    table.remove_service(("n", "a"))
    table.changes()
    assert table.health()[32000].owner.name == "b"
    assert table.problems() == {}
    table.remove_service(("n", "b"))
    table.changes()
    assert table.idle


def test_removes_what_is_not_there_without_a_word() -> None:
    table = LoadBalancer(LocalNode(name="here"))
    table.remove_service(("n", "a"))
    table.remove_slice("n", "a")
    table.remove_pod("n", "a")
    table.remove_redirect("n", "a")
    assert not table.changes() and table.idle
