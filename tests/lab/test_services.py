"""What becomes of a Service on its way into the store: defaults, addresses, node ports; and what is refused."""

import itertools

import pytest

from ciliate.k8s.manifests import ObjectKey
from ciliate.lab.services import admit_all
from ciliate.lab.topology import SERVICES_V4, LabError

DUAL = ("IPv4", "IPv6")


def service(name="web", ports=({"port": 80},), **spec):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"ports": [dict(one) for one in ports], "selector": {"app": "web"}, **spec},
    }


def key(name="web"):
    return ObjectKey("Service", "default", name)


def admitted(*services, present=(), families=DUAL):
    return admit_all(
        {key(one["metadata"]["name"]): one for one in services},
        {key(one["metadata"]["name"]): one for one in present},
        families,
    )


def spec_of(one, former=None, families=DUAL):
    name = one["metadata"]["name"]
    return admitted(one, present=[former] if former else [], families=families)[key(name)]["spec"]


def error_of(*services, present=(), families=DUAL):
    with pytest.raises(LabError) as caught:
        admitted(*services, present=present, families=families)
    return str(caught.value)


def stored(one, families=DUAL):
    return admitted(one, families=families)[key(one["metadata"]["name"])]


def test_defaults_are_filled_in():
    assert spec_of(service()) == {
        "type": "ClusterIP",
        "selector": {"app": "web"},
        "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
        "clusterIP": "10.96.1.1",
        "clusterIPs": ["10.96.1.1"],
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
    }


def test_session_affinity_has_a_timeout():
    spec = spec_of(service(sessionAffinity="ClientIP"))
    assert spec["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}


@pytest.mark.parametrize(
    ("given", "known", "families", "policy"),
    [
        ({}, DUAL, ["IPv4"], "SingleStack"),
        ({}, ("IPv6",), ["IPv6"], "SingleStack"),
        ({"ipFamilies": ["IPv6"]}, DUAL, ["IPv6"], "SingleStack"),
        ({"ipFamilies": ["IPv6", "IPv4"]}, DUAL, ["IPv6", "IPv4"], "RequireDualStack"),
        ({"ipFamilyPolicy": "PreferDualStack"}, DUAL, ["IPv4", "IPv6"], "PreferDualStack"),
        ({"ipFamilyPolicy": "PreferDualStack"}, ("IPv4",), ["IPv4"], "PreferDualStack"),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, DUAL, ["IPv6", "IPv4"], "RequireDualStack"),
        ({"clusterIP": "fd00:10:96::7"}, DUAL, ["IPv6"], "SingleStack"),
        ({"clusterIPs": ["10.96.0.7", "fd00:10:96::7"]}, DUAL, ["IPv4", "IPv6"], "RequireDualStack"),
        ({"clusterIP": "None"}, DUAL, ["IPv4"], "SingleStack"),
        ({"clusterIP": "None", "selector": {}}, ("IPv4",), ["IPv4", "IPv6"], "RequireDualStack"),
    ],
)
def test_families_follow_policy_addresses_and_cluster(given, known, families, policy):
    spec = spec_of(service(**given), families=known)
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (families, policy)
    if spec["clusterIP"] != "None":
        assert [f"IPv{6 if ':' in one else 4}" for one in spec["clusterIPs"]] == families
    assert spec["clusterIP"] == spec["clusterIPs"][0]


def test_addresses_and_ports_are_kept_when_it_is_applied_again():
    one = service(type="LoadBalancer", externalTrafficPolicy="Local", ipFamilyPolicy="RequireDualStack")
    first = stored(one)
    assert first["spec"]["healthCheckNodePort"] in range(30000, 32768)
    assert first["spec"]["ports"][0]["nodePort"] in range(30000, 32768)
    other = admitted(service("x", type="NodePort"), present=[first])[key("x")]
    assert admitted(one, present=[first, other])[key()] == first


def test_node_ports_stay_with_their_ports_when_others_come():
    first = stored(service(type="NodePort"))
    ports = ({"name": "a", "port": 443}, {"name": "b", "port": 80})
    spec = spec_of(service(type="NodePort", ports=ports), former=first)
    assert spec["ports"][1]["nodePort"] == first["spec"]["ports"][0]["nodePort"] != spec["ports"][0]["nodePort"]


def test_the_second_family_comes_and_goes_while_the_first_stays():
    single = stored(service())
    both = admitted(service(ipFamilyPolicy="PreferDualStack"), present=[single])[key()]
    assert both["spec"]["clusterIPs"] == ["10.96.1.1", "fd00:10:96::101"]
    again = admitted(service(ipFamilies=["IPv4", "IPv6"]), present=[both])[key()]
    assert again["spec"]["clusterIPs"] == both["spec"]["clusterIPs"]
    back = admitted(service(), present=[both])[key()]
    assert (back["spec"]["clusterIPs"], back["spec"]["ipFamilies"]) == (["10.96.1.1"], ["IPv4"])


