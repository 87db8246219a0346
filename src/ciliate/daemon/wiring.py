"""What the CNI plugin's logic asks of the agent: wire a pod's interface, take it away, look whether it is whole."""

import asyncio
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ciliate.cni.plugin import Plugin
from ciliate.cni.protocol import Attachment, AttachRequest, Reply, Route, WiringError
from ciliate.daemon.api import CniCall
from ciliate.daemon.endpoints import LAST_ID, LocalEndpoint
from ciliate.daemon.sockets import learn_cookie
from ciliate.datapath.devices import DeviceError, pod_device_name
from ciliate.datapath.netlink import Netlink, NetlinkError, in_netns
from ciliate.ipam.pool import IpamError
from ciliate.kvstore.identities import AllocationError

if TYPE_CHECKING:
    from ciliate.daemon.agent import Agent

_FAILURES: Final = (OSError, DeviceError, AllocationError)
"""What may go wrong when a pod is wired, and is nobody's bug: the kernel, the store, the disk."""


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
        device = pod_device_name(*request.key)
        await agent.removals.gone(device)
        one = agent.endpoints.get(*request.key)
        if one is not None and one.netns != request.netns:
            if agent.datapath.pod_interface(device) is not None:
                raise WiringError(f"container {request.container_id} has {request.ifname} in {one.netns} already")
            await self._release(one)  # of a sandbox that went without a word
            await agent.removals.gone(device)
            one = None
        if one is None:
            one = self._new(request, device)
        try:
            try:
                await self._wire(one)
            except NetlinkError as error:
                # Another container's interface may be on its way out of the same namespace, with the same name.
                if error.errno != errno.EEXIST or not await agent.removals.settled():
                    raise
                await self._wire(one)
        except _FAILURES as error:
            await self._release(one)
            raise WiringError(f"pod {one.pod}: {error}") from error
        return self._attachment(one)

    def _new(self, request: AttachRequest, device: str) -> LocalEndpoint:
        agent = self._agent
        owner = f"{request.container_id}/{request.ifname}"
        try:
            addresses = agent.ipam.allocate(owner)
            number = agent.endpoints.new_id()
            one = LocalEndpoint(
                id=number,
                network=request.network,
                container_id=request.container_id,
                interface=request.ifname,
                netns=request.netns,
                namespace=request.pod_namespace,
                name=request.pod_name,
                device=device,
                addresses=[str(a) for a in addresses],
            )
            agent.endpoints.add(one)
        except (IpamError, ValueError, OSError) as error:
            agent.ipam.release(owner)
            raise WiringError(f"pod {request.pod_namespace}/{request.pod_name}: {error}") from error
        return one

    async def _wire(self, one: LocalEndpoint) -> None:
        agent = self._agent
        if agent.labels_of(one.namespace, one.name) is None:
            await agent.scan()  # the pod's object may be newer than what was read last
        pod = await agent.datapath.attach_endpoint(
            one.device, Path(one.netns), addresses=one.ips(), interface=one.interface
        )
        one.ifindex, one.mac, one.gw_mac = pod.ifindex, pod.mac.hex(), pod.gw_mac.hex()
        await asyncio.to_thread(learn_cookie, one)
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
        """Take an interface away; one that is not there is fine. Error: WiringError, and a second call goes on."""
        one = self._agent.endpoints.get(container_id, ifname)
        if one is not None:
            await self._release(one)

    async def _release(self, one: LocalEndpoint) -> None:
        try:
            await self._agent.release(one)
        except OSError as error:
            raise WiringError(f"pod {one.pod}: {error}") from error

    async def check(self, request: AttachRequest, routes: tuple[Route, ...]) -> list[str]:
        """Return what is wrong with a wired interface, its addresses, its program and those of its routes."""
        agent = self._agent
        one = agent.endpoints.get(*request.key)
        if one is None:
            return [f"container {request.container_id} has no interface {request.ifname} here"]
        device = await asyncio.to_thread(agent.datapath.pod_interface, one.device)
        if device is None:
            return [f"device {one.device} is gone"]
        problems = []
        if device.ifindex != one.ifindex:
            problems.append(f"device {one.device} is another one (index {device.ifindex}, not {one.ifindex})")
        if not device.up:
            problems.append(f"device {one.device} is down")
        if not await asyncio.to_thread(agent.datapath.pod_guarded, device):
            problems.append(f"device {one.device} has no program: policy does not apply")
        if all(row["id"] != one.id for row in agent.datapath.endpoints.list()):
            problems.append(f"endpoint {one.id} has no row in the datapath")
        return problems + await asyncio.to_thread(_inside, request, one, device.peer, routes)

    async def attachment(self, container_id: str, ifname: str) -> Attachment | None:
        """Return a wired interface, None: it is not."""
        one = self._agent.endpoints.get(container_id, ifname)
        return self._attachment(one) if one is not None and one.ifindex else None

    def attachments(self, network: str) -> list[tuple[str, str]]:
        """Return (container id, name) of each interface of a network."""
        return [one.key for one in self._agent.endpoints if one.network == network]

    def readiness(self) -> list[str]:
        """Return why pods cannot be wired now."""
        return list(self._agent.health()["reasons"])

    def shortages(self) -> list[str]:
        """Return of what there is none left for another pod."""
        full = [f"pod CIDR {pool.cidr} has no free address" for pool in self._agent.ipam.pools.values() if pool.full]
        return full + (["all endpoint ids are in use"] if len(self._agent.endpoints) >= LAST_ID else [])


def _inside(request: AttachRequest, one: LocalEndpoint, ifindex: int, routes: tuple[Route, ...]) -> list[str]:
    """Return what is wrong in the pod's namespace. ``ifindex``: of the interface there."""

    def look() -> list[str]:
        with Netlink() as netlink:
            device = netlink.link(request.ifname)
            if device is None or device.ifindex != ifindex:
                return [f"{request.ifname} is gone from {request.netns}, or is another one"]
            problems = [] if device.up else [f"{request.ifname} is down"]
            have = {address.ip for address in netlink.addresses(ifindex)}
            problems += [f"{request.ifname} has lost {address}" for address in one.ips() if address not in have]
            found = {
                Route(destination=each.destination, gateway=each.gateway)
                for each in netlink.routes(ours=False)
                if each.oif == ifindex
            }
            return problems + [f"the route to {each.destination} is gone" for each in routes if each not in found]

    try:
        return in_netns(Path(request.netns), look)
    except OSError as error:
        return [str(error)]
