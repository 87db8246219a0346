"""The datapath of one node: opens and loads it, keeps its programs attached, and holds the reconcilers of its maps.

``open`` may find a datapath that a former agent left running. It loads the object against the pinned maps and swaps
each program in one atomic step, so traffic goes on; see docs/adr/0005-pins-and-upgrades.md. Methods block (netlink
and BPF calls, no network); the ``async`` ones run in a worker thread.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from ciliate.datapath import devices
from ciliate.datapath._libbpf import lib
from ciliate.datapath.build import OBJECT
from ciliate.datapath.cgroups import CgroupLinks
from ciliate.datapath.conntrack import Conntrack, Counter, read_counters
from ciliate.datapath.devices import NodeDevices, PodInterface
from ciliate.datapath.endpoints import HOST_ENDPOINT, EndpointId, Endpoints, Epoch
from ciliate.datapath.events import EventReader
from ciliate.datapath.exemptions import LEASES, Exemption, Exemptions
from ciliate.datapath.features import Features, probe
from ciliate.datapath.ipcache import Ipcache
from ciliate.datapath.links import Hook, LinkError, Links, XdpMode
from ciliate.datapath.listeners import Listeners
from ciliate.datapath.maps import Map, joined
from ciliate.datapath.netlink import LinkState, Netlink, Network
from ciliate.datapath.object import BpfObject, ConfigValue, LoadError
from ciliate.datapath.policy import Desired, Known, PolicyMaps, PolicyReport
from ciliate.datapath.rule_ids import RuleIds
from ciliate.datapath.service_connections import ServiceConnections
from ciliate.datapath.services import Services
from ciliate.loadbalancer.maglev import maglev_table

SCHEMA: Final = "v1"
"""The layouts' version, SCHEMA_VERSION in bpf/lib/maps.h; part of the pins' path."""
DEFAULT_NAT_PORTS: Final = (50000, 65535)
_XDP: Final = "xdp"
_SO_NETNS_COOKIE: Final = 71
"""include/uapi/asm-generic/socket.h."""
_NOT_COPIED: Final = frozenset({"events", "events_lost", "counters"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DatapathConfig:
    """What a node's datapath is made for. ``bpffs`` is a mounted bpffs of this node alone; ``device`` leads to the
    underlay.
    """

    node_name: str
    bpffs: Path
    state_dir: Path
    device: str
    ipv4: bool = True
    ipv6: bool = True
    node_v4: IPv4Address | None = None
    node_v6: IPv6Address | None = None
    cluster_id: int = 0
    tunnel: bool = True
    tunnel_port: int = 8472
    masquerade: bool = True
    gateway_v4: IPv4Address = devices.GATEWAY_V4
    gateway_v6: IPv6Address = devices.GATEWAY_V6
    nat_ports: tuple[int, int] = DEFAULT_NAT_PORTS
    cgroup: Path | None = None
    """Sockets made in this cgroup and those below it are given their backends when they connect; None: none are."""
    socket_pods: bool = True
    """Those of pods too; else their packets are."""
    node_ports: tuple[int, int] = (30000, 32767)
    maglev_size: int = 16381
    xdp: Literal["off", "auto", "native", "generic"] = "off"
    """Where known connections from outside to other nodes' backends are turned round early; auto: native where the
    driver can.
    """
    force_clsact: bool = False
    max_entries: Mapping[str, int] = field(default_factory=dict)
    """Sizes of maps that shall differ from the object's."""
    host_exemptions: tuple[Exemption, ...] = LEASES
    """Connections of the node that no node policy judges."""
    object_path: Path = OBJECT


