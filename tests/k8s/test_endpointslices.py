"""The EndpointSlice controller: which pods are endpoints of a Service, under which conditions, and in which slice."""

import random

import pytest

from ciliate.k8s.endpointslices import HEADLESS, MANAGED_BY, MOST, PodState, endpoint_slices, is_managed

ZONES = {"n1": "a", "n2": "b"}


def service(ports=({"port": 80},), families=("IPv4",), **spec):
    spec = {"selector": {"app": "web"}, "ports": list(ports), "ipFamilies": list(families), **spec}
    return {
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default", "labels": {"team": "x"}},
        "spec": spec,
    }


def pod(number, **changes):
    values = {
        "namespace": "default",
        "name": f"web-{number}",
        "labels": {"app": "web"},
        "addresses": (f"10.{number // 250}.0.{number % 250}", f"fd00::{number:x}"),
        "node": f"n{number % 2 + 1}",
    }
    return PodState(**values | changes)


def named(number, port, protocol="TCP"):
    ports = [{"name": "http", "containerPort": port, "protocol": protocol}]
    return pod(number, spec={"containers": [{"name": "main", "ports": ports}]})


def made(service, *pods, existing=()):
    return list(endpoint_slices(service, pods, ZONES, existing).values())


def conditions(slices):
    return {
        one["addresses"][0]: tuple(name for name, on in one["conditions"].items() if on)
        for raw in slices
        for one in raw["endpoints"]
    }


def test_a_slice_says_address_node_zone_and_pod():
    (one,) = made(service(), pod(1))
    assert one["endpoints"] == [
        {
            "addresses": ["10.0.0.1"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {"kind": "Pod", "namespace": "default", "name": "web-1"},
            "nodeName": "n2",
            "zone": "b",
        }
    ]
    assert one["ports"] == [{"name": "", "port": 80, "protocol": "TCP"}]
    assert one["addressType"] == "IPv4"
    assert one["metadata"]["labels"] == {
        "team": "x",
        "kubernetes.io/service-name": "web",
        MANAGED_BY: "endpointslice-controller.k8s.io",
    }
    assert is_managed(one)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ("ready", "serving")),
        ({"ready": False}, ()),
        ({"terminating": True}, ("serving", "terminating")),
        ({"ready": False, "terminating": True}, ("terminating",)),
    ],
)
def test_conditions_follow_readiness_and_termination(changes, wanted):
    assert conditions(made(service(), pod(1, **changes))) == {"10.0.0.1": wanted}


def test_a_service_that_publishes_all_has_endpoints_ready_whatever_they_are():
    slices = made(service(publishNotReadyAddresses=True), pod(1, ready=False), pod(2, terminating=True))
    assert conditions(slices) == {"10.0.0.1": ("ready",), "10.0.0.2": ("ready", "serving", "terminating")}


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"app": "other"}},
        {"labels": {}},
        {"namespace": "other"},
        {"phase": "Failed"},
        {"phase": "Succeeded"},
        {"addresses": ()},
        {"addresses": ("fd00::1",)},
    ],
)
def test_a_pod_is_no_endpoint_when_it_is_not_selected_has_ended_or_lacks_the_family(changes):
    (one,) = made(service(), pod(1, **changes))
    assert (one["endpoints"], one["ports"]) == ([], [])


@pytest.mark.parametrize("spec", [{"selector": {}}, {"selector": None}, {"type": "ExternalName"}])
def test_there_are_no_slices_when_others_write_them(spec):
    assert made(service(**spec), pod(1)) == []


def test_each_family_has_its_slice():
    slices = made(service(families=("IPv6", "IPv4")), pod(1))
    assert [one["addressType"] for one in slices] == ["IPv6", "IPv4"]
    assert conditions(slices) == {"fd00::1": ("ready", "serving"), "10.0.0.1": ("ready", "serving")}
    assert len({one["metadata"]["name"] for one in slices}) == 2


