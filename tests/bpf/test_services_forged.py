"""What pods and clients forge to get where services' rows lead, or to be answered from where they should not be."""

import pytest

from tests.bpf.packets import udp, unreachable
from tests.bpf.policies import EGRESS, INGRESS
from tests.bpf.rig import NODE, OTHER_NODE, REMOTE_POD, WORLD, Rig, pod_address, rig
from tests.bpf.services import BACKEND, DSR, EXTERNAL, FRONT, NUMBER, Services, packet, send
from tests.bpf.test_node_ports import named

both = pytest.mark.parametrize("family", [4, 6])
GATEWAY = {4: "169.254.0.1", 6: "fe80::c111"}


def hairpin(node: Rig, services: Services, family: int, number: int = 3) -> None:
    """Let a pod reach itself, so that its rows are there."""
    pod = pod_address(number, family)
    services.add(FRONT[family], 53, [(pod, BACKEND)])
    send(node, number, udp(pod, FRONT[family], 4000, 53))
    node.pods[number].wire.receive()
    node.changed()


@both
@pytest.mark.parametrize("to", ["frontend", "gateway"])
def test_error_about_another_pods_hairpin_does_not_reach_it(
    node: Rig, services: Services, family: int, to: str
) -> None:
    """No policy would be asked: that way is for a pod's own packets only."""
    hairpin(node, services, family)
    three = pod_address(3, family)
    quoted = udp(FRONT[family], three, 53, 4000) if to == "frontend" else udp(GATEWAY[family], three, 4000, BACKEND)
    send(node, 2, unreachable(pod_address(2, family), quoted))
    node.refused("ICMP_UNRELATED", EGRESS)


@both
@pytest.mark.parametrize("quoted", [False, True])
def test_row_of_the_gateway_that_is_no_hairpins_leads_nowhere(
    node: Rig, services: Services, family: int, quoted: bool
) -> None:
    hairpin(node, services, family)
    send(node, 3, udp(pod_address(3, family), pod_address(2, family), 4000, 53))
    node.pods[2].wire.receive()
    node.changed()
    node.change_rows("translations", flags=0)
    three, gateway = pod_address(3, family), GATEWAY[family]
    about = udp(gateway, three, 4000, BACKEND)
    send(node, 3, unreachable(three, about) if quoted else udp(three, gateway, BACKEND, 4000))
    node.refused("ICMP_UNRELATED" if quoted else "NAT_NO_MAPPING", EGRESS)


@both
def test_gateway_outside_asks_no_service(node: Rig, services: Services, family: int) -> None:
    services.add("0.0.0.0" if family == 4 else "::", 30053, [(pod_address(3, family), BACKEND)], scope=EXTERNAL)
    for source in (GATEWAY[family], "169.254.7.7" if family == 4 else "fe80::7"):
        node.run("from_netdev", "eth0", node.from_far(udp(source, NODE[family], 4000, 30053)))
    assert services.rows(0) == services.rows(1) == []
    node.nothing_arrived()


@both
def test_gateway_outside_names_no_frontend(family: int) -> None:
    with rig(tunnel=False) as node:
        three, services = pod_address(3, family), Services(node)
        services.add(FRONT[family], 53, [(three, BACKEND)], scope=EXTERNAL, flags=DSR)
        node.far.send(node.from_far(named(udp(GATEWAY[family], three, 4000, BACKEND), FRONT[family], 53)))
        node.refused("INVALID_SIP", INGRESS)
        assert services.rows(1) == []


@both
@pytest.mark.parametrize("kind", ["udp", "tcp"])
@pytest.mark.parametrize("way", ["overlay", "native"])
@pytest.mark.parametrize("mode", [0, DSR])
def test_frontend_that_a_client_names_is_not_passed_on(family: int, kind: str, way: str, mode: int) -> None:
    """The backend's node would take it for the word of the node that was asked."""
    with rig(tunnel=way == "overlay") as node:
        client, remote, front = WORLD[family], REMOTE_POD[family], FRONT[family]
        node.ip("route", "replace", remote, "via", OTHER_NODE[family], "dev", "eth0")
        Services(node).add(front, 53, [(remote, BACKEND)], protocol=NUMBER[kind], scope=EXTERNAL, flags=mode)
        node.far.send(node.from_far(packet(kind, client, front, 4000, 53)))
        node.far.receive()
        node.changed("NONE EGRESS")
        forged = named(packet(kind, client, front, 4000, 53, "A"), WORLD[family], 80)
        node.far.send(node.from_far(forged))
        node.refused("INVALID_SIP", INGRESS)
