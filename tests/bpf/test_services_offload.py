"""Real stacks that ask services by packets: a megabyte to each kind of backend, whatever is offloaded; and refusals."""

import socket
import time
from types import SimpleNamespace
from typing import cast

import pytest

from ciliate.datapath.netlink import in_netns
from tests.bpf.services import FRONT, TCP, UDP, Node, Services
from tests.bpf.test_offload import DIGEST, MODES, Nodes, nodes, turn
from tests.vm.overlay import transfer

__all__ = ["nodes"]
GATEWAY = {4: "169.254.0.1", 6: "fe80::c111"}


def services_of(nodes: Nodes) -> Services:
    """Return the services of the first node, none at first."""
    made = Services(cast(Node, SimpleNamespace(path=nodes[2][1])))
    made.clear()
    return made


@pytest.mark.parametrize("mode", MODES)
def test_transfers_arrive_whatever_is_offloaded(nodes: Nodes, mode: str) -> None:
    """From a pod to one of another node, to that node, to its own node, and to itself."""
    turn(nodes, MODES[mode])
    (ns, pods, _) = nodes
    own, other_node = {4: "10.1.0.5", 6: "fd00:1::5"}, {4: "192.0.2.1", 6: "2001:db8::1"}
    for family in (4, 6):
        for server, backend, seen in (
            (pods[2], {4: "10.2.0.5", 6: "fd00:2::5"}, own),
            (ns[2], {4: "192.0.2.2", 6: "2001:db8::2"}, other_node),
            (ns[1], other_node, own),
            (pods[1], own, GATEWAY),
        ):
            services_of(nodes).add(FRONT[family], 80, [(backend[family], 8080)], protocol=TCP)
            answer = transfer(pods[1], server, FRONT[family], 80)
            assert answer == {"peer": seen[family], "digest": DIGEST, "answer": "done"}, backend[family]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mode", ["all on", "pods sum"])
def test_refusals_are_believed_at_once(nodes: Nodes, family: int, mode: str) -> None:
    turn(nodes, MODES[mode])
    services = services_of(nodes)
    for protocol in (TCP, UDP):
        services.add(FRONT[family], 80, [], protocol=protocol)
    services.address(FRONT[family])
    inet = socket.AF_INET if family == 4 else socket.AF_INET6

    def ask(kind: socket.SocketKind, port: int, octets: int) -> None:
        with socket.socket(inet, kind) as one:
            one.settimeout(10)
            one.connect((FRONT[family], port))
            one.send(bytes(octets))
            one.recv(1)

    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for port in (80, 81):
            for octets in (0, 1, 1000):
                begun = time.monotonic()
                with pytest.raises(ConnectionRefusedError):
                    in_netns(nodes[1][1], lambda k=kind, p=port, n=octets: ask(k, p, n))  # type: ignore[misc]
                assert time.monotonic() - begun < 5
