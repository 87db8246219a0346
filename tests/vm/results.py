"""What the programs answer to given packets on the kernel that runs this: ``python -m tests.vm.results CASES OUTPUT``.

Runs on the host and in the emulated machine; nothing in the output depends on time, on chance or on interface numbers,
so the two outputs must be equal. ``CASES``: JSON, a list of ``{"name", "program", "device", "frame"}``; from the first
one with ``"policy": "node"`` on there are node policies.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from ciliate.datapath import devices
from ciliate.datapath.endpoints import HOST_ENDPOINT, EndpointId, EndpointRow
from ciliate.datapath.events import EventReader
from ciliate.datapath.exemptions import LEASES, api_servers
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.identity.numbers import IdentityId, Scope
from ciliate.policy.image import Direction, PolicyImage, PortPrefix, Row, RowVerdict, RuleRef

PODS = (2, 3, 4)
KNOWN = [IdentityId(n) for n in (1002, 1003, 1004, 1007)]
SIZES = {"ct": 4096, "ct_new": 4096, "nat": 4096, "ipcache": 4096, "fragments": 1024}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def namespace(name: str) -> Iterator[Path]:
    """A network namespace of this process's own."""
    full = f"vm-{name}-{os.getpid()}"
    _ip("netns", "add", full)
    _ip("-n", full, "link", "set", "lo", "up")
    try:
        yield Path("/run/netns") / full
    finally:
        _ip("netns", "del", full)


def web_policy() -> PolicyImage:
    """Ingress of pod 3: pod 2 may use TCP 80-83, pod 4 is denied by a rule; ICMP echo for both families from pod 2."""

    def row(protocol: int, port: int, bits: int, verdict: RowVerdict, section: str) -> Row:
        rule = RuleRef(kind="CiliumNetworkPolicy", namespace="vm", name="web", section=section, index=0)
        key = PortPrefix(protocol=protocol, port=port, bits=bits)
        return Row(key=key, verdict=verdict, rules=(rule,))

    allowed = (
        row(1, 8, 16, RowVerdict.ALLOW, "ingress"),
        row(6, 80, 14, RowVerdict.ALLOW, "ingress"),
        row(58, 128, 16, RowVerdict.ALLOW, "ingress"),
    )
    denied = (row(0, 0, 0, RowVerdict.DENY, "ingressDeny"),)
    imposed = RuleRef(kind="CiliumNetworkPolicy", namespace="vm", name="web", section="default", index=-1)
    return PolicyImage(
        direction=Direction.INGRESS,
        members={IdentityId(1002): allowed, IdentityId(1004): denied},
        default_rules=(imposed,),
    )


def node_policies() -> tuple[PolicyImage, PolicyImage]:
    """Egress: UDP and TCP 53 to the world. Ingress: TCP 80-83 from the world, anything from pod 2."""

    def row(protocol: int, port: int, bits: int) -> Row:
        rule = RuleRef(kind="CiliumClusterwideNetworkPolicy", namespace="", name="node", section="rule", index=port)
        key = PortPrefix(protocol=protocol, port=port, bits=bits)
        return Row(key=key, verdict=RowVerdict.ALLOW, rules=(rule,))

    imposed = (RuleRef(kind="CiliumClusterwideNetworkPolicy", namespace="", name="node", section="default", index=-1),)
    world_out, world_in = (row(6, 53, 16), row(17, 53, 16)), (row(6, 80, 14),)
    egress = PolicyImage(
        direction=Direction.EGRESS,
        defaults={Scope.WORLD: world_out},
        unknown={Scope.WORLD: world_out},
        default_rules=imposed,
    )
    ingress = PolicyImage(
        direction=Direction.INGRESS,
        defaults={Scope.WORLD: world_in},
        unknown={Scope.WORLD: world_in},
        members={IdentityId(1002): (row(0, 0, 0),)},
        default_rules=imposed,
    )
    return egress, ingress


def _underlay(node: Path) -> None:
    name = node.name
    # The kernel's own multicast listener reports would be counted.
    off = "net.ipv6.conf.default.disable_ipv6=1"
    subprocess.run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", off], check=True)
    _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "far0")
    _ip("-n", name, "addr", "add", "192.0.2.1/24", "dev", "eth0")
    subprocess.run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", "net.ipv6.conf.eth0.disable_ipv6=0"], check=True)
    _ip("-n", name, "addr", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
    for device in ("eth0", "far0"):
        _ip("-n", name, "link", "set", device, "up")


def _open(stack: ExitStack, node: Path) -> Datapath:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-vm-")))
    bpffs = folder / "bpffs"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "vm", str(bpffs)], check=True)
    stack.callback(subprocess.run, ["umount", "-l", str(bpffs)], check=True)
    config = DatapathConfig(
        node_name="vm",
        bpffs=bpffs,
        state_dir=folder,
        device="eth0",
        node_v4=IPv4Address("192.0.2.1"),
        node_v6=IPv6Address("2001:db8::1"),
        max_entries=SIZES,
    )
    path = in_netns(node, lambda: Datapath.open(config))
    stack.callback(in_netns, node, path.remove)
    return path


