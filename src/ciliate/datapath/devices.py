"""The node's own devices, routes and rules, and a pod's interface: everything idempotent, nothing interrupted by a
second run.
"""

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path
from typing import Final

from ciliate.datapath.netlink import (
    RTPROT_CILIATE,
    Address,
    LinkState,
    Netlink,
    NetlinkError,
    Network,
    Request,
    address_add,
    in_netns,
    link_delete,
    link_quiet_up,
    link_set,
    read_sysctl,
    route_delete,
    route_replace,
    rule_add,
    veth_create,
    vxlan_create,
    write_sysctls,
)

HOST_DEVICE: Final = "ciliate_host"
NET_DEVICE: Final = "ciliate_net"
OVERLAY_DEVICE: Final = "ciliate_vxlan"
POD_DEVICE_PREFIX: Final = "cil"
GATEWAY_V4: Final = IPv4Address("169.254.0.1")
GATEWAY_V6: Final = IPv6Address("fe80::c111")
MARK_MASK, MARK_TO_PROXY = 0xF00, 0x200
"""See bpf/lib/mark.h, the registry."""
PROXY_RULE_PRIORITY, PROXY_TABLE = 9, 2004
VXLAN_OVERHEAD_V4, VXLAN_OVERHEAD_V6 = 50, 70
"""Outer IP, UDP, VXLAN and the inner Ethernet header, octets."""


class DeviceError(Exception):
    """A device exists that is not what the datapath needs; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDevices:
    """The node's devices. ``overlay`` is None without a tunnel."""

    native: LinkState
    host: LinkState
    net: LinkState
    overlay: LinkState | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodInterface:
    """A wired pod: its host-side device and both MACs (6 octets each)."""

    name: str
    ifindex: int
    mac: bytes
    gw_mac: bytes


def mac_for(*parts: str) -> bytes:
    """Return a MAC that depends on nothing but ``parts``: locally administered, unicast."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


def pod_device_name(container_id: str, interface: str = "eth0") -> str:
    """Return the name of a pod's host-side device: ``cil`` and 11 hexadecimal digits."""
    return POD_DEVICE_PREFIX + hashlib.sha256(f"{container_id}\0{interface}".encode()).hexdigest()[:11]


# ---- the node -----------------------------------------------------------------------------------------------


def ensure_node_devices(*, native: str, node: str, tunnel_port: int | None, tunnel_mtu: int) -> NodeDevices:
    """Create the host pair and (``tunnel_port`` set) the VXLAN device where they are missing. Errors: DeviceError,
    NetlinkError.
    """
    with Netlink() as netlink:
        underlay = netlink.link(native)
        if underlay is None:
            raise DeviceError(f"the underlay device {native} does not exist: set `device`")
        host = _ensure_host_pair(netlink, node, underlay.mtu)
        net = netlink.link(NET_DEVICE)
        if net is None:
            raise DeviceError(f"{HOST_DEVICE} exists but {NET_DEVICE} does not: delete {HOST_DEVICE} and start again")
        overlay = None
        if tunnel_port is not None:
            overlay = _ensure_overlay(netlink, node, tunnel_port, tunnel_mtu)
        else:
            netlink.run([link_delete(OVERLAY_DEVICE)])
        _node_sysctls(native, overlay is not None)
        return NodeDevices(native=underlay, host=host, net=net, overlay=overlay)


def _ensure_host_pair(netlink: Netlink, node: str, mtu: int) -> LinkState:
    host = netlink.link(HOST_DEVICE)
    if host is None:
        request = veth_create(
            HOST_DEVICE,
            NET_DEVICE,
            mac=mac_for(node, HOST_DEVICE),
            peer_mac=mac_for(node, NET_DEVICE),
            mtu=mtu,
        )
        netlink.run([request, *link_quiet_up(HOST_DEVICE, noarp=True), *link_quiet_up(NET_DEVICE)])
        host = _present(netlink, HOST_DEVICE)
    changes = [link_set(host.ifindex, up=True, noarp=True, mtu=None if host.mtu == mtu else mtu)]
    net = netlink.link(NET_DEVICE)
    if net is not None:
        changes.append(link_set(net.ifindex, up=True, mtu=None if net.mtu == mtu else mtu))
    netlink.run(changes)
    return _present(netlink, HOST_DEVICE)


