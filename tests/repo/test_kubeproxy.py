"""What services are compared with is kube-proxy's: its names, and connections that arrive where they must."""

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from bench import kubeproxy
from bench.kubeproxy import Service
from bench.routed import NODE, Routed, routed
from bench.space import Netns

CLIENT, ONE, TWO = (IPv4Address(f"10.1.0.{n}") for n in (2, 3, 4))
TARGET = 8080
MODES = ("iptables-legacy-restore", "iptables-nft-restore", "nft")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and their rules")


def test_names_are_those_of_kube_proxy() -> None:
    """The expected names stand in kube-proxy's tests."""
    address = IPv4Address("10.180.0.1")
    one = Service(
        name="svc1",
        namespace="ns1",
        port_name="p80",
        address=IPv4Address("172.30.0.41"),
        port=80,
        endpoints=((address, 80),),
    )
    rules = kubeproxy.iptables_rules([one])
    assert (
        '-A KUBE-SERVICES -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp -p tcp -d 172.30.0.41 --dport 80 '
        "-j KUBE-SVC-XPGD46QRK7WJZT7O"
    ) in rules.splitlines()
    assert "-A KUBE-SVC-XPGD46QRK7WJZT7O" in rules
    assert ":KUBE-SEP-SXIVWICOYRO3J4NJ - [0:0]" in rules
    table = kubeproxy.nftables_rules([one])
    endpoint = "endpoint-5OJB2KTY-ns1/svc1/tcp/p80__10.180.0.1/80"
    assert (
        f"add rule ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80 numgen random mod 1 vmap {{ 0 : goto {endpoint} }}"
    ) in table.splitlines()


def test_each_endpoint_gets_its_share() -> None:
    (service,) = kubeproxy.services(1, 4)
    rules = kubeproxy.iptables_rules([service])
    chances = [line.split("--probability ")[1].split()[0] for line in rules.splitlines() if "--probability" in line]
    assert [float(chance) for chance in chances] == pytest.approx([1 / 4, 1 / 3, 1 / 2])


def test_comments_are_left_out_of_services_chains_when_the_cluster_is_large() -> None:
    small, large = (kubeproxy.iptables_rules(kubeproxy.services(count, 2)) for count in (500, 501))
    assert "-A KUBE-SVC-" in large
    assert sum("--comment" in line for line in small.splitlines() if line.startswith("-A KUBE-SVC-")) == 1500
    assert not any(
        "--comment" in line for line in large.splitlines() if line.startswith(("-A KUBE-SVC-", "-A KUBE-SEP-"))
    )


def test_update_writes_only_the_changed_services_chains() -> None:
    before = kubeproxy.services(50, 2)
    changed = replace(before[7], endpoints=before[7].endpoints[:1])
    after = [*before[:7], changed, *before[8:]]
    lines = kubeproxy.iptables_update(after, [changed]).splitlines()
    assert sum(line.startswith(":KUBE-SVC-") for line in lines) == 1
    assert sum(line.startswith("-A KUBE-SERVICES") for line in lines) == 51
    transaction = kubeproxy.nftables_update(before[7], changed).splitlines()
    assert transaction
    assert all("service-7" in line and "service-ips" not in line for line in transaction)


@pytest.fixture
def node() -> Iterator[Routed]:
    """A node with a client and two servers, each of which says its own address and then the client's."""
    with ExitStack() as stack:
        site = routed(stack, "kubeproxy", (CLIENT, ONE, TWO))
        for pod, address in zip(site.pods[1:], (ONE, TWO), strict=True):
            _serve(stack, pod, address)
        yield site


def _serve(stack: ExitStack, pod: Netns, address: IPv4Address) -> None:
    listener = pod.do(lambda: socket.create_server((str(address), TARGET), backlog=64))

    def answer() -> None:
        while True:
            try:
                peer, client = listener.accept()
            except OSError:
                return
            with peer:
                peer.sendall(f"{address} {client[0]}".encode())

    thread = threading.Thread(target=answer)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listener.close)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)


def _ask(host: Netns, address: IPv4Address, port: int) -> tuple[str, str]:
    """Return who answered, and whom it saw."""

    def connect() -> bytes:
        with socket.create_connection((str(address), port), timeout=5) as connection:
            return connection.recv(100)

    server, client = host.do(connect).decode().split()
    return server, client


def _load(site: Routed, mode: str, text: str) -> None:
    site.node.run(mode, *(("-f", "-") if mode == "nft" else ("--noflush",)), stdin=text)


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("mode", MODES)
def test_connections_reach_the_backends_and_an_update_moves_them(node: Routed, mode: str) -> None:
    both = ((ONE, TARGET), (TWO, TARGET))
    listed = kubeproxy.services(40, 2, special={39: both, 0: both[:1]}, node_ports=1)
    last, first = listed[39], listed[0]
    nft = mode == "nft"
    _load(node, mode, kubeproxy.nftables_rules(listed, [NODE]) if nft else kubeproxy.iptables_rules(listed))
    client = node.pods[0]
    seen = Counter(_ask(client, last.address, last.port) for _ in range(60))
    assert set(seen) == {(str(ONE), str(CLIENT)), (str(TWO), str(CLIENT))}
    assert min(seen.values()) >= 8  # less by chance: once in a billion runs

    server, source = _ask(node.outside, NODE, first.node_port)
    assert (server, source) == (str(ONE), "10.1.0.1")  # masqueraded as the node, on its way into the pod

    changed = replace(last, endpoints=both[1:])
    listed[39] = changed
    _load(node, mode, kubeproxy.nftables_update(last, changed) if nft else kubeproxy.iptables_update(listed, [changed]))
    assert {_ask(client, changed.address, changed.port)[0] for _ in range(20)} == {str(TWO)}
    assert _ask(client, first.address, first.port)[0] == str(ONE)


@needs_root
@pytest.mark.root
def test_shortened_nftables_rules_lead_to_the_same_backends(node: Routed) -> None:
    special = {9: ((ONE, TARGET), (TWO, TARGET)), 3: ((TWO, TARGET),)}
    listed = kubeproxy.services(12, 2, special=special)
    _load(node, "nft", kubeproxy.nftables_rules(listed, asked=[9]))
    client = node.pods[0]
    assert {_ask(client, listed[9].address, 80)[0] for _ in range(40)} == {str(ONE), str(TWO)}
    assert _ask(client, listed[3].address, 80)[0] == str(TWO)


@needs_root
@pytest.mark.root
def test_pod_reaches_itself_through_its_service(node: Routed) -> None:
    listed = kubeproxy.services(3, 1, special={1: ((ONE, TARGET),)})
    _load(node, "iptables-legacy-restore", kubeproxy.iptables_rules(listed))
    server, source = _ask(node.pods[1], listed[1].address, 80)
    assert (server, source) == (str(ONE), "10.1.0.1")