def netns_cookie() -> int:
    """Return the kernel's number of the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return int.from_bytes(any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


class Datapath:
    """A loaded datapath. ``close`` gives descriptors back and leaves the kernel's part running; ``remove`` takes it
    away.
    """

    def __init__(self, config: DatapathConfig, features: Features, links: Links) -> None:
        """Use ``open``."""
        self.config = config
        self.features = features
        self.xdp = "off"
        """How the XDP program runs: native, generic or off, with the reason where that was not asked for."""
        self.links = links
        self.sockets: CgroupLinks
        self._object: BpfObject
        self._devices: NodeDevices
        self.netns_cookies: dict[IPv4Address | IPv6Address, int] = {}
        """Of the network namespace of each local pod's address, for redirects that a pod passes by; the caller's."""
        self._freed: set[str] = set()
        self._freed_lock = threading.Lock()
        self._policy_lock = threading.Lock()

    @classmethod
    def open(cls, config: DatapathConfig) -> "Datapath":
        """Bring the node's datapath up, or take over a running one.

        Errors: LoadError and its kinds (VerifierError, ConfigError), DeviceError, NetlinkError, LinkError, OSError.
        """
        if config.ipv4 and config.node_v4 is None and (config.masquerade or not config.ipv6):
            raise LoadError(f"node {config.node_name} has no IPv4 address: set `node-ips`, or `ipv4: false`")
        if config.ipv6 and config.node_v6 is None and (config.masquerade or not config.ipv4):
            raise LoadError(f"node {config.node_name} has no IPv6 address: set `node-ips`, or `ipv6: false`")
        features = probe()
        if missing := features.missing_required():
            raise LoadError(f"this kernel ({features.kernel}) lacks {', '.join(missing)}: Linux 6.1 or later is needed")
        root = config.bpffs / "ciliate" / SCHEMA
        links = Links(root / "links", tcx=features.has("tcx") and not config.force_clsact)
        path = cls(config, features, links)
        path._start(root)
        return path

    def _start(self, root: Path) -> None:
        config = self.config
        self.sockets = CgroupLinks(root / "cgroup")
        self._devices = self._ensure_devices()
        self._object = self._load(root / "maps")
        try:
            self._make_reconcilers()
            self.exemptions.sync(config.host_exemptions)
            self.endpoints.ensure_host(self._devices.host.ifindex, self._devices.host.mtu)
            self._attach_all()
        except BaseException:
            self._object.close()
            raise
        self._object.drop_replaced()
        self.endpoints.set_node_addresses(self._node_addresses())
        devices.ensure_proxy_rules()
        devices.ensure_reserved_ports(*config.nat_ports)  # services take them without masquerading, too

    # ---- starting ---------------------------------------------------------------------------------------------

    def _overhead(self) -> int:
        return devices.VXLAN_OVERHEAD_V4 if self.config.node_v4 else devices.VXLAN_OVERHEAD_V6

    def _ensure_devices(self) -> NodeDevices:
        config = self.config
        with Netlink() as netlink:
            native = netlink.link(config.device)
        mtu = native.mtu if native else 1500
        return devices.ensure_node_devices(
            native=config.device,
            node=config.node_name,
            tunnel_port=config.tunnel_port if config.tunnel else None,
            tunnel_mtu=mtu - self._overhead(),
        )

    def _object_config(self) -> dict[str, ConfigValue]:
        config, found = self.config, self._devices
        return {
            "cluster_id": config.cluster_id,
            "ipv4": config.ipv4,
            "ipv6": config.ipv6,
            "tunnel": config.tunnel,
            "masquerade": config.masquerade,
            "tunnel_ifindex": found.overlay.ifindex if found.overlay else 0,
            "tunnel_port": config.tunnel_port,
            "host_ifindex": found.host.ifindex,
            "native_ifindex": found.native.ifindex,
            "node_v4": config.node_v4,
            "node_v6": config.node_v6,
            "gateway_v4": config.gateway_v4,
            "gateway_v6": config.gateway_v6,
            "nat_port_min": config.nat_ports[0],
            "nat_port_max": config.nat_ports[1],
            "host_netns": netns_cookie(),
            "socket_pods": config.socket_pods and config.cgroup is not None,
            "node_port_min": config.node_ports[0],
            "node_port_max": config.node_ports[1],
            "maglev_size": config.maglev_size,
            "underlay_mtu": found.native.mtu,
            "tunnel_mtu": found.native.mtu - self._overhead(),
        }

    def _load(self, pins: Path) -> BpfObject:
        """Load against the pins. Maps whose size changed are copied into fresh ones before the programs are swapped."""
        obj = BpfObject(self.config.object_path, pin_root=pins)
        try:
            obj.set_config(self._object_config(), complete=True)
            obj.set_max_entries(self.config.max_entries)
            obj.load(replace=True)
            for name, old in obj.replaced.items():
                if name not in _NOT_COPIED:
                    copy_rows(old, obj.maps[name])
        except BaseException:
            obj.restore_replaced()
            obj.close()
            raise
        return obj

    def _make_reconcilers(self) -> None:
        maps, btf = self._object.maps, self._object.btf
        self.btf = btf
        self.epoch = Epoch(maps["epoch"])
        self.endpoints = Endpoints(maps["endpoints"], maps["local_addrs"], self.epoch, btf)
        self.ipcache = Ipcache(maps["ipcache"], self.epoch, btf)
        self.rule_ids = RuleIds(self.config.state_dir / "rules.json")
        self.policy = PolicyMaps(maps, self.endpoints, self.epoch, self.rule_ids, grace=grace_period)
        self.conntrack = Conntrack(maps, btf)
        self.services = Services(
            maps,
            btf,
            grace=grace_period,
            maglev_size=self.config.maglev_size,
            maglev=maglev_table,
            cookies=self.netns_cookies,
        )
        self.service_connections = ServiceConnections(maps)
        self.listeners = Listeners(maps["listeners"])
        self.exemptions = Exemptions(maps["exemptions"], self.epoch)

    def _attach_all(self) -> None:
        """Swap or attach every program: pods first, so that a new generation never answers to an old one's packets
        alone.
        """
        programs, found = self._object.programs, self._devices
        pods = devices.pod_devices()
        for name, pod in pods.items():
            self.links.attach(_pin(name), programs["from_pod"], pod.ifindex, Hook.INGRESS)
        self.links.attach("host", programs["from_host"], found.host.ifindex, Hook.EGRESS)
        if found.overlay is not None:
            self.links.attach("overlay", programs["from_overlay"], found.overlay.ifindex, Hook.INGRESS)
        else:
            self.links.detach("overlay")
        self.links.attach("netdev", programs["from_netdev"], found.native.ifindex, Hook.INGRESS)
        self.links.attach("netdev_out", programs["to_netdev"], found.native.ifindex, Hook.EGRESS)
        self._attach_xdp()
        keep = {"host", "overlay", "netdev", "netdev_out", *(_pin(name) for name in pods)}
        for link in list(self.links.pinned()):
            if link.name not in keep and not link.name.startswith(_XDP):
                self.links.detach(link.name)
        if self.config.cgroup is None:
            self.sockets.detach()
        else:
            self.sockets.attach(self.config.cgroup, programs)

    def _attach_xdp(self) -> None:
        """Attach the XDP program, or take it off. ``auto`` does without where the driver cannot; else: LinkError."""
        wanted, ifindex = self.config.xdp, self._devices.native.ifindex
        if wanted == "off":
            self.links.detach_xdp(_XDP)
            self.xdp = "off"
            return
        mode = XdpMode.GENERIC if wanted == "generic" else XdpMode.NATIVE
        try:
            self.links.attach_xdp(_XDP, self._object.programs["xdp_netdev"], ifindex, mode)
        except LinkError as error:
            if wanted != "auto":
                raise
            self.xdp = f"off: {error.strerror}"
        else:
            self.xdp = mode.name.lower()

    def _node_addresses(self) -> list[IPv4Address | IPv6Address]:
        configured = [a for a in (self.config.node_v4, self.config.node_v6) if a is not None]
        return [*configured, *(a for a in devices.node_addresses(self.config.device) if a not in configured)]

    # ---- pods -------------------------------------------------------------------------------------------------

    @property
    def pod_mtu(self) -> int:
        """MTU of pods' interfaces, octets: the underlay's, less the overlay's overhead in tunnel mode."""
        return self._devices.native.mtu - (self._overhead() if self.config.tunnel else 0)

    def wire_endpoint(
        self, name: str, netns: Path, *, addresses: Collection[IPv4Address | IPv6Address], interface: str = "eth0"
    ) -> PodInterface:
        """Create a pod's interface with ``from_pod`` on it; nothing passes before its row is written. Idempotent.

        ``name`` is ``devices.pod_device_name(container id)``. Errors: NetlinkError, DeviceError, LinkError, OSError.
        """
        pod = devices.wire_pod(
            name,
            netns,
            interface=interface,
            addresses=addresses,
            mtu=self.pod_mtu,
            gateway_v4=self.config.gateway_v4,
            gateway_v6=self.config.gateway_v6,
        )
        self.links.attach(_pin(name), self._object.programs["from_pod"], pod.ifindex, Hook.INGRESS)
        return pod

    def unwire_endpoint(self, name: str, endpoint: EndpointId | None = None) -> bool:
        """Remove a pod's rows, program and interface; returns whether the interface was there. Idempotent.

        Conntrack rows of its addresses are dead at once (``since``); ``housekeeping`` deletes them.
        """
        if endpoint is not None:
            self.forget_endpoint(endpoint)
        self.links.detach(_pin(name))
        return devices.unwire_pod(name)

    def forget_endpoint(self, endpoint: EndpointId) -> None:
        """Remove a pod's rows: nothing passes its interface any more. Idempotent; quick, unlike the device's end."""
        gone = self.endpoints.remove(endpoint)
        with self._freed_lock:  # worker threads: what housekeeping has taken already must not get more
            self._freed.update(gone)

    async def attach_endpoint(
        self, name: str, netns: Path, *, addresses: Collection[IPv4Address | IPv6Address], interface: str = "eth0"
    ) -> PodInterface:
        """``wire_endpoint`` in a worker thread."""
        return await asyncio.to_thread(self.wire_endpoint, name, netns, addresses=addresses, interface=interface)

    async def detach_endpoint(self, name: str, endpoint: EndpointId | None = None) -> bool:
        """``unwire_endpoint`` in a worker thread."""
        return await asyncio.to_thread(self.unwire_endpoint, name, endpoint)

    # ---- state ------------------------------------------------------------------------------------------------

    def apply_policy(self, desired: Desired, identities: Known, *, complete: bool) -> PolicyReport:
        """See ``PolicyMaps.apply``. ``housekeeping`` frees what it leaves behind."""
        with self._policy_lock:
            return self.policy.apply(desired, identities, complete=complete)

    def audit_host(self, audit: bool) -> bool:
        """Report what node policies say instead of enforcing it, or enforce it again; return whether that changed."""
        return self.endpoints.set_audit(HOST_ENDPOINT, audit)

    def housekeeping(self) -> dict[str, int]:
        """Free unused policy rows and conntrack rows of removed endpoints; return how many. Call soon after changes."""
        with self._policy_lock:
            rows = self.policy.collect()
        with self._freed_lock:
            freed, self._freed = self._freed, set()
        in_use = {a for row in self.endpoints.list() for a in (row["ipv4"], row["ipv6"])}
        return {"policy_rows": rows, "connections": self.conntrack.purge(freed - in_use)}

    def sync_pod_routes(self, cidrs: Collection[Network], *, prune: bool) -> int:
        """Lead the pod CIDRs of all nodes, this one's too, to ``ciliate_host``; return how many routes changed."""
        return devices.sync_pod_routes(
            cidrs,
            source_v4=self.config.node_v4,
            source_v6=self.config.node_v6,
            mtu=self.pod_mtu,
            prune=prune,
        )

    def sync_node_routes(self, gateways: Mapping[Network, IPv4Address | IPv6Address], *, prune: bool) -> int:
        """Lead other nodes' pod CIDRs to those nodes (native routing); return how many routes changed."""
        return devices.sync_node_routes(self.config.device, gateways, prune=prune)

    def pod_interface(self, name: str) -> LinkState | None:
        """Return a pod's host-side device, None: it is gone."""
        with Netlink() as netlink:
            return netlink.link(name)

    def pod_guarded(self, device: LinkState) -> bool:
        """Return whether ``from_pod`` is on a pod's host-side device. Error: LinkError."""
        return self.links.program_id(device.ifindex, Hook.INGRESS, _pin(device.name)) != 0

    def pod_interfaces(self) -> set[str]:
        """Return the names of all host-side pod devices, also those that nobody knows any more."""
        return set(devices.pod_devices())

    def mtu_changed(self) -> bool:
        """Return whether the underlay's MTU is not the one the programs were loaded for: then close and ``open``
        again.
        """
        with Netlink() as netlink:
            native = netlink.link(self.config.device)
        return native is not None and native.mtu != self._devices.native.mtu

    def events(self, *, batch: int = 4096) -> EventReader:
        """Return a reader of the events; one at a time."""
        return EventReader(
            self._object.maps["events"], self.btf.struct("event"), lost=self._object.maps["events_lost"], batch=batch
        )

    def counters(self) -> list[Counter]:
        """Return forwarded and dropped packets by reason."""
        return read_counters(self._object.maps["counters"])

    def drop_reasons(self) -> dict[int, str]:
        """Return number -> name (``POLICY_DENIED``), from the object's BTF."""
        return {number: name.removeprefix("DROP_") for name, number in self.btf.enum("drop_reason").items()}

    def map(self, name: str) -> Map:
        """Return a map by name. Error: KeyError."""
        return self._object.maps[name]

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (rows used, rows that fit) of each table. Walks the maps: some milliseconds a 10,000 rows."""
        quick = self.policy.usage() | self.services.usage()
        return {
            name: quick[name] if name in quick else (one.count(), one.max_entries)
            for name, one in self._object.maps.items()
            if one.info.key_size and name not in ("counters", "events_lost", "epoch")
        }

    def status(self) -> dict[str, Any]:
        """Return what ``ciliate status`` shows of the datapath."""
        found = self._devices
        return {
            "kernel": self.features.kernel,
            "attach": "tcx" if self.links.tcx else "clsact",
            "xdp": self.xdp,
            "cgroup": str(self.config.cgroup or ""),
            "features": {
                f.name: {"available": f.available, "fallback": "" if f.available else f.fallback, "purpose": f.purpose}
                for f in self.features.by_name.values()
            },
            "devices": {d.name: d.ifindex for d in (found.native, found.host, found.overlay) if d is not None},
            "programs": {p.name: {"id": p.id, "instructions": p.instructions} for p in self._object.programs.values()},
            "config": {n: str(v) for n, v in self._object_config().items()},
            "pod_mtu": self.pod_mtu,
            "epoch": self.epoch.value,
        }

    # ---- ending -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give descriptors back; programs, links and maps stay."""
        self._object.close()

    def remove(self) -> None:
        """Take the datapath away: links, pins, pod devices and the node's own. Rules and sysctls stay."""
        self.sockets.detach()
        for name in devices.pod_devices():
            self.links.detach(_pin(name))
            devices.unwire_pod(name)
        self.links.detach_xdp(_XDP)
        self.links.detach("netdev", self._devices.native.ifindex, Hook.INGRESS)
        self.links.detach("netdev_out", self._devices.native.ifindex, Hook.EGRESS)
        self.close()
        root = self.config.bpffs / "ciliate" / SCHEMA
        for folder in (root / "links", root / "maps"):
            for pin in folder.iterdir() if folder.is_dir() else ():
                pin.unlink(missing_ok=True)
        devices.devices_vanish()


def _pin(device: str) -> str:
    return f"pod_{device}"


def grace_period() -> None:
    """Return when all program runs under way have ended. Error: OSError."""
    if (code := lib.cil_grace_period()) < 0:
        raise OSError(-code, f"membarrier: {os.strerror(-code)}")


def copy_rows(old: Map, new: Map) -> int:
    """Copy all rows from one map to another, field by field by name; return how many. Error: MapFullError."""
    copied = 0
    for keys, values in old.chunks():
        new_keys = _convert(keys, new.key_dtype)
        new_values = _convert(values, new.value_dtype)
        new.update(new_keys, new_values)
        copied += len(keys)
    return copied


def _convert(rows: Any, dtype: Any) -> Any:
    if rows.dtype == dtype or dtype.names is None:
        return joined(dtype, [rows])
    fresh = np.zeros(len(rows), dtype)
    for name in dtype.names:
        if name in (rows.dtype.names or ()):
            fresh[name] = rows[name]
    return fresh