def _ensure_overlay(netlink: Netlink, node: str, port: int, mtu: int) -> LinkState:
    overlay = netlink.link(OVERLAY_DEVICE)
    if overlay is None:
        create = vxlan_create(OVERLAY_DEVICE, port=port, mac=mac_for(node, OVERLAY_DEVICE), mtu=mtu)
        netlink.run([create, *link_quiet_up(OVERLAY_DEVICE)])
        overlay = _present(netlink, OVERLAY_DEVICE)
    if overlay.kind != "vxlan":
        raise DeviceError(f"{OVERLAY_DEVICE} exists and is a {overlay.kind or 'plain'} device: delete it")
    if not overlay.up or overlay.mtu != mtu:
        netlink.run([link_set(overlay.ifindex, up=True, mtu=mtu)])
    return _present(netlink, OVERLAY_DEVICE)


def _present(netlink: Netlink, name: str) -> LinkState:
    state = netlink.link(name)
    if state is None:
        raise DeviceError(f"{name} vanished while it was being set up")
    return state


def _node_sysctls(native: str, overlay: bool) -> None:
    """Packets of pods come in by devices that no route points back to; FIB look-ups need forwarding on the device
    asked for.
    """
    devices = [HOST_DEVICE, NET_DEVICE, native, *([OVERLAY_DEVICE] if overlay else [])]
    values = {"ipv4/conf/all/rp_filter": "0"}
    for device in devices:
        values[f"ipv4/conf/{device}/rp_filter"] = "0"
        values[f"ipv4/conf/{device}/forwarding"] = "1"
        values[f"ipv6/conf/{device}/forwarding"] = "1"
    for device in [d for d in devices if d != native]:  # whatever the default for new devices is
        values[f"ipv6/conf/{device}/accept_ra"] = "0"
        values[f"ipv6/conf/{device}/disable_ipv6"] = "0"
    write_sysctls(values)


def ensure_proxy_rules() -> None:
    """Make packets marked for the proxy local: one rule and one route in each family."""
    with Netlink() as netlink:
        loopback = _present(netlink, "lo")
        everything: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
        for destination in everything:
            family = int(socket.AF_INET if destination.version == 4 else socket.AF_INET6)
            if family == socket.AF_INET6 and not Path("/proc/sys/net/ipv6").exists():
                continue
            rule = rule_add(family, priority=PROXY_RULE_PRIORITY, mark=MARK_TO_PROXY, mask=MARK_MASK, table=PROXY_TABLE)
            route = route_replace(destination, loopback.ifindex, table=PROXY_TABLE, local=True)
            netlink.run([route, rule])


def ensure_reserved_ports(first: int, last: int) -> None:
    """Keep the host's own sockets from being given ports of the masquerade range; other reservations stay."""
    wanted = f"{first}-{last}"
    current = read_sysctl("ipv4/ip_local_reserved_ports")
    if wanted not in current.split(","):
        write_sysctls({"ipv4/ip_local_reserved_ports": f"{current},{wanted}".lstrip(",")})


def sync_pod_routes(
    cidrs: Iterable[Network],
    *,
    source_v4: IPv4Address | None,
    source_v6: IPv6Address | None,
    mtu: int,
    prune: bool,
) -> int:
    """Lead pod CIDRs (own and other nodes') to ``ciliate_host``, from the node's address; return how many routes
    changed.
    """
    with Netlink() as netlink:
        host = _present(netlink, HOST_DEVICE)
        actual = {r.destination: r for r in netlink.routes() if r.oif == host.ifindex and r.table == 254}
        requests: list[Request] = []
        wanted = set(cidrs)
        for cidr in sorted(wanted, key=str):
            source: Address | None = source_v4 if cidr.version == 4 else source_v6
            have = actual.get(cidr)
            if have is None or have.source != source or have.mtu != mtu:
                requests.append(route_replace(cidr, host.ifindex, source=source, mtu=mtu))
        if prune:
            requests += [route_delete(cidr, host.ifindex) for cidr in actual if cidr not in wanted]
        netlink.run(requests)
        return len(requests)


def sync_node_routes(device: str, gateways: Mapping[Network, Address], *, prune: bool) -> int:
    """Lead other nodes' pod CIDRs to those nodes (native routing); ``prune``: our routes to other CIDRs go. Return how
    many changed.
    """
    with Netlink() as netlink:
        native = _present(netlink, device)
        ours = [
            r for r in netlink.routes() if r.oif == native.ifindex and r.table == 254 and r.protocol == RTPROT_CILIATE
        ]
        actual = {route.destination: route.gateway for route in ours}
        requests = [
            route_replace(cidr, native.ifindex, gateway=gateway)
            for cidr, gateway in gateways.items()
            if actual.get(cidr) != gateway
        ]
        if prune:
            requests += [route_delete(cidr, native.ifindex) for cidr in actual if cidr not in gateways]
        netlink.run(requests)
        return len(requests)


# ---- pods ---------------------------------------------------------------------------------------------------


