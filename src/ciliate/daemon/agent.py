"""The agent of one node: feeds what it learns into the enforcement worker, and answers for it."""

import asyncio
import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any

import structlog

from ciliate.cni.conflist import install_conflist, install_plugin
from ciliate.daemon.config import AgentConfig
from ciliate.daemon.endpoints import EndpointTable, LocalEndpoint
from ciliate.daemon.enforcement import Enforcement, Wanted
from ciliate.daemon.healthcheck import HealthChecks
from ciliate.daemon.hostguard import HostGuard, reachable
from ciliate.daemon.ipcache import IpTable, NodeAddresses, PodAddress
from ciliate.daemon.monitor import Decoder, Hub
from ciliate.daemon.named_ports import NamedPortTable
from ciliate.daemon.objects import ClusterObjects, Read
from ciliate.daemon.policy_status import Key, own_report, status_documents
from ciliate.daemon.removals import Removals
from ciliate.daemon.services import Services
from ciliate.daemon.sockets import learn_cookie, local_node, service_name, tell_sockets
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.exemptions import LEASES, api_servers
from ciliate.datapath.node import Datapath, DatapathConfig, netns_cookie
from ciliate.identity.labels import Labels, pod_labels, reserved_labels
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Reserved
from ciliate.ipam.pool import HostIpam
from ciliate.k8s.manifests import Manifests, ObjectKey, ScanResult
from ciliate.k8s.objects import namespace_of
from ciliate.kvstore.addresses import Addresses, IpEntry, NamedPort
from ciliate.kvstore.identities import IdentityAllocator
from ciliate.kvstore.nodes import Nodes
from ciliate.kvstore.reports import PolicyReports, Report
from ciliate.kvstore.store import FileStore
from ciliate.loadbalancer.model import LocalNode
from ciliate.node.model import Node
from ciliate.policy.engine import PolicyEngine
from ciliate.proxy.api import AccessLogEntry
from ciliate.proxy.client import ProxyClient, ProxyRequestError, ProxyUnavailableError

log = structlog.get_logger()