def test_what_is_asked_for_is_taken_before_anything_is_given_out():
    services = [
        service("a"),
        service("b", clusterIP="10.96.1.1"),
        service("c", type="NodePort"),
        service("d", type="NodePort", ports=[{"port": 80, "nodePort": 30086}]),
    ]
    results = [admitted(*order) for order in itertools.permutations(services)]
    assert all(one == results[0] for one in results)
    assert [results[0][key(name)]["spec"]["clusterIP"] for name in "ab"] == ["10.96.1.2", "10.96.1.1"]
    assert results[0][key("c")]["spec"]["ports"][0]["nodePort"] == 30087


def test_a_service_changes_its_type_and_drops_what_the_new_one_has_not():
    first = stored(service(type="LoadBalancer", externalTrafficPolicy="Local"))
    back = spec_of(service(), former=first)
    assert "nodePort" not in back["ports"][0] and "healthCheckNodePort" not in back
    assert back["clusterIP"] == first["spec"]["clusterIP"]
    named = spec_of(service(type="ExternalName", externalName="example.com", ports=()), former=first)
    assert "clusterIP" not in named
    renewed = spec_of(service(), former={**first, "spec": named})
    assert renewed["clusterIP"] == "10.96.1.1"


def test_a_load_balancer_without_node_ports_has_none():
    spec = spec_of(service(type="LoadBalancer", allocateLoadBalancerNodePorts=False))
    assert "nodePort" not in spec["ports"][0]


def test_one_number_serves_two_protocols_of_a_service():
    ports = (
        {"name": "a", "port": 53, "nodePort": 30053},
        {"name": "b", "port": 53, "protocol": "UDP", "nodePort": 30053},
    )
    assert [one["nodePort"] for one in spec_of(service(type="NodePort", ports=ports))["ports"]] == [30053, 30053]


def test_error_when_all_addresses_are_given_out():
    one = service(clusterIP="fd00:10:96::7")
    full = [
        {"metadata": {"name": f"s{number}"}, "spec": {"clusterIPs": [str(SERVICES_V4[number])]}}
        for number in range(1, SERVICES_V4.num_addresses - 1)
    ]
    assert spec_of(one)["clusterIP"] == "fd00:10:96::7"
    assert "no address of 10.96.0.0/16 is free" in error_of(service(), present=full)