def wire_pod(
    name: str,
    netns: Path,
    *,
    interface: str,
    addresses: Iterable[IPv4Address | IPv6Address],
    mtu: int,
    gateway_v4: IPv4Address = GATEWAY_V4,
    gateway_v6: IPv6Address = GATEWAY_V6,
) -> PodInterface:
    """Create a pod's interface and its routes; a second call finds everything done. Errors: NetlinkError, OSError,
    DeviceError.

    Blocking, about two milliseconds. On an error nothing is left behind.
    """
    listed = tuple(addresses)
    mac, gw_mac = mac_for(name, "pod"), mac_for(name, "host")
    with Netlink() as netlink:
        host = netlink.link(name)
        try:
            if host is None:
                fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    create = veth_create(name, interface, mac=gw_mac, peer_mac=mac, mtu=mtu, peer_netns=fd)
                    netlink.run([create, *link_quiet_up(name)])
                finally:
                    os.close(fd)
                host = _present(netlink, name)
            in_netns(netns, lambda: _wire_inside(interface, mac, listed, mtu, gateway_v4, gateway_v6))
            _host_side_sysctls(name)
        except BaseException:
            netlink.run([link_delete(name)])
            raise
    return PodInterface(name=name, ifindex=host.ifindex, mac=mac, gw_mac=host.mac)


def _host_side_sysctls(name: str) -> None:
    write_sysctls(
        {
            f"ipv4/conf/{name}/rp_filter": "0",
            f"ipv4/conf/{name}/forwarding": "1",
            f"ipv6/conf/{name}/forwarding": "1",
            f"ipv6/conf/{name}/accept_ra": "0",
            f"ipv6/conf/{name}/disable_ipv6": "0",
        }
    )


def _wire_inside(
    interface: str,
    mac: bytes,
    addresses: tuple[IPv4Address | IPv6Address, ...],
    mtu: int,
    gateway_v4: IPv4Address,
    gateway_v6: IPv6Address,
) -> None:
    """In the pod's namespace. The default routes leave by a gateway on the link that BPF answers for."""
    four = any(a.version == 4 for a in addresses)
    six = any(a.version == 6 for a in addresses)
    conf = f"ipv6/conf/{interface}"
    if six:
        write_sysctls(
            {
                f"{conf}/disable_ipv6": "0",
                f"{conf}/accept_dad": "0",
                f"{conf}/dad_transmits": "0",
                f"{conf}/accept_ra": "0",
                f"{conf}/router_solicitations": "0",
            }
        )
    else:
        write_sysctls({f"{conf}/disable_ipv6": "1"})
    with Netlink() as netlink:
        device = _present(netlink, interface)
        if device.mac != mac:
            raise DeviceError(f"the pod's namespace already has another {interface}")
        loopback = _present(netlink, "lo")
        requests = [link_set(loopback.ifindex, up=True), link_set(device.ifindex, up=True, mtu=mtu)]
        for address in addresses:
            if isinstance(address, IPv4Address):
                requests.append(address_add(device.ifindex, IPv4Interface((address, 32))))
            else:
                requests.append(address_add(device.ifindex, IPv6Interface((address, 128))))
        if four:
            requests.append(route_replace(IPv4Network((gateway_v4, 32)), device.ifindex))
            requests.append(route_replace(IPv4Network("0.0.0.0/0"), device.ifindex, gateway=gateway_v4))
        if six:
            requests.append(route_replace(IPv6Network("::/0"), device.ifindex, gateway=gateway_v6))
        netlink.run(requests)


def unwire_pod(name: str) -> bool:
    """Delete a pod's interface pair; returns whether it was there."""
    with Netlink() as netlink:
        if netlink.link(name) is None:
            return False
        netlink.run([link_delete(name)])
        return True


def pod_devices() -> dict[str, LinkState]:
    """Return the host-side devices of pods, by name."""
    with Netlink() as netlink:
        return {
            one.name: one
            for one in netlink.links()
            if one.kind == "veth" and one.name.startswith(POD_DEVICE_PREFIX) and len(one.name) == 14
        }


def node_addresses(device: str) -> list[Address]:
    """Return the addresses of a device, link-local ones left out."""
    with Netlink() as netlink:
        state = netlink.link(device)
        if state is None:
            raise NetlinkError(19, f"device {device} does not exist")
        return [i.ip for i in netlink.addresses(state.ifindex) if not i.ip.is_link_local]


def devices_vanish() -> None:
    """Delete the node's own devices (uninstall, end of a lab). Pinned maps and links are the caller's."""
    with Netlink() as netlink:
        netlink.run([link_delete(HOST_DEVICE), link_delete(OVERLAY_DEVICE)])
