"""Load balancers in the lab: who has which address of a pool, and which nodes it is sent to."""

import itertools

import pytest

from ciliate.k8s.endpointslices import PodState, endpoint_slices
from ciliate.k8s.manifests import ObjectKey
from ciliate.lab import balancers
from ciliate.lab.objects import plan
from ciliate.lab.topology import LabError

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
SATISFIED = "cilium.io/IPAMRequestSatisfied"


def pool(name="pool", *blocks, version="v2", **spec):
    blocks = [{"cidr": one} for one in blocks] or [{"cidr": "192.0.2.0/28"}, {"cidr": "2001:db8::/120"}]
    return {
        "apiVersion": f"cilium.io/{version}",
        "kind": "CiliumLoadBalancerIPPool",
        "metadata": {"name": name},
        "spec": {"blocks": blocks, **spec},
    }


def service(name="web", **spec):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"team": "x"}},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], "selector": {"app": name}, **spec},
    }


def key(one):
    namespace = "" if one["kind"] == "CiliumLoadBalancerIPPool" else "default"
    return ObjectKey(one["kind"], namespace, one["metadata"]["name"])


def applied(present, *objects, deleted=(), now=NOW):
    return plan(
        present, {key(one): one for one in objects}, [key(one) for one in deleted], ["n1", "n2"], now=now
    ).objects


def ingress(objects, name="web"):
    status = objects[ObjectKey("Service", "default", name)]["status"]
    return [one["ip"] for one in status["loadBalancer"].get("ingress", ())]


def condition(objects, one, wanted):
    return next(entry for entry in objects[key(one)]["status"]["conditions"] if entry["type"] == wanted)


def test_a_service_has_an_address_of_a_pool_whatever_comes_first():
    for order in itertools.permutations([pool(), service(ipFamilyPolicy="PreferDualStack")]):
        objects = {}
        for one in order:
            objects = applied(objects, one)
        assert ingress(objects) == ["192.0.2.0", "2001:db8::"]
        assert condition(objects, service(), SATISFIED)["status"] == "True"
        assert condition(objects, pool(), "cilium.io/IPsAvailable")["message"] == "270"


def test_an_address_stays_when_it_is_applied_again_and_goes_with_the_pool():
    objects = applied({}, pool(), service())
    again = plan(objects, {key(service()): service()}, (), ["n1"], now=LATER)
    assert (again.changes, again.write) == ({key(service()): "unchanged"}, frozenset())
    gone = applied(objects, deleted=[pool()], now=LATER)
    assert ingress(gone) == []
    told = condition(gone, service(), SATISFIED)
    assert (told["status"], told["reason"], told["lastTransitionTime"]) == ("False", "no_pool", LATER)


def test_a_service_that_is_no_load_balancer_any_more_has_no_address():
    objects = applied(applied({}, pool(), service()), service(type="ClusterIP"))
    assert objects[key(service())]["status"] == {"loadBalancer": {}}
    assert condition(objects, pool(), "cilium.io/IPsUsed")["message"] == "0"


def test_a_pool_selects_services():
    chosen = pool(serviceSelector={"matchLabels": {"io.kubernetes.service.name": "web"}}, version="v2alpha1")
    objects = applied({}, chosen, service(), service("other"))
    assert (len(ingress(objects)), ingress(objects, "other")) == (1, [])


def test_pools_that_overlap_are_told():
    objects = applied({}, pool("a", "192.0.2.0/28"), pool("b", "192.0.2.8/29"))
    assert condition(objects, pool("b"), "cilium.io/PoolConflict")["status"] == "True"
    assert condition(objects, pool("a"), "cilium.io/PoolConflict")["status"] == "False"


def test_a_status_that_a_user_writes_does_not_count():
    forged = {**service(), "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}}
    assert ingress(applied({}, forged)) == []


@pytest.mark.parametrize(
    ("one", "named"),
    [
        (pool("pool", "192.0.2.0"), ("CiliumLoadBalancerIPPool pool", "spec.blocks[0]")),
        (
            {**pool(), "spec": {"blocks": [{"start": "192.0.2.9", "stop": "192.0.2.1"}]}},
            ("spec.blocks[0]", "192.0.2.9"),
        ),
        (
            {**pool(), "spec": {"blocks": [{"cidr": "192.0.2.0/24", "start": "192.0.2.1"}]}},
            ("spec.blocks[0]", "either"),
        ),
        (pool(allowFirstLastIPs="Maybe"), ("spec.allowFirstLastIPs", "Maybe")),
        (pool(block=[]), ("unknown field", "blocks")),
        (service(loadBalancerIP="x"), ("Service default/web", "'x'")),
    ],
)
def test_error_names_object_and_field(one, named):
    with pytest.raises(LabError) as caught:
        applied({}, one)
    assert all(word in str(caught.value) for word in named), str(caught.value)


# ---- the way in ----------------------------------------------------------------------------------------------------


def with_endpoints(objects, *pods):
    """Return objects with the slices of the Service web."""
    states = [
        PodState(namespace="default", name=f"p{index}", labels={"app": "web"}, addresses=(f"10.0.0.{index}",), **one)
        for index, one in enumerate(pods)
    ]
    return {**objects, **endpoint_slices(objects[key(service())], states, {})}


def test_addresses_are_sent_to_every_node():
    objects = applied({}, pool(), service(externalIPs=["198.51.100.1"]))
    both = ("n1", "n2")
    assert balancers.routes(with_endpoints(objects), both) == {"192.0.2.0": both, "198.51.100.1": both}


@pytest.mark.parametrize(
    ("pods", "wanted"),
    [
        ([{"node": "n2"}], ("n2",)),
        ([{"node": "n1"}, {"node": "n2"}], ("n1", "n2")),
        ([{"node": "n1", "ready": False}, {"node": "n2"}], ("n2",)),
        ([{"node": "n1", "terminating": True}, {"node": "n2"}], ("n2",)),
        ([{"node": "n1", "terminating": True}], ("n1",)),
        ([{"node": "n1", "ready": False}], ()),
        ([], ()),
    ],
)
def test_a_local_service_is_sent_to_nodes_with_endpoints_only(pods, wanted):
    objects = applied({}, pool(), service(externalTrafficPolicy="Local"))
    assert balancers.routes(with_endpoints(objects, *pods), ("n1", "n2")) == {"192.0.2.0": wanted}
