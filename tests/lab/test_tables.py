"""What ``lab get`` shows of Services: as kubectl does."""

from datetime import UTC, datetime, timedelta

import pytest

from ciliate.lab.tables import age, pool_rows, service_rows, slice_rows

NOW = datetime(2026, 1, 10, tzinfo=UTC)


def created(seconds):
    return (NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def row(status=None, **spec):
    metadata = {"name": "web", "namespace": "default", "creationTimestamp": created(7)}
    one = {"kind": "Service", "metadata": metadata, "spec": spec, "status": status or {"loadBalancer": {}}}
    columns, rows = service_rows([one], NOW, wide=True)
    return dict(zip(columns, rows[0], strict=True))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (119, "119s"), (120, "2m"), (181, "3m1s"), (600, "10m"), (3600 * 2, "120m"), (3600 * 3, "3h"),
        (3600 * 3 + 60, "3h1m"), (3600 * 9, "9h"), (3600 * 50, "2d2h"), (86400 * 9, "9d"), (86400 * 800, "2y"),
    ],
)  # fmt: skip
def test_ages_are_kubectls(seconds, text):
    assert age({"creationTimestamp": created(seconds)}, NOW) == text


def test_an_age_that_nobody_knows():
    assert age({}, NOW) == "<unknown>"


def test_a_cluster_ip_service():
    assert row(type="ClusterIP", clusterIPs=["10.96.1.1"], ports=[{"port": 80, "protocol": "TCP"}]) == {
        "namespace": "default", "name": "web", "type": "ClusterIP", "cluster-ip": "10.96.1.1",
        "external-ip": "<none>", "port(s)": "80/TCP", "age": "7s", "selector": "<none>",
    }  # fmt: skip


def test_a_node_port_service_shows_its_node_ports():
    ports = [{"port": 80, "protocol": "TCP", "nodePort": 30080}, {"port": 53, "protocol": "UDP", "nodePort": 30053}]
    found = row(type="NodePort", clusterIPs=["10.96.1.1"], ports=ports, selector={"a": "b", "c": "d"})
    assert (found["port(s)"], found["selector"]) == ("80:30080/TCP,53:30053/UDP", "a=b,c=d")


def test_a_load_balancer_waits_for_its_address():
    assert row(type="LoadBalancer", clusterIPs=["10.96.1.1"])["external-ip"] == "<pending>"
    status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "a.example"}]}}
    assert row(status, type="LoadBalancer", externalIPs=["198.51.100.1", "192.0.2.1"])["external-ip"] == (
        "192.0.2.1,a.example,198.51.100.1"
    )


def test_headless_and_external_names():
    assert row(type="ClusterIP", clusterIP="None", clusterIPs=["None"])["cluster-ip"] == "None"
    found = row(type="ExternalName", externalName="example.com")
    assert (found["cluster-ip"], found["external-ip"], found["port(s)"]) == ("<none>", "example.com", "<none>")


def test_endpoints_are_counted_unless_all_are_asked_for():
    endpoints = [{"addresses": [f"10.0.0.{number}"], "conditions": {"ready": True}} for number in range(1, 6)]
    endpoints[3]["conditions"] = {"ready": False, "serving": True, "terminating": True}
    endpoints[4]["conditions"] = {"ready": False}
    metadata = {"name": "web-1", "namespace": "default", "creationTimestamp": created(1)}
    one = {"metadata": metadata, "addressType": "IPv4", "ports": [{"port": 80}, {"port": 81}], "endpoints": endpoints}
    assert slice_rows([one], NOW, wide=False)[1][0][3:5] == ["80,81", "10.0.0.1,10.0.0.2,10.0.0.3 + 2 more..."]
    assert slice_rows([one], NOW, wide=True)[1][0][4].endswith("10.0.0.4(terminating),10.0.0.5(not ready)")
    assert slice_rows([{"metadata": metadata, "endpoints": None}], NOW, wide=False)[1][0][3:5] == ["<unset>", "<unset>"]


def test_pools_say_what_is_left():
    conditions = [{"type": "cilium.io/IPsAvailable", "status": "Unknown", "message": "7"},
                  {"type": "cilium.io/PoolConflict", "status": "False", "message": ""}]  # fmt: skip
    one = {"metadata": {"name": "p"}, "spec": {"disabled": True}, "status": {"conditions": conditions}}
    assert pool_rows([one], NOW)[1] == [["p", True, "False", "7", "<unknown>"]]