@pytest.mark.parametrize(
    ("one", "named"),
    [
        ({**service(), "spec": None}, ("spec", "must be set")),
        (service("9web"), ("metadata.name", "'9web'")),
        (service(type="Magic"), ("spec.type", "'Magic'", "LoadBalancer")),
        (service(ports=()), ("spec.ports", "must be set")),
        (service(ports=[{"port": 0}]), ("spec.ports[0].port", "0 is not in 1..65535")),
        (service(ports=[{"targetPort": 80}]), ("spec.ports[0].port", "must be set")),
        (service(ports=[{"port": 80}, {"port": 81}]), ("spec.ports[0].name", "must be set")),
        (service(ports=[{"port": 80, "name": "A"}]), ("spec.ports[0].name", "'A'")),
        (service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]), ("spec.ports[1].name", "twice")),
        (service(ports=[{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]), ("spec.ports[1]", "TCP port 80")),
        (service(ports=[{"port": 80, "protocol": "ICMP"}]), ("spec.ports[0].protocol", "'ICMP'")),
        (service(ports=[{"port": 80, "targetPort": 70000}]), ("spec.ports[0].targetPort", "70000")),
        (service(ports=[{"port": 80, "targetPort": "web_port"}]), ("spec.ports[0].targetPort", "'web_port'")),
        (service(ports=[{"port": 80, "targetPort": "a-port-with-a-long-name"}]), ("spec.ports[0].targetPort",)),
        (service(ports=[{"port": 80, "targetPort": True}]), ("spec.ports[0].targetPort", "True")),
        (service(ports=[{"port": 80, "nodePort": 30000}]), ("spec.ports[0].nodePort", "ClusterIP")),
        (service(type="NodePort", ports=[{"port": 80, "nodePort": 80}]), ("spec.ports[0].nodePort", "30000-32767")),
        (service(clusterIP="10.0.0.1"), ("spec.clusterIPs[0]", "10.0.0.1", "10.96.0.0/16")),
        (service(clusterIP="10.96.0.0"), ("spec.clusterIPs[0]", "range")),
        (service(clusterIP="10.96.255.255"), ("spec.clusterIPs[0]", "range")),
        (service(clusterIP="x"), ("spec.clusterIPs[0]", "'x'")),
        (service(clusterIP=7), ("spec.clusterIP", "7", "string")),
        (service(clusterIP="10.96.0.1", clusterIPs=["10.96.0.2"]), ("spec.clusterIPs", "10.96.0.2")),
        (service(clusterIPs=["10.96.0.1", "10.96.0.2"]), ("spec.clusterIPs", "each family")),
        (service(clusterIP="None", type="NodePort"), ("spec.clusterIPs", "None")),
        (service(clusterIP="10.96.0.1", ipFamilies=["IPv6"]), ("spec.clusterIPs[0]", "IPv6")),
        (service(ipFamilies=["IPv5"]), ("spec.ipFamilies", "IPv5")),
        (service(ipFamilies=["IPv4", "IPv6"], ipFamilyPolicy="SingleStack"), ("spec.ipFamilyPolicy", "SingleStack")),
        (service(ipFamilyPolicy="Both"), ("spec.ipFamilyPolicy", "'Both'")),
        (service(sessionAffinity="Cookie"), ("spec.sessionAffinity", "'Cookie'")),
        (service(sessionAffinityConfig={"clientIP": {"timeoutSeconds": 5}}), ("spec.sessionAffinityConfig", "None")),
        (
            service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 0}}),
            ("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "1..86400"),
        ),
        (service(externalTrafficPolicy="Local"), ("spec.externalTrafficPolicy", "outside")),
        (service(type="NodePort", externalTrafficPolicy="Here"), ("spec.externalTrafficPolicy", "'Here'")),
        (service(internalTrafficPolicy="Here"), ("spec.internalTrafficPolicy", "'Here'")),
        (service(healthCheckNodePort=30001), ("spec.healthCheckNodePort", "LoadBalancer")),
        (service(loadBalancerSourceRanges=["10.0.0.0/8"]), ("spec.loadBalancerSourceRanges", "LoadBalancer")),
        (service(type="LoadBalancer", loadBalancerSourceRanges=["x"]), ("spec.loadBalancerSourceRanges[0]", "'x'")),
        (service(externalIPs=["127.0.0.1"]), ("spec.externalIPs[0]", "127.0.0.1", "loopback")),
        (service(externalIPs=["a"]), ("spec.externalIPs[0]", "'a'")),
        (service(trafficDistribution="Close"), ("spec.trafficDistribution", "'Close'")),
        (service(selector={"a": 1}), ("spec.selector", "strings")),
        (service(type="ExternalName", ports=()), ("spec.externalName", "DNS name")),
        (service(type="ExternalName", externalName="a.b", clusterIP="10.96.0.1"), ("spec.clusterIP", "ExternalName")),
        (service(publishNotReadyAddresses="yes"), ("spec.publishNotReadyAddresses", "true or false")),
    ],
)
def test_error_names_service_and_field(one, named):
    said = error_of(one)
    assert said.startswith(f"service default/{one['metadata']['name']}: ")
    assert all(word in said for word in named), said


def test_error_when_the_cluster_lacks_a_family():
    assert "no IPv6" in error_of(service(ipFamilies=["IPv6"]), families=("IPv4",))
    assert "spec.ipFamilyPolicy" in error_of(service(ipFamilyPolicy="RequireDualStack"), families=("IPv4",))


def test_error_names_the_holder_when_something_is_taken():
    ports = [{"port": 80, "nodePort": 30001}]
    other = stored(service("other", type="NodePort", clusterIP="10.96.0.9", ports=ports))
    assert "10.96.0.9 is taken by service default/other" in error_of(service(clusterIP="10.96.0.9"), present=[other])
    assert "spec.ports[0].nodePort: 30001 is taken by service default/other" in error_of(
        service(type="NodePort", ports=ports), present=[other]
    )
    assert "is taken by" in error_of(service("a", clusterIP="10.96.0.9"), service("b", clusterIP="10.96.0.9"))


def test_error_when_an_address_would_change():
    first = stored(service(ipFamilyPolicy="RequireDualStack"))
    for change, where in (
        ({"clusterIP": "10.96.0.9"}, "spec.clusterIPs[0]"),
        ({"clusterIPs": ["10.96.1.1", "fd00:10:96::9"]}, "spec.clusterIPs[1]"),
        ({"clusterIP": "None"}, "spec.clusterIPs[0]"),
        ({"ipFamilies": ["IPv6"]}, "spec.ipFamilies[0]"),
    ):
        assert f"{where}: it is " in error_of(service(**change), present=[first])


def test_error_when_the_health_port_would_change():
    first = stored(service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=30500))
    again = service(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=30501)
    assert "spec.healthCheckNodePort: it is 30500 and may not change" in error_of(again, present=[first])