class Agent:
    """Everything of one node's agent. ``start`` builds it; ``run`` works until cancelled."""

    def __init__(self, config: AgentConfig) -> None:
        """Read the state that a former agent left. Errors: OSError, ValueError."""
        self.config = config
        self.started = time.monotonic()
        config.state_dir.mkdir(parents=True, exist_ok=True)
        self.endpoints = EndpointTable(config.state_dir / "endpoints.json")
        self.table = IpTable()
        self.hub = Hub()
        self.cluster = ClusterObjects(config.state_dir / "policies")
        self.unreadable: dict[str, str] = {}
        """What is wrong with a manifest, by file."""
        self.node = self._own_node()
        self.store = FileStore(config.kvstore_dir)
        self.identities = IdentityAllocator(self.store, config.node_name, config.cluster_id)
        self.addresses = Addresses(self.store)
        self.nodes = Nodes(self.store)
        self.reports = PolicyReports(self.store, config.cluster_name)
        self.manifests = Manifests(config.manifests_dir)
        self.proxy = ProxyClient(config.proxy_socket, timeout=15)
        self.ipam = HostIpam(config.cidrs(), node=config.node_name)
        for one in self.endpoints:
            self.ipam.restore(one.owner, one.ips())
        self.engine = PolicyEngine(cluster=config.cluster_name, cluster_id=config.cluster_id)
        for number, labels in reserved_labels().items():
            self.engine.identities.add(number, labels)
        self.ports = NamedPortTable(lambda identity, ports: self.enforcement.set_named_ports(identity, ports))
        self.waiting = {"manifests", "identities", "addresses", "nodes"}
        """Sources that have not reported yet."""
        self.datapath: Datapath
        self.enforcement: Enforcement
        self.guard: HostGuard | None = None
        """None: there is no API server that a node policy could cut off."""
        self.ready = False
        self._scanning = asyncio.Lock()
        self.remote: dict[str, Node] = {}
        """The nodes that the kvstore names, by name."""
        self._reports: dict[str, Report] = {}
        self._told: Report | None = None
        self._orphaned: set[IdentityId] = set()
        self._housekeeping = asyncio.Event()

    # ---- life -------------------------------------------------------------------------------------------------

    def _own_node(self) -> Node:
        config = self.config
        return Node(
            name=config.node_name,
            cluster=config.cluster_name,
            cluster_id=config.cluster_id,
            ipv4=config.node_ip(4),
            ipv6=config.node_ip(6),
            pod_cidrs=config.cidrs(),
        )

    def open(self) -> None:
        """Bring the datapath up or take it over. Errors: LoadError, DeviceError, NetlinkError, LinkError, OSError."""
        config = self.config
        self.datapath = Datapath.open(
            DatapathConfig(
                node_name=config.node_name,
                bpffs=config.bpffs,
                state_dir=config.state_dir,
                device=config.device,
                ipv4=config.ipv4,
                ipv6=config.ipv6,
                node_v4=config.node_ip(4),
                node_v6=config.node_ip(6),
                cluster_id=config.cluster_id,
                tunnel=config.routing_mode == "tunnel",
                tunnel_port=config.tunnel_port,
                masquerade=config.masquerade,
                cgroup=config.socket_cgroup() if config.kube_proxy_replacement else None,
                socket_pods=config.socket_lb == "all",
                node_ports=config.node_port_range,
                maglev_size=config.maglev_table_size,
                xdp=config.xdp if config.kube_proxy_replacement else "off",
                max_entries=config.map_sizes,
                host_exemptions=(*LEASES, *api_servers(config.api_servers)),
            )
        )
        self.enforcement = Enforcement(
            self.datapath,
            self.engine,
            self.endpoints,
            self.table,
            config.state_dir,
            self.proxy,
        )
        self.services = Services(
            self._local_node(),
            self.datapath.services,
            HealthChecks(),
            lambda gone: tell_sockets(self.datapath, self.endpoints, gone),
            enabled=config.kube_proxy_replacement,
        )
        if config.api_servers:
            self.guard = HostGuard(
                probe=partial(reachable, config.api_servers),
                set_audit=lambda audit: asyncio.to_thread(self.datapath.audit_host, audit),
                clock=time.monotonic,
            )
        self.removals = Removals(self.datapath.unwire_endpoint)
        self.decoder = Decoder(
            node=config.node_name,
            reasons=self.datapath.drop_reasons(),
            explain=self.datapath.policy.explain,
            ruleset=self.datapath.policy.refs_of,
            policies=self.cluster.policies,
            endpoints=self.endpoints,
            table=self.table,
            identities=self.engine.identities,
            service=lambda number: service_name(self.datapath.services, number),
            own_netns=netns_cookie(),
        )

    def _local_node(self) -> LocalNode:
        addresses = {address for one in self.table.nodes.values() for address in one.addresses}
        return local_node(self.config, self.node.labels, addresses)

    async def restore(self) -> None:
        """Take over the endpoints of a former agent: those whose interface is still there. Errors: OSError."""
        self.identities.restore(one.label_set for one in self.endpoints if one.identity >= ALLOCATED_MIN)
        for one in self.endpoints:
            device = self.datapath.pod_interface(one.device)
            if device is None or device.ifindex != one.ifindex:
                log.info("endpoint-gone", endpoint=one.id, pod=one.pod)
                await self.release(one)
                continue
            if not one.netns_cookie:
                await asyncio.to_thread(learn_cookie, one)
            self.enforcement.learn_identity(one.identity_id, one.label_set)
            self._learn_addresses(one)
            for address in one.addresses:
                self.ports.set(address, one.identity_id, frozenset(one.named_ports))
            self.datapath.endpoints.upsert(self.row(one))
        for orphan in self.datapath.pod_interfaces() - {one.device for one in self.endpoints}:
            self.removals.start(orphan)

    async def run(self) -> None:
        """Follow every source until cancelled."""
        self.nodes.publish(self.node)
        self._learn_nodes({self.config.node_name: self.node}, prune=False)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.removals.run())
            group.create_task(self.enforcement.run())
            group.create_task(self.services.run())
            group.create_task(self.services.health.run())
            group.create_task(self._follow_manifests())
            group.create_task(self._follow_identities())
            group.create_task(self._follow_addresses())
            group.create_task(self._follow_nodes())
            group.create_task(self._follow_reports())
            group.create_task(self._report())
            if self.guard is not None:
                group.create_task(self.guard.run())
            group.create_task(self._read_events())
            group.create_task(self._read_accesslog())
            group.create_task(self._keep_house())

    async def _reported(self, source: str) -> None:
        """A source has reported all it knows; after the last one, what nobody asked for goes, and we are ready."""
        if source not in self.waiting:
            return
        self.waiting.discard(source)
        if self.waiting:
            return
        self.enforcement.begin()
        self.services.begin()
        await self.enforcement.enforced(self.enforcement.request())
        await self.services.programmed(self.services.request())
        self.ready = True
        gc.freeze()  # most of what is there now stays: walking it again and again takes tens of milliseconds
        self._housekeeping.set()
        await asyncio.to_thread(self._install_cni)
        log.info("ready", seconds=round(time.monotonic() - self.started, 3), endpoints=len(self.endpoints))

    def _install_cni(self) -> None:
        """Make the runtime use the plugin, from now on: before, it could not wire a pod."""
        config = self.config
        if config.cni_bin_dir is not None and config.cni_plugin is not None:
            install_plugin(config.cni_bin_dir, config.cni_plugin)
        if config.cni_conf_dir is not None:
            install_conflist(config.cni_conf_dir, config.socket)

    # ---- endpoints --------------------------------------------------------------------------------------------

    def row(self, one: LocalEndpoint) -> EndpointRow:
        """Return the datapath's row of an endpoint."""
        v4, v6 = one.ip(4), one.ip(6)
        return EndpointRow(
            id=EndpointId(one.id),
            identity=one.identity,
            ifindex=one.ifindex,
            mac=bytes.fromhex(one.mac),
            gw_mac=bytes.fromhex(one.gw_mac),
            v4=v4,  # type: ignore[arg-type]
            v6=v6,  # type: ignore[arg-type]
            mtu=self.datapath.pod_mtu,
            netns_cookie=one.netns_cookie,
        )

    def _host(self) -> str:
        return str(self.node.ipv4 or self.node.ipv6)

    def _learn_addresses(self, one: LocalEndpoint) -> None:
        for address in one.addresses:
            self.table.set_pod(address, PodAddress(identity=one.identity_id, host=self._host(), pod=one.pod))
            self.datapath.netns_cookies[ip_address(address)] = one.netns_cookie
        self.services.learn_pod(self.cluster, self.endpoints, one.namespace, one.name)

    def labels_of(self, namespace: str, name: str) -> tuple[Labels, frozenset[tuple[str, int, int]]] | None:
        """Return (security labels, named ports) of a pod, None: the manifests do not name it."""
        pod = self.cluster.pods.get((namespace, name))
        if pod is None:
            return None
        known = self.cluster.namespaces.get(("", namespace)) or namespace_of(namespace, {})
        labels = pod_labels(
            namespace=namespace,
            labels=pod.labels,
            namespace_labels=known.labels,
            service_account=pod.service_account,
            cluster=self.config.cluster_name,
        )
        return labels, pod.named_ports

    async def identify(self, one: LocalEndpoint) -> bool:
        """Give an endpoint the identity of its labels; return whether it changed.

        A pod that nobody has named yet is ``init``; one that is named no more ends as what it was.
        """
        found = self.labels_of(one.namespace, one.name)
        if found is None and one.identity:
            return False
        labels, ports = found or (reserved_labels()[IdentityId(Reserved.INIT)], frozenset())
        if one.identity and labels == one.label_set and sorted(ports) == one.named_ports:
            return False
        former = one.label_set if one.identity >= ALLOCATED_MIN else None
        if found is None:
            number = IdentityId(Reserved.INIT)
        elif labels == one.label_set and one.identity:
            number, former = one.identity_id, None
        else:
            number = await asyncio.to_thread(self.identities.acquire, labels)
            self.enforcement.learn_identity(number, labels)
        one.identity, one.labels, one.named_ports = number, sorted(labels), sorted(ports)
        for address in one.addresses:
            self.ports.set(address, number, ports)
        if former is not None:
            await asyncio.to_thread(self.identities.release, former)
        return True

    async def expose(self, one: LocalEndpoint) -> None:
        """Write an endpoint's rows, here and for the other nodes, and enforce its policy."""
        self.endpoints.add(one)
        self._learn_addresses(one)
        await asyncio.to_thread(self.datapath.endpoints.upsert, self.row(one))
        await self.enforcement.settled(self.enforcement.request())
        await asyncio.to_thread(self._publish, one)

    def _publish(self, one: LocalEndpoint) -> None:
        ports = tuple(NamedPort(name=name, protocol=protocol, port=port) for name, protocol, port in one.named_ports)
        for address in one.addresses:
            entry = IpEntry(
                ip=address,
                host_ip=self._host(),
                identity=one.identity,
                namespace=one.namespace,
                pod=one.name,
                named_ports=ports,
            )
            self.addresses.publish(entry)

    async def release(self, one: LocalEndpoint) -> None:
        """Give back everything an endpoint has; idempotent. The runtime may ask again if it fails: OSError."""
        await asyncio.to_thread(self._withdraw, one)
        self.removals.start(one.device)
        for address in one.addresses:
            self.table.set_pod(address, None)
            self.ports.remove(address)
            self.datapath.netns_cookies.pop(ip_address(address), None)
        self.ipam.release(one.owner)
        self.endpoints.remove(one)
        self.services.learn_pod(self.cluster, self.endpoints, one.namespace, one.name)
        self._forget_orphans()
        self.enforcement.request()
        self._housekeeping.set()

    def _withdraw(self, one: LocalEndpoint) -> None:
        self.datapath.forget_endpoint(EndpointId(one.id))
        for address in one.addresses:
            self.addresses.withdraw(address, self._host())
        if one.identity >= ALLOCATED_MIN and self.endpoints.get(*one.key) is not None:
            self.identities.release(one.label_set)

    # ---- manifests --------------------------------------------------------------------------------------------

    async def scan(self) -> int:
        """Read the manifests; return the enforcement request that covers what they say now."""
        async with self._scanning:
            found = await asyncio.to_thread(self.manifests.scan)
            self.unreadable = {str(file): text for file, text in found.problems.items()}
            read = await asyncio.to_thread(self._read, found)
            lingering = await self.cluster.learn_all(found, read)
            await asyncio.to_thread(self.cluster.write)
            await self._label_node()
            changed = {*found.changed, *found.removed, *lingering}
            await self.services.learn_in_turns(self.cluster, self.endpoints, changed)
            await self.cluster.refresh_facts()
            self._want()
            await self._identify_all({*found.changed, *found.removed})
            return self.enforcement.request()

    def _read(self, found: ScanResult) -> list[Read]:
        read = (self.cluster.read(key, found.objects[key]) for key in sorted(found.changed))
        return [one for one in read if one is not None]

    async def _label_node(self) -> None:
        """Take this node's labels from its Node object, and tell the others."""
        own = self.cluster.nodes.get(("", self.config.node_name))
        labels = dict(own.labels) if own is not None else {}
        if labels != self.node.labels:
            self.node = replace(self.node, labels=labels)
            self.services.set_node(self._local_node())
            await asyncio.to_thread(self.nodes.publish, self.node)

    def _want(self) -> None:
        """Tell enforcement what the objects and the other nodes say now."""
        cluster, own = self.cluster, self.config.node_name
        self.enforcement.want(
            Wanted(
                policies=dict(cluster.policies),
                groups={name: one for (_, name), one in cluster.groups.items()},
                services=cluster.service_facts(),
                nodes={name: node.labels for name, node in self.remote.items() if name != own},
                host=self.node.labels,
            )
        )

    async def _identify_all(self, keys: set[ObjectKey]) -> None:
        """Pods whose labels, or whose namespace's, may have changed get the identity they have now."""
        pods = {(key.namespace, key.name) for key in keys if key.kind == "Pod"}
        namespaces = {key.name for key in keys if key.kind == "Namespace"}
        for one in self.endpoints:
            if not one.ifindex or ((one.namespace, one.name) not in pods and one.namespace not in namespaces):
                continue
            if await self.identify(one):
                await self._relabelled(one)

    async def _relabelled(self, one: LocalEndpoint) -> None:
        self.endpoints.save()
        self._learn_addresses(one)
        await asyncio.to_thread(self.datapath.endpoints.upsert, self.row(one))
        await asyncio.to_thread(self._publish, one)

    async def sync(self) -> dict[str, Any]:
        """Read the manifests and answer when this node enforces and serves them, or names what failed."""
        began = time.perf_counter()
        outcome = await self.enforcement.enforced(await self.scan())
        await self.services.programmed()
        await self._tell()
        return {
            "revision": outcome.revision,
            "epoch": outcome.epoch,
            "objects": self._policies({self.config.node_name}, {}),
            "problems": self.problems(),
            "services": {"failures": self.services.failures(), "problems": self.services.problems()},
            "elapsed_ms": round((time.perf_counter() - began) * 1000, 3),
        }

    def problems(self) -> list[str]:
        """Return what is not as asked for."""
        files = [f"{file}: {text}" for file, text in sorted(self.unreadable.items())]
        last = self.enforcement.last
        guard = [self.guard.alarm] if self.guard is not None and self.guard.alarm else []
        refused = [f"{kind} {namespace}/{name}: {text}" for (kind, namespace, name), text in last.refused.items()]
        return [
            *files,
            *map(str, self.cluster.rejected.values()),
            *last.problems,
            *refused,
            *guard,
            *self.services.problems(),
        ]

    def policies(self) -> list[dict[str, Any]]:
        """Return each policy's status in the cluster."""
        rows = self.datapath.policy.rows_of_policies()
        return self._policies({*self.remote, self.config.node_name}, rows)

    def _policies(self, nodes: set[str], rows: Mapping[Key, int]) -> list[dict[str, Any]]:
        own = {self.config.node_name: own_report(self.cluster, self.enforcement.in_force)}
        return status_documents(
            self.cluster,
            self._reports | own,
            nodes,
            rows,
            self.enforcement.last.problems,
            self.enforcement.last.refused,
        )

    # ---- sources ----------------------------------------------------------------------------------------------

    async def _follow_reports(self) -> None:
        """Follow which policies the other nodes enforce."""
        async for batch in self.reports.watch():
            for node, report in batch.items():
                if report is None:
                    self._reports.pop(node, None)
                else:
                    self._reports[node] = report

    async def _tell(self) -> None:
        report = own_report(self.cluster, self.enforcement.in_force)
        if report != self._told:
            await asyncio.to_thread(self.reports.publish, self.config.node_name, report)
            self._told = report

    async def _report(self) -> None:
        """Tell the other nodes, after each pass, which policies are enforced here."""
        passes = 0
        while True:
            passes = await self.enforcement.passed(passes)
            if self.guard is not None:
                self.guard.changed(self.enforcement.host if any(self.enforcement.host) else None)
            await self._tell()

    async def _follow_manifests(self) -> None:
        await self.scan()
        for one in self.endpoints:
            if await self.identify(one):
                await self._relabelled(one)
        await self._reported("manifests")
        async for _ in self.manifests.changes():
            await self.scan()

    async def _follow_identities(self) -> None:
        async for batch in self.identities.watch():
            for number, labels in batch.items():
                if labels is not None:
                    self._orphaned.discard(number)
                    self.enforcement.learn_identity(number, labels)
                else:
                    self._orphaned.add(number)
            self._forget_orphans()
            self.enforcement.request()
            await self._reported("identities")

    def _forget_orphans(self) -> None:
        """Forget identities that the store has no more, once no endpoint here is on its way out with one of them."""
        used = {one.identity for one in self.endpoints}
        for number in [one for one in self._orphaned if one not in used]:
            self._orphaned.discard(number)
            self.enforcement.forget_identity(number)

    async def _follow_addresses(self) -> None:
        async for batch in self.addresses.watch():
            for address, entry in batch.items():
                if entry is not None and entry.host_ip != self._host():
                    pod = f"{entry.namespace}/{entry.pod}" if entry.pod else ""
                    identity = IdentityId(entry.identity)
                    self.table.set_pod(address, PodAddress(identity=identity, host=entry.host_ip, pod=pod))
                    ports = frozenset((one.name, one.protocol, one.port) for one in entry.named_ports)
                    self.ports.set(address, IdentityId(entry.identity), ports)
                elif (known := self.table.pod(address)) is not None and known.host != self._host():
                    self.table.set_pod(address, None)
                    self.ports.remove(address)
            self.enforcement.request()
            await self._reported("addresses")

    async def _follow_nodes(self) -> None:
        async for batch in self.nodes.watch():
            for name, node in batch.items():
                if node is None:
                    self.remote.pop(name, None)
                else:
                    self.remote[name] = node
            await asyncio.to_thread(self._learn_nodes, self.remote | {self.config.node_name: self.node}, prune=True)
            self.services.set_node(self._local_node())
            self._want()
            self.enforcement.request()
            await self._reported("nodes")

    def _learn_nodes(self, nodes: Mapping[str, Node], *, prune: bool) -> None:
        """``prune``: these are all nodes. Until they are known, an earlier run's routes lead to the others."""
        known = {}
        for name, node in nodes.items():
            addresses = tuple(a for a in (node.ipv4, node.ipv6) if a is not None)
            if addresses:
                local = name == self.config.node_name
                known[name] = NodeAddresses(name=name, addresses=addresses, underlay=addresses[0], local=local)
        self.table.set_nodes(known)
        tunnel = self.config.routing_mode == "tunnel"
        via_host = [c for n, node in nodes.items() for c in node.pod_cidrs if tunnel or n == self.config.node_name]
        self.datapath.sync_pod_routes(via_host, prune=prune)
        if not tunnel:
            remote = [node for name, node in nodes.items() if name != self.config.node_name]
            routes = {c: node.ipv4 if c.version == 4 else node.ipv6 for node in remote for c in node.pod_cidrs}
            gateways = {c: gateway for c, gateway in routes.items() if gateway is not None}
            self.datapath.sync_node_routes(gateways, prune=prune)

    # ---- events and housekeeping ------------------------------------------------------------------------------

    async def _read_events(self) -> None:
        reader = self.datapath.events()
        try:
            while True:
                batch = await reader.wait()
                if self.hub.heard:
                    self.hub.publish(self.decoder.documents(batch))
        finally:
            reader.close()

    async def _read_accesslog(self) -> None:
        """Follow the proxy's access log; a proxy that went away and came back is told everything again."""
        first = True
        while True:
            try:
                await self.proxy.status()
                if not first:
                    self.enforcement.resync_proxy()
                async for entry in self.proxy.accesslog():
                    if self.hub.heard and isinstance(entry, AccessLogEntry):
                        self.hub.publish([self.decoder.http(entry)])
            except (ProxyUnavailableError, ProxyRequestError):
                await asyncio.sleep(0.5)
            first = False

    async def _keep_house(self) -> None:
        """Free what removed pods and policies left: soon after a change, and every so often."""
        while True:
            try:
                async with asyncio.timeout(15):
                    await self._housekeeping.wait()
            except TimeoutError:
                await asyncio.to_thread(self.datapath.conntrack.sweep)
                await asyncio.to_thread(self.datapath.service_connections.sweep)
            self._housekeeping.clear()
            await asyncio.to_thread(self.datapath.housekeeping)

    # ---- what others ask --------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Return whether pods can be wired now, and if not, what is awaited."""
        reasons = [f"waiting for {source}" for source in sorted(self.waiting)]
        if not self.waiting and not self.ready:
            reasons = ["the first policies are being written"]
        return {"ready": self.ready, "reasons": reasons}
