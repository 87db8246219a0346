"""Host ports: a node has each of its ports once."""

import pytest

from ciliate.k8s.manifests import ObjectKey
from ciliate.lab.objects import plan
from ciliate.lab.topology import LabError


def pod(name, *ports, node="", host=False):
    container = {"name": "main", "command": ["sleep", "1"], "ports": [{"containerPort": 80, **one} for one in ports]}
    spec = {"containers": [container], "hostNetwork": host} | ({"nodeName": node} if node else {})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def placed(*pods):
    wanted = {ObjectKey("Pod", "default", one["metadata"]["name"]): one for one in pods}
    objects = plan({}, wanted, (), ["n1", "n2"]).objects
    return [objects[key]["spec"]["nodeName"] for key in wanted]


def test_pods_with_the_same_host_port_go_to_different_nodes():
    assert sorted(placed(pod("a", {"hostPort": 80}), pod("b", {"hostPort": 80}))) == ["n1", "n2"]


def test_a_host_port_that_is_taken_turns_a_pod_away_from_an_emptier_node():
    pods = [pod("a", {"hostPort": 80}, node="n1"), pod("b", node="n2"), pod("c", node="n2"), pod("d", {"hostPort": 80})]
    assert placed(*pods)[3] == "n2"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"hostPort": 80}, {"hostPort": 81}),
        ({"hostPort": 80}, {"hostPort": 80, "protocol": "UDP"}),
        ({"hostPort": 80, "hostIP": "172.30.0.1"}, {"hostPort": 80, "hostIP": "127.0.0.1"}),
        ({}, {}),
    ],
)
def test_different_host_ports_fit_on_one_node(one, other):
    assert placed(pod("a", one, node="n1"), pod("b", other, node="n1")) == ["n1", "n1"]


@pytest.mark.parametrize(
    "other", [{"hostPort": 80}, {"hostPort": 80, "hostIP": "172.30.0.1"}, {"hostPort": 80, "hostIP": "::"}]
)
def test_error_when_a_named_node_has_the_port_taken(other):
    with pytest.raises(LabError, match=r"pod default/b: host port 80/TCP of n1 is taken by pod default/a"):
        placed(pod("a", {"hostPort": 80}, node="n1"), pod("b", other, node="n1"))


def test_error_when_no_node_has_the_port_free():
    with pytest.raises(LabError, match=r"no node has its host ports free: 80/TCP"):
        placed(*(pod(name, {"hostPort": 80}) for name in "abc"))


def test_every_port_of_a_pod_in_the_nodes_namespace_is_the_nodes():
    with pytest.raises(LabError, match=r"host port 80/TCP of n1 is taken"):
        placed(pod("a", {}, node="n1", host=True), pod("b", {"hostPort": 80}, node="n1"))
    with pytest.raises(LabError, match=r"ports\[0\]\.hostPort: with hostNetwork"):
        placed(pod("a", {"hostPort": 81}, host=True))