def _fill(stack: ExitStack, node: Path, path: Datapath) -> tuple[dict[str, int], dict[bytes, str]]:
    """Return interface numbers and the names of random MAC addresses."""
    numbers = {name: index for name, index in path.status()["devices"].items() if name != "ciliate_vxlan"}
    macs: dict[bytes, str] = {}
    for number in PODS:
        pod = stack.enter_context(namespace(f"pod{number}"))
        v4, v6 = IPv4Address(f"10.1.0.{number}"), IPv6Address(f"fd00:1::{number}")
        device = devices.pod_device_name(f"vm-{number}")

        def wire(device: str = device, pod: Path = pod, v4: IPv4Address = v4, v6: IPv6Address = v6) -> Any:
            return path.wire_endpoint(device, pod, addresses=[v4, v6])

        wired = in_netns(node, wire)
        _ip("-n", pod.name, "link", "set", "eth0", "down")
        row = EndpointRow(
            id=EndpointId(number),
            identity=1000 + number,
            ifindex=wired.ifindex,
            mac=wired.mac,
            gw_mac=wired.gw_mac,
            v4=v4,
            v6=v6,
            mtu=path.pod_mtu,
        )
        path.endpoints.upsert(row)
        path.ipcache.upsert({str(a): IpcacheRow(identity=1000 + number, pod=True) for a in (v4, v6)})
        numbers[f"pod{number}"] = wired.ifindex
        macs |= {wired.mac: f"<mac of pod{number}>", wired.gw_mac: f"<gateway's mac of pod{number}>"}
    remote = IPv4Address("192.0.2.2")
    path.ipcache.upsert(
        {
            "10.2.0.7": IpcacheRow(identity=1007, tunnel=remote, pod=True),
            "fd00:2::7": IpcacheRow(identity=1007, tunnel=remote, pod=True),
            "192.0.2.2": IpcacheRow(identity=6, node=True),
            "203.0.113.0/24": IpcacheRow(identity=(1 << 24) + 5),
        }
    )
    desired = {EndpointId(2): (None, None), EndpointId(3): (None, web_policy()), EndpointId(4): (None, None)}
    path.apply_policy(desired, KNOWN, complete=True)
    return numbers, macs


def _enforce_on_node(path: Datapath) -> None:
    path.exemptions.sync((*LEASES, *api_servers([(IPv4Address("192.0.2.2"), 6443)])))
    path.apply_policy({HOST_ENDPOINT: node_policies()}, KNOWN, complete=False)


def _named(data: bytes, macs: dict[bytes, str]) -> str:
    text = data.hex()
    for mac, name in macs.items():
        text = text.replace(mac.hex(), name)
    return text


def _counters(path: Datapath) -> dict[str, int]:
    """Return packets by drop reason and direction."""
    reasons = path.drop_reasons()
    return {f"{reasons[c.reason]} {Direction(c.direction).name}": c.packets for c in path.counters()}


def _state(path: Datapath) -> dict[str, Any]:
    """Everything that packets changed, without clocks."""
    rows = [{k: v for k, v in row.items() if k not in ("expires",)} for row in path.conntrack.list()]
    nat = [{k: v for k, v in row.items() if k not in ("expires",)} for row in path.conntrack.list_nat()]
    return {
        "conntrack": sorted(rows, key=str),
        "nat": sorted(nat, key=str),
    }


def _events(reader: EventReader) -> list[dict[str, Any]]:
    unstable = {"time", "ifindex"}
    found = []
    while len(batch := reader.read()):
        for record in batch:
            row = {n: record[n].tolist() for n in batch.dtype.names if n not in unstable}
            found.append({n: v.hex() if isinstance(v, bytes) else v for n, v in row.items()})
    return found


def collect(cases: list[dict[str, str]]) -> dict[str, Any]:
    """Return the results of all cases, in order, on one node."""
    with ExitStack() as stack:
        node = stack.enter_context(namespace("node"))
        _underlay(node)
        path = _open(stack, node)
        numbers, macs = _fill(stack, node, path)
        reader = path.events()
        stack.callback(reader.close)
        _events(reader)
        before = Counter(_counters(path))
        results: list[dict[str, Any]] = []
        policies: set[str] = set()
        for case in cases:
            if case.get("policy") == "node" and not policies:
                policies.add("node")
                _enforce_on_node(path)

            def run(case: dict[str, str] = case) -> Any:
                context = {"ifindex": numbers[case["device"]]}
                return path._object.programs[case["program"]].test_run(bytes.fromhex(case["frame"]), context=context)

            try:
                answer = in_netns(node, run)
            except OSError as error:
                raise RuntimeError(f"{case['name']}: {error}") from error
            results.append(
                {
                    "name": case["name"],
                    "retval": answer.retval,
                    "mark": answer.context["mark"],
                    "data": _named(answer.data, macs),
                    "events": _events(reader),
                }
            )
        after = Counter(_counters(path))
        status = path.status()
        programs = sorted(status["programs"])
        return {
            "results": results,
            "counters": after - before,
            "state": _state(path),
            "programs": programs,
            "attach": status["attach"],
        }


if __name__ == "__main__":
    answer = {"kernel": os.uname().release, **collect(json.loads(Path(sys.argv[1]).read_text()))}
    Path(sys.argv[2]).write_text(json.dumps(answer, indent=1, default=str))
