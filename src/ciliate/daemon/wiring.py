"""What the CNI plugin's logic asks of the agent: wire a pod's interface, take it away, look whether it is whole."""

from pathlib import Path
from typing import TYPE_CHECKING

from ciliate.cni.plugin import Plugin
from ciliate.cni.protocol import Attachment, AttachRequest, Reply, WiringError
from ciliate.daemon.api import CniCall
from ciliate.daemon.endpoints import LocalEndpoint
from ciliate.datapath.devices import DeviceError, pod_device_name
from ciliate.datapath.netlink import NetlinkError
from ciliate.ipam.pool import IpamError

if TYPE_CHECKING:
    from ciliate.daemon.agent import Agent


class AgentWiring:
    """The agent behind the plugin's interface (``ciliate.cni.plugin.Wiring``)."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._plugin = Plugin(self)

    async def call(self, call: CniCall) -> Reply:
        """Answer a relayed call of the plugin."""
        return await self._plugin.handle(call.env, call.stdin)

    async def add(self, request: AttachRequest) -> Attachment:
        """Wire an interface; a second call answers the same. Error: WiringError, and nothing is left behind."""
        agent = self._agent
        await agent.removals.gone(pod_device_name(request.container_id, request.ifname))
        one = agent.endpoints.get(request.container_id, request.ifname)
        if one is None:
            one = self._new(request)
        elif one.netns != request.netns:
            raise WiringError(f"container {request.container_id} has {request.ifname} in {one.netns} already")
        try:
            await self._wire(one)
        except (OSError, NetlinkError, DeviceError) as error:
            await agent.release(one)
            raise WiringError(f"pod {one.pod}: {error}") from error
        return self._attachment(one)

    def _new(self, request: AttachRequest) -> LocalEndpoint:
        agent = self._agent
        owner = f"{request.container_id}/{request.ifname}"
        try:
            addresses = agent.ipam.allocate(owner)
            number = agent.endpoints.new_id()
        except (IpamError, ValueError) as error:
            agent.ipam.release(owner)
            raise WiringError(f"pod {request.pod_namespace}/{request.pod_name}: {error}") from error
        one = LocalEndpoint(
            id=number,
            container_id=request.container_id,
            interface=request.ifname,
            netns=request.netns,
            namespace=request.pod_namespace,
            name=request.pod_name,
            device=pod_device_name(request.container_id, request.ifname),
            addresses=[str(a) for a in addresses],
        )
        agent.endpoints.add(one)
        return one

    async def _wire(self, one: LocalEndpoint) -> None:
        agent = self._agent
        if agent.labels_of(one.namespace, one.name) is None:
            await agent.scan()  # the pod's object may be newer than what was read last
        pod = await agent.datapath.attach_endpoint(
            one.device, Path(one.netns), addresses=one.ips(), interface=one.interface
        )
        one.ifindex, one.mac, one.gw_mac = pod.ifindex, pod.mac.hex(), pod.gw_mac.hex()
        await agent.identify(one)
        await agent.expose(one)

    def _attachment(self, one: LocalEndpoint) -> Attachment:
        config = self._agent.datapath.config
        return Attachment(
            addresses=one.ips(),
            mac=bytes.fromhex(one.mac).hex(":"),
            host_device=one.device,
            host_mac=bytes.fromhex(one.gw_mac).hex(":"),
            mtu=self._agent.datapath.pod_mtu,
            gateways=tuple(config.gateway_v4 if address.version == 4 else config.gateway_v6 for address in one.ips()),
        )

    async def delete(self, container_id: str, ifname: str) -> None:
        """Take an interface away; one that is not there is fine."""
        agent = self._agent
        one = agent.endpoints.get(container_id, ifname)
        if one is not None:
            await agent.release(one)

    async def check(self, request: AttachRequest) -> list[str]:
        """Return what is wrong with an interface."""
        agent = self._agent
        await agent.removals.gone(pod_device_name(request.container_id, request.ifname))
        one = agent.endpoints.get(request.container_id, request.ifname)
        if one is None:
            return [f"container {request.container_id} has no interface {request.ifname} here"]
        device = agent.datapath.pod_interface(one.device)
        problems = []
        if device is None:
            problems.append(f"device {one.device} is gone")
        elif device.ifindex != one.ifindex:
            problems.append(f"device {one.device} is another one (index {device.ifindex}, not {one.ifindex})")
        rows = {row["id"]: row for row in agent.datapath.endpoints.list()}
        if one.id not in rows:
            problems.append(f"endpoint {one.id} has no row in the datapath")
        return problems

    async def attachment(self, container_id: str, ifname: str) -> Attachment | None:
        """Return a wired interface, None: it is not."""
        one = self._agent.endpoints.get(container_id, ifname)
        return self._attachment(one) if one is not None and one.ifindex else None

    async def gc(self, valid: set[tuple[str, str]]) -> list[str]:
        """Take away every interface that the runtime does not name; return whose they were."""
        gone = [one for one in self._agent.endpoints if one.key not in valid]
        for one in gone:
            await self.delete(*one.key)
        return [one.pod for one in gone]

    def readiness(self) -> list[str]:
        """Return why pods cannot be wired now."""
        return list(self._agent.health()["reasons"])
