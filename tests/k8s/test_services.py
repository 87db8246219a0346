"""Services and EndpointSlices: what an API server fills in is filled in, what it refuses is an error."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from ciliate.k8s.objects import ObjectError, parse_pod
from ciliate.k8s.services import parse_endpoint_slice, parse_service
from ciliate.loadbalancer.model import (
    DEFAULT_AFFINITY,
    SCTP,
    TCP,
    UDP,
    Endpoint,
    HostPort,
    PodPorts,
    Service,
    ServicePort,
    ServiceType,
    TrafficDistribution,
    TrafficPolicy,
)


def service(spec: str, **metadata: Any) -> Service:
    return parse_service(
        {"kind": "Service", "metadata": {"name": "web", "namespace": "shop"} | metadata, "spec": yaml.safe_load(spec)}
    )


def endpoint_slice(body: str, **labels: str) -> Any:
    metadata = {"name": "web-a", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"} | labels}
    return parse_endpoint_slice({"kind": "EndpointSlice", "metadata": metadata} | yaml.safe_load(body))


def test_least_service_has_the_defaults_of_an_api_server() -> None:
    found = service("{ports: [{port: 80}]}")
    assert found == Service(namespace="shop", name="web", ports=(ServicePort(port=80),))
    assert (found.type, found.affinity, found.ports[0].protocol) == (ServiceType.CLUSTER_IP, 0, TCP)


def test_every_field_is_read() -> None:
    found = parse_service(
        yaml.safe_load("""
        kind: Service
        metadata:
          name: web
          labels: {app: web}
          annotations: {service.cilium.io/lb-algorithm: maglev, service.kubernetes.io/topology-mode: Auto, other/x: "1"}
        spec:
          type: LoadBalancer
          clusterIP: 10.96.0.10
          clusterIPs: [10.96.0.10, "fd00::a"]
          externalIPs: [192.0.2.7]
          selector: {app: web}
          sessionAffinity: ClientIP
          sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
          externalTrafficPolicy: Local
          internalTrafficPolicy: Local
          trafficDistribution: PreferClose
          healthCheckNodePort: 32000
          loadBalancerSourceRanges: [10.0.0.0/8, " 192.0.2.1/24"]
          publishNotReadyAddresses: true
          ports:
          - {name: http, port: 80, targetPort: web, nodePort: 30080}
          - {name: dns, port: 53, protocol: UDP, targetPort: 5353}
          - {name: sig, port: 80, protocol: SCTP}
        status:
          loadBalancer:
            ingress:
            - {ip: 198.51.100.1}
            - {ip: 198.51.100.2, ipMode: Proxy}
            - {hostname: lb.test}
            - {ip: "2001:db8::1", ipMode: VIP}
        """)
    )
    assert found == Service(
        namespace="default",
        name="web",
        type=ServiceType.LOAD_BALANCER,
        cluster_ips=(ip_address("10.96.0.10"), ip_address("fd00::a")),
        external_ips=(ip_address("192.0.2.7"),),
        ingress_ips=(ip_address("198.51.100.1"), ip_address("2001:db8::1")),
        ports=(
            ServicePort(name="http", port=80, target="web", node_port=30080),
            ServicePort(name="dns", port=53, protocol=UDP, target=5353),
            ServicePort(name="sig", port=80, protocol=SCTP),
        ),
        selector={"app": "web"},
        labels={"app": "web"},
        annotations={"service.cilium.io/lb-algorithm": "maglev", "service.kubernetes.io/topology-mode": "Auto"},
        affinity=60,
        external_policy=TrafficPolicy.LOCAL,
        internal_policy=TrafficPolicy.LOCAL,
        distribution=TrafficDistribution.SAME_ZONE,
        health_check_port=32000,
        source_ranges=(ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")),
        publish_not_ready=True,
    )


def test_headless_and_external_name_have_no_addresses() -> None:
    assert service("{clusterIP: None}").headless
    assert service("{clusterIP: None}").cluster_ips == ()
    named = service("{type: ExternalName, externalName: elsewhere.test}")
    assert (named.type, named.headless, named.cluster_ips) == (ServiceType.EXTERNAL_NAME, False, ())


def test_affinity_has_its_default_timeout_when_none_is_set() -> None:
    assert service("{sessionAffinity: ClientIP, ports: [{port: 80}]}").affinity == DEFAULT_AFFINITY


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ("{ports: [{port: 80}], type: Cluster}", "spec.type: 'Cluster' is none of ClusterIP, NodePort"),
        ("{}", "spec.ports: must be set"),
        ("{ports: [{port: 0}]}", "spec.ports[0].port: 0 is not in 1..65535"),
        ("{ports: [{port: 80, targetPort: 65536}]}", "spec.ports[0].targetPort: 65536"),
        ("{ports: [{port: 80, targetPort: '8080'}]}", "spec.ports[0].targetPort: '8080' is not the name of a port"),
        ("{ports: [{port: 80, targetPort: a--b}]}", "spec.ports[0].targetPort: 'a--b'"),
        ("{ports: [{port: 80, protocol: ICMP}]}", "spec.ports[0].protocol: 'ICMP' is none of TCP, UDP, SCTP"),
        ("{ports: [{port: 80, nodePort: 30000}]}", "spec.ports[0].nodePort: services of type ClusterIP have none"),
        ("{type: NodePort, ports: [{port: 80, nodePort: 70000}]}", "spec.ports[0].nodePort: 70000"),
        ("{ports: [{port: 80}, {port: 81, name: b}]}", "spec.ports[0].name: must be set"),
        ("{ports: [{port: 80, name: a}, {port: 81, name: a}]}", "spec.ports[1].name: 'a' is there twice"),
        ("{ports: [{port: 80, name: a}, {port: 80, name: b}]}", "spec.ports[1].port: 80 is there twice"),
        ("{ports: [{port: '80'}]}", "spec.ports[0].port: Expected `int`"),
        ("{clusterIP: 10.0.0.300, ports: [{port: 80}]}", "spec.clusterIPs[0]: '10.0.0.300' is no address"),
        ("{clusterIPs: [10.0.0.1, 10.0.0.2], ports: [{port: 80}]}", "spec.clusterIPs: more than one of a family"),
        ("{clusterIP: 10.0.0.2, clusterIPs: [10.0.0.1], ports: [{port: 80}]}", "spec.clusterIP: 10.0.0.2 is not"),
        ("{clusterIP: None, type: NodePort}", "spec.clusterIP: None is for services of type ClusterIP"),
        ("{externalIPs: [x], ports: [{port: 80}]}", "spec.externalIPs[0]: 'x' is no address"),
        ("{externalIPs: ['fe80::1%eth0'], ports: [{port: 80}]}", "spec.externalIPs[0]: 'fe80::1%eth0' has a zone"),
        ("{externalIPs: ['::ffff:10.96.0.1'], ports: [{port: 80}]}", "spec.externalIPs[0]: '::ffff:10.96.0.1' is IPv4"),
        ("{externalIPs: ['::ffff:0.0.0.0'], ports: [{port: 80}]}", "spec.externalIPs[0]: '::ffff:0.0.0.0' is IPv4-map"),
        ("{clusterIP: '::ffff:10.96.0.1', ports: [{port: 80}]}", "spec.clusterIPs[0]: '::ffff:10.96.0.1' is IPv4-map"),
        ("{clusterIP: 0.0.0.0, ports: [{port: 80}]}", "spec.clusterIPs[0]: '0.0.0.0' is the unspecified address"),
        ("{loadBalancerSourceRanges: ['::ffff:10.0.0.0/104'], ports: [{port: 80}]}", "SourceRanges[0]: '::ffff:10.0.0"),
        ("{sessionAffinity: Cookie, ports: [{port: 80}]}", "spec.sessionAffinity: 'Cookie'"),
        (
            "{sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}, ports: [{port: 80}]}",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is not in 1..86400",
        ),
        ("{externalTrafficPolicy: Near, ports: [{port: 80}]}", "spec.externalTrafficPolicy: 'Near' is none of Cluster"),
        ("{internalTrafficPolicy: Near, ports: [{port: 80}]}", "spec.internalTrafficPolicy: 'Near'"),
        ("{trafficDistribution: Near, ports: [{port: 80}]}", "spec.trafficDistribution: 'Near'"),
        ("{loadBalancerSourceRanges: [10.0.0.0/33], ports: [{port: 80}]}", "spec.loadBalancerSourceRanges[0]"),
        ("{healthCheckNodePort: -1, ports: [{port: 80}]}", "spec.healthCheckNodePort: -1"),
        ("{selector: {app: 'a b'}, ports: [{port: 80}]}", "spec.selector[app]: 'a b' is not a label value"),
    ],
)
def test_invalid_service_names_object_and_field(spec: str, where: str) -> None:
    with pytest.raises(ObjectError) as caught:
        service(spec)
    assert "web" in str(caught.value)
    assert where in str(caught.value)


def test_invalid_ingress_is_named() -> None:
    ports = {"ports": [{"port": 80}]}
    for ingress, where in (
        ({"ip": "x"}, "ingress[0].ip: 'x'"),
        ({"ip": "1.1.1.1", "ipMode": "Magic"}, "ipMode"),
        ({"ip": "::ffff:1.1.1.1"}, "ingress[0].ip: '::ffff:1.1.1.1' is IPv4-mapped; write 1.1.1.1"),
    ):
        raw = {"kind": "Service", "metadata": {"name": "web"}, "spec": ports}
        with pytest.raises(ObjectError, match=r"Service default/web: status\.loadBalancer") as caught:
            parse_service(raw | {"status": {"loadBalancer": {"ingress": [ingress]}}})
        assert where in str(caught.value)


def test_slice_has_the_defaults_of_an_api_server() -> None:
    found = endpoint_slice("{addressType: IPv4, endpoints: [{addresses: [10.1.0.7]}], ports: [{port: 80}]}")
    assert (found.service, found.ports) == ("web", (("", TCP, 80),))
    assert found.endpoints == (Endpoint(address=ip_address("10.1.0.7")),)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ("{}", (True, True, False)),
        ("{ready: false}", (False, False, False)),
        ("{ready: false, serving: true, terminating: true}", (False, True, True)),
        ("{ready: true, serving: null, terminating: null}", (True, True, False)),
    ],
)
def test_conditions_that_are_not_set(conditions: str, expected: tuple[bool, bool, bool]) -> None:
    body = f"{{addressType: IPv4, endpoints: [{{addresses: [10.1.0.7], conditions: {conditions}}}], ports: null}}"
    one = endpoint_slice(body).endpoints[0]
    assert (one.ready, one.serving, one.terminating) == expected


def test_endpoint_is_read_with_its_place_and_hints() -> None:
    found = endpoint_slice("""
    addressType: IPv6
    ports: [{name: http, port: 8080}, {name: any}]
    endpoints:
    - addresses: ["fd00::7", "fd00::8"]
      nodeName: n1
      zone: z1
      hints: {forZones: [{name: z1}, {name: z2}], forNodes: [{name: n1}]}
    """)
    assert found.ports == (("http", TCP, 8080),)
    assert found.endpoints == (
        Endpoint(
            address=ip_address("fd00::7"),
            node="n1",
            zone="z1",
            for_zones=frozenset({"z1", "z2"}),
            for_nodes=frozenset({"n1"}),
        ),
    )


def test_slice_of_names_has_no_endpoints() -> None:
    assert endpoint_slice("{addressType: FQDN, endpoints: [{addresses: [a.test]}]}").endpoints == ()


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("{endpoints: []}", "missing required field `addressType`"),
        ("{addressType: IPX}", "addressType: 'IPX' is none of IPv4, IPv6, FQDN"),
        ("{addressType: IPv4, endpoints: [{addresses: []}]}", "endpoints[0].addresses: must be set"),
        (
            "{addressType: IPv4, endpoints: [{addresses: ['::1']}]}",
            "endpoints[0].addresses[0]: ::1 is not of the slice",
        ),
        ("{addressType: IPv4, endpoints: [{addresses: [x]}]}", "endpoints[0].addresses[0]: 'x' is no address"),
        ("{addressType: IPv6, endpoints: [{addresses: ['::ffff:10.1.0.7']}]}", "'::ffff:10.1.0.7' is IPv4-mapped"),
        ("{addressType: IPv4, endpoints: [{addresses: [0.0.0.0]}]}", "addresses[0]: '0.0.0.0' is the unspecified"),
        ("{addressType: IPv4, ports: [{port: 65536}]}", "ports[0].port: 65536"),
        ("{addressType: IPv4, ports: [{port: 1, protocol: ICMP}]}", "ports[0].protocol: 'ICMP'"),
        ("{addressType: IPv4, ports: [{port: 1}, {port: 2}]}", "ports[1].name: None is there twice"),
    ],
)
def test_invalid_slice_names_object_and_field(body: str, where: str) -> None:
    with pytest.raises(ObjectError) as caught:
        endpoint_slice(body)
    assert "web-a" in str(caught.value)
    assert where in str(caught.value)


def test_weight_of_a_slice_is_read() -> None:
    def weighted(text: str) -> Any:
        metadata = {"name": "web-a", "annotations": {"service.cilium.io/weight": text}}
        return parse_endpoint_slice({"kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4"})

    assert [weighted(text).weight for text in ("0", "7", "256")] == [0, 7, 256]
    for bad in ("-1", "257", "x", "", "٣"):
        with pytest.raises(ObjectError, match=r"EndpointSlice default/web-a: metadata\.annotations\[service"):
            weighted(bad)


def test_creation_is_text_however_it_was_written() -> None:
    spec = {"ports": [{"port": 80}]}
    for written in ('"2026-01-02T03:04:05Z"', "2026-01-02T03:04:05Z"):
        metadata = {"name": "web", "creationTimestamp": yaml.safe_load(written)}
        raw = {"kind": "Service", "metadata": metadata, "spec": spec}
        assert parse_service(raw).created == "2026-01-02T03:04:05Z"


def pod(spec: str, status: str = "{}") -> Any:
    metadata = {"name": "web-1", "namespace": "shop", "labels": {"app": "web"}}
    return parse_pod(
        {"kind": "Pod", "metadata": metadata, "spec": yaml.safe_load(spec), "status": yaml.safe_load(status)}
    )


def test_host_ports_of_a_pod_are_read() -> None:
    found = pod(
        """
        nodeName: n1
        containers:
        - ports:
          - {name: http, containerPort: 8080, hostPort: 80, hostIP: 192.0.2.1}
          - {containerPort: 53, hostPort: 53, protocol: UDP, hostIP: "::"}
          - {name: admin, containerPort: 9000}
        """,
        '{podIPs: [{ip: 10.1.0.7}, {ip: "fd00::7"}], podIP: 10.1.0.7, conditions: [{type: Ready, status: "False"}]}',
    )
    assert found.ports == PodPorts(
        namespace="shop",
        name="web-1",
        addresses=(ip_address("10.1.0.7"), ip_address("fd00::7")),
        labels={"app": "web"},
        ports=(("http", TCP, 8080), ("admin", TCP, 9000)),
        host_ports=(
            HostPort(host_port=80, port=8080, address=ip_address("192.0.2.1")),
            HostPort(host_port=53, port=53, protocol=UDP),
        ),
        ready=False,
    )


def test_pod_without_a_status_is_ready_and_one_that_has_ended_serves_nothing() -> None:
    assert pod("{containers: []}").ports.ready
    for phase in ("Succeeded", "Failed"):
        assert pod("{containers: []}", f"{{phase: {phase}}}").ports is None


@pytest.mark.parametrize(
    ("port", "where"),
    [
        ("{containerPort: 80, hostPort: 65536}", "ports[0].hostPort: 65536"),
        ("{containerPort: 80, hostPort: 80, hostIP: x}", "ports[0].hostIP: 'x' is no address"),
        ("{containerPort: 80, hostPort: 80, hostIP: '::ffff:0.0.0.0'}", "hostIP: '::ffff:0.0.0.0' is IPv4-mapped"),
    ],
)
def test_invalid_host_port_names_pod_and_field(port: str, where: str) -> None:
    with pytest.raises(ObjectError, match=r"Pod shop/web-1: spec\.containers\[0\]") as caught:
        pod(f"{{containers: [{{ports: [{port}]}}]}}")
    assert where in str(caught.value)