def test_named_ports_are_the_pods_own():
    ports = [{"name": "web", "port": 80, "targetPort": "http", "appProtocol": "h2c"}, {"name": "plain", "port": 81}]
    slices = made(service(ports), named(1, 8080), named(2, 9090), named(3, 8080), named(4, 53, "UDP"))
    found = {
        tuple(port["port"] for port in one["ports"]): {e["targetRef"]["name"] for e in one["endpoints"]}
        for one in slices
    }
    assert found == {(81, 8080): {"web-1", "web-3"}, (81, 9090): {"web-2"}, (81,): {"web-4"}}
    assert {"name": "web", "port": 8080, "protocol": "TCP", "appProtocol": "h2c"} in slices[-1]["ports"] + slices[0][
        "ports"
    ] + slices[1]["ports"]


@pytest.mark.parametrize(
    ("distribution", "wanted"),
    [
        ("", None),
        ("PreferClose", {"forZones": [{"name": "b"}]}),
        ("PreferSameZone", {"forZones": [{"name": "b"}]}),
        ("PreferSameNode", {"forZones": [{"name": "b"}], "forNodes": [{"name": "n2"}]}),
    ],
)
def test_hints_follow_the_traffic_distribution(distribution, wanted):
    (one,) = made(service(trafficDistribution=distribution), pod(1))
    assert one["endpoints"][0].get("hints") == wanted


def test_only_ready_endpoints_have_hints():
    (one,) = made(service(trafficDistribution="PreferSameNode"), pod(1, ready=False), pod(2, terminating=True))
    assert not any("hints" in endpoint for endpoint in one["endpoints"])


def test_a_zone_that_is_not_known_gives_no_hint():
    (one,) = made(service(trafficDistribution="PreferSameZone"), pod(1, node="n9"))
    assert "hints" not in one["endpoints"][0] and "zone" not in one["endpoints"][0]


def test_a_headless_service_without_ports_has_endpoints():
    (one,) = made(service((), clusterIP="None"), pod(1))
    assert one["endpoints"] and one["ports"] == []
    assert one["metadata"]["labels"][HEADLESS] == ""


def test_slices_are_the_same_when_pods_come_in_any_order():
    pods = [named(number, 8000 + number % 2) for number in range(1, 30)]
    ports = [{"port": 80, "targetPort": "http"}]
    wanted = endpoint_slices(service(ports), pods, ZONES)
    for seed in range(5):
        random.Random(seed).shuffle(pods)
        assert endpoint_slices(service(ports), pods, ZONES) == wanted


def test_endpoints_stay_in_their_slices_when_others_come_and_go():
    generator = random.Random(4)
    pods = {number: pod(number) for number in range(1, 251)}
    slices = made(service(), *pods.values())
    assert [len(one["endpoints"]) for one in slices] == [MOST, MOST, 50]
    for _ in range(20):
        where = {e["addresses"][0]: raw["metadata"]["name"] for raw in slices for e in raw["endpoints"]}
        for number in generator.sample(sorted(pods), 40):
            del pods[number]
        for number in generator.sample(range(1, 2000), 40):
            pods.setdefault(number, pod(number))
        slices = made(service(), *pods.values(), existing=slices)
        now = {e["addresses"][0]: raw["metadata"]["name"] for raw in slices for e in raw["endpoints"]}
        assert set(now) == {one.addresses[0] for one in pods.values()}
        assert all(now[address] == name for address, name in where.items() if address in now)
        assert all(0 < len(one["endpoints"]) <= MOST for one in slices)
        assert len({one["metadata"]["name"] for one in slices}) == len(slices)


def test_nothing_changes_when_it_runs_again():
    first = endpoint_slices(service(), [pod(number) for number in range(1, 150)], ZONES)
    again = endpoint_slices(service(), [pod(number) for number in range(1, 150)], ZONES, first.values())
    assert again == first


def test_the_empty_slice_is_used_when_the_first_pod_comes():
    empty = made(service())
    (one,) = made(service(), pod(1), existing=empty)
    assert len(one["endpoints"]) == 1
