"""Two pods on one node, wired in several ways: what the traffic benchmarks compare."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench.space import Netns, bpffs, scratch
from ciliate.datapath import devices
from ciliate.datapath.devices import PodInterface
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.identity.numbers import IdentityId
from ciliate.policy.image import Direction, PolicyImage, PortPrefix, Row, RowVerdict, RuleRef

NETBENCH: Final = str(Path(__file__).parent.parent / "build/netbench")
FAR_PORT: Final = 5001
"""Its server runs on the other core: for throughput."""
NEAR_PORT: Final = 5002
"""Its server runs on the client's core: a round trip then is the path's cost, not that of waking an idle core."""
MILLISECONDS: Final = 400
CLIENT, SERVER = IPv4Address("10.1.0.2"), IPv4Address("10.1.0.3")
_TCP: Final = 6


@dataclass(frozen=True, slots=True)
class Site:
    """A client that can reach a server."""

    client: Netns

    def measure(self, mode: str) -> float:
        """Return Gbit/s (``stream``), microseconds a round trip (``rr``) or connections a second (``connect``)."""
        port = FAR_PORT if mode == "stream" else NEAR_PORT
        output = self.client.run(NETBENCH, "run", mode, str(SERVER), str(port), str(MILLISECONDS), "0")
        return float(json.loads(output)[{"stream": "gbit_s", "rr": "mean_us", "connect": "per_s"}[mode]])


def _pods(stack: ExitStack, name: str) -> tuple[Netns, Netns]:
    client, server = Netns(stack, f"{name}-client"), Netns(stack, f"{name}-server")
    for pod in (client, server):
        # Thousands of short connections: without this the client runs out of ports, whatever lies between.
        pod.sysctl(
            "net.ipv4.tcp_tw_reuse=1", "net.ipv4.tcp_max_tw_buckets=1000", "net.ipv4.ip_local_port_range=10000 65000"
        )
    return client, server


def _serve(stack: ExitStack, server: Netns) -> None:
    for port, cpu in ((FAR_PORT, 1), (NEAR_PORT, 0)):
        server.serve(stack, NETBENCH, "serve", str(SERVER), str(port), str(cpu), ready="ready")


def bridge(stack: ExitStack, name: str, rules: int | None) -> Site:
    """Pods on a Linux bridge. ``rules``: so many iptables rules that do not match lie before the one that accepts, as
    with a network policy controller that writes iptables (bridged frames pass iptables' FORWARD); None: no iptables.

    The rules are the legacy back end's, which walks long chains several times as fast as the nf_tables one.
    """
    node = Netns(stack, f"{name}-node")
    pods = _pods(stack, name)
    node.ip("link", "add", "br0", "type", "bridge")
    node.ip("link", "set", "br0", "up")
    node.sysctl(f"net.bridge.bridge-nf-call-iptables={int(rules is not None)}")
    for number, (pod, address) in enumerate(zip(pods, (CLIENT, SERVER), strict=True)):
        node.ip("link", "add", f"pod{number}", "type", "veth", "peer", "name", "eth0", "netns", pod.name)
        node.ip("link", "set", f"pod{number}", "master", "br0", "up")
        pod.ip("address", "add", f"{address}/24", "dev", "eth0")
        pod.ip("link", "set", "eth0", "up")
    if rules is not None:
        lines = [
            f"-A FORWARD -s 10.{64 + n // 250}.{n % 250}.0/24 -p tcp --dport {1024 + n} -j DROP" for n in range(rules)
        ]
        text = "\n".join(["*filter", ":FORWARD DROP", *lines, "-A FORWARD -s 10.1.0.0/24 -j ACCEPT", "COMMIT", ""])
        node.run("iptables-legacy-restore", stdin=text)
    _serve(stack, pods[1])
    return Site(pods[0])


def policy_image(direction: Direction, rules: int, peer: int) -> PolicyImage:
    """Return a policy of so many rules, each for an identity and a port of its own; the peer's is the last."""
    section = direction.name.lower()

    def rows(number: int, *ports: int) -> tuple[Row, ...]:
        rule = RuleRef(kind="CiliumNetworkPolicy", namespace="bench", name="rules", section=section, index=number)
        keys = (PortPrefix(protocol=_TCP, port=port, bits=16) for port in ports)
        return tuple(Row(key=key, verdict=RowVerdict.ALLOW, rules=(rule,)) for key in keys)

    members = {IdentityId(2000 + n): rows(n, 10000 + n) for n in range(rules - 1)}
    imposed = RuleRef(kind="CiliumNetworkPolicy", namespace="bench", name="rules", section="default", index=-1)
    return PolicyImage(
        direction=direction,
        members=members | {IdentityId(peer): rows(rules - 1, FAR_PORT, NEAR_PORT)},
        default_rules=(imposed,),
    )


def underlay(stack: ExitStack, name: str) -> Netns:
    """Return a node's namespace, with an underlay device ``eth0`` that leads nowhere."""
    node = Netns(stack, name)
    node.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far0")
    node.ip("address", "add", "192.0.2.1/24", "dev", "eth0")
    node.ip("link", "set", "eth0", "up")
    node.ip("link", "set", "far0", "up")
    return node


@dataclass(frozen=True, slots=True)
class Ours:
    """A node of ours with a client's and a server's pod; ``devices``: their host-side interfaces, in this order."""

    node: Netns
    path: Datapath
    pods: tuple[Netns, Netns]
    devices: tuple[PodInterface, PodInterface]


def ours(stack: ExitStack, name: str, rules: int | None, *, cgroup: Path | None = None) -> Ours:
    """Wire both pods; ``rules``: so many in the client's egress policy and in the server's ingress policy.

    ``cgroup``: whose sockets are given backends of services; None: packets are.
    """
    node = underlay(stack, f"{name}-node")
    config = DatapathConfig(
        node_name=name,
        bpffs=bpffs(stack),
        state_dir=scratch(stack),
        device="eth0",
        ipv6=False,
        node_v4=IPv4Address("192.0.2.1"),
        cgroup=cgroup,
    )
    path = node.do(lambda: Datapath.open(config))
    stack.callback(node.do, path.remove)
    pods = _pods(stack, name)
    wires = []
    for number, (pod, address) in enumerate(zip(pods, (CLIENT, SERVER), strict=True), 1):
        device = devices.pod_device_name(f"{name}-{number}")
        wired = node.do(lambda d=device, p=pod, a=address: path.wire_endpoint(d, p.path, addresses=[a]))  # type: ignore[misc]
        wires.append(wired)
        path.ipcache.upsert({f"{address}/32": IpcacheRow(identity=1000 + number, pod=True)})
        path.endpoints.upsert(
            EndpointRow(
                id=EndpointId(number),
                identity=1000 + number,
                ifindex=wired.ifindex,
                mac=wired.mac,
                gw_mac=wired.gw_mac,
                v4=address,
                v6=None,
                mtu=path.pod_mtu,
            )
        )
    egress = ingress = None
    if rules is not None:
        egress = policy_image(Direction.EGRESS, rules, 1002)
        ingress = policy_image(Direction.INGRESS, rules, 1001)
    known = [IdentityId(n) for n in (1001, 1002, *range(2000, 2000 + (rules or 0)))]
    desired = {EndpointId(1): (egress, None), EndpointId(2): (None, ingress)}
    report = path.apply_policy(desired, known, complete=True)
    if report.alarms:
        raise RuntimeError(f"the policy does not fit: {report.alarms[0]}")
    return Ours(node, path, pods, (wires[0], wires[1]))


def ciliate(stack: ExitStack, name: str, rules: int | None) -> Site:
    """Pods on a node of ours, with so many policy rules."""
    made = ours(stack, name, rules)
    _serve(stack, made.pods[1])
    return Site(made.pods[0])
