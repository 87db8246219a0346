"""Keeps the datapath serving what Services, pods and redirects say: one worker, so that steps never overlap.

Whatever changes calls ``request``; many requests are one pass. A pass takes what has changed to the load balancer
(pure), and what that answers to the datapath, in a thread. Before every source has reported nothing is written: a
Service that is not heard of yet would look like one that is not there, and what a former agent left serves on.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final, Protocol

import structlog

from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.healthcheck import HealthChecks
from ciliate.daemon.objects import ClusterObjects
from ciliate.k8s.manifests import ObjectKey
from ciliate.loadbalancer.model import Address, Backend, Changes, Frontend, LocalNode, Owner, PodPorts
from ciliate.loadbalancer.table import LoadBalancer

log = structlog.get_logger()
KINDS: Final = ("Service", "EndpointSlice", "Pod", "CiliumLocalRedirectPolicy")
"""Kinds that decide what is served."""
_AGAIN: Final = 1.0
"""Seconds after which a failed pass is repeated."""
_LEFTOVERS: Final = 1.0
"""Seconds after the last change after which its leftovers are freed."""
Change = Callable[[LoadBalancer], object]


class Outcome(Protocol):
    """What the datapath made of changes. ``problems``: of every owner that is not in force as it should be; ``gone``:
    backends that no frontend has any more.
    """

    @property
    def problems(self) -> Mapping[Owner, str]: ...
    @property
    def gone(self) -> Collection[Backend]: ...


class Programmer(Protocol):
    """The datapath's side (``ciliate.datapath.services.Services``). Its methods block."""

    def apply(self, changes: Changes, *, complete: bool = False) -> Outcome:
        """Bring frontends in force, and what could not be before. ``complete``: these are all; what else is there
        goes. Error: OSError; a second call goes on.
        """

    def collect(self) -> int:
        """Free what nobody uses any more; return how many rows. Error: OSError."""

    @property
    def waiting(self) -> bool:
        """Whether another ``apply`` would try something again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePass:
    """What the last pass left. ``error``: it failed, and is tried again."""

    changed: int = 0
    took: float = 0.0
    error: str = ""
    refused: Mapping[Owner, str] = field(default_factory=dict)
    problems: Mapping[Owner, tuple[str, ...]] = field(default_factory=dict)


class Services:
    """The worker. The load balancer is its own: it changes and asks it in a thread."""

    def __init__(
        self,
        node: LocalNode,
        programmer: Programmer,
        health: HealthChecks,
        notify: Callable[[Collection[Backend]], object],
        *,
        enabled: bool = True,
    ) -> None:
        """``notify`` tells sockets that their backend is gone; it blocks. Not ``enabled``: nothing is served."""
        self.health = health
        self.enabled = enabled
        self.last = ServicePass()
        self.frontends: dict[Owner, tuple[Frontend, ...]] = {}
        """What is to be in force, by what it belongs to."""
        self.events: dict[str, int] = dict.fromkeys(("add", "update", "delete"), 0)
        """Changed owners since the start."""
        self._node = node
        self._balancer = LoadBalancer(node)
        self._programmer = programmer
        self._notify = notify
        self._changes: list[Change] = []
        self._complete = asyncio.Event()
        self._pruned = self._garbage = False
        self._asked = self._done = 0
        self._wake = asyncio.Event()
        self._passed = asyncio.Condition()

    # ---- requests --------------------------------------------------------------------------------------------------

    def request(self) -> int:
        """Ask for a pass; return a number for ``programmed``."""
        self._asked += 1
        self._wake.set()
        return self._asked

    async def programmed(self, number: int | None = None) -> None:
        """Return once a pass that began after request ``number`` (by default all requests so far) has been written."""
        wanted = self._asked if number is None else number
        async with self._passed:
            await self._passed.wait_for(lambda: self._done >= wanted)

    @property
    def node(self) -> LocalNode:
        """What is known of this node."""
        return self._node

    def set_node(self, node: LocalNode) -> None:
        """Take what is known of this node now."""
        if node != self._node:
            self._node = node
            self._changes.append(lambda balancer: balancer.set_node(node))
            self.request()

    def learn(self, cluster: ClusterObjects, endpoints: EndpointTable, keys: Iterable[ObjectKey]) -> None:
        """Take the objects of ``keys`` as they are now, those that are gone too."""
        if not self.enabled:
            return
        found = [one for key in keys if key.kind in KINDS for one in self._change(cluster, endpoints, key)]
        if found:
            self._changes += found
            self.request()

    def learn_pod(self, cluster: ClusterObjects, endpoints: EndpointTable, namespace: str, name: str) -> None:
        """Take a pod whose addresses have changed."""
        self.learn(cluster, endpoints, (ObjectKey("Pod", namespace, name),))

    def _change(self, cluster: ClusterObjects, endpoints: EndpointTable, key: ObjectKey) -> list[Change]:
        name = (key.namespace, key.name)
        match key.kind:
            case "Service":
                service = cluster.services.get(name)
                if service is None:
                    return [lambda balancer: balancer.remove_service(name)]
                return [lambda balancer: balancer.set_service(service)]
            case "EndpointSlice":
                one = cluster.slices.get(name)
                if one is None:
                    return [lambda balancer: balancer.remove_slice(*name)]
                return [lambda balancer: balancer.set_slice(one)]
            case "CiliumLocalRedirectPolicy":
                policy = cluster.redirects.get(name)
                if policy is None:
                    return [lambda balancer: balancer.remove_redirect(*name)]
                return [lambda balancer: balancer.set_redirect(policy)]
        pod = self._pod(cluster, endpoints, name)
        if pod is None:
            return [lambda balancer: balancer.remove_pod(*name)]
        return [lambda balancer: balancer.set_pod(pod)]

    def _pod(self, cluster: ClusterObjects, endpoints: EndpointTable, name: tuple[str, str]) -> PodPorts | None:
        """Return a pod of this node, with the addresses that it was given here; None: not here, or it has ended."""
        pod = cluster.pods.get(name)
        if pod is None or pod.ports is None or pod.node_name != self._node.name:
            return None
        given: tuple[Address, ...] = tuple(ip_address(one) for one in endpoints.addresses_of(*name))
        return replace(pod.ports, addresses=given or pod.ports.addresses)

    def begin(self) -> None:
        """Every source has reported."""
        self._complete.set()

    # ---- passes ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. A failed pass is repeated: what was in force stays."""
        await self._complete.wait()
        while True:
            try:
                async with asyncio.timeout(_LEFTOVERS if self._garbage else None):
                    await self._wake.wait()
            except TimeoutError:
                await self._collect()
                continue
            self._wake.clear()
            number = self._asked
            changes, self._changes = self._changes, []
            try:
                self.last = await asyncio.to_thread(self._pass, changes)
            except OSError as error:
                self._failed(error)
            self.health.want(self._balancer.health())
            self._done = number
            async with self._passed:
                self._passed.notify_all()

    def _pass(self, changes: Collection[Change]) -> ServicePass:
        began = time.perf_counter()
        for one in changes:
            one(self._balancer)
        fresh = self._balancer.changes()
        for owner, frontends in fresh.items():
            self._note(owner, frontends)
        outcome = self._programmer.apply(fresh, complete=not self._pruned)
        self._pruned, self._garbage = True, True
        return ServicePass(
            changed=len(fresh),
            took=time.perf_counter() - began,
            error=self._tell(outcome.gone),
            refused=dict(outcome.problems),
            problems=dict(self._balancer.problems()),
        )

    def _failed(self, error: OSError) -> None:
        """Have a pass repeated: the datapath knows what it has not taken."""
        log.exception("services-failed")
        self.last = replace(self.last, error=f"the datapath refused a change of services: {error}")
        asyncio.get_running_loop().call_later(_AGAIN, self._wake.set)

    async def _collect(self) -> None:
        """Free what changes have left; what did not fit may fit then."""
        self._garbage = False
        try:
            await asyncio.to_thread(self._programmer.collect)
        except OSError as error:
            self._failed(error)
        if self._programmer.waiting:
            self._wake.set()

    def _tell(self, gone: Collection[Backend]) -> str:
        """Tell sockets that their backends are gone; return what is wrong. Their connections time out then."""
        try:
            if gone:
                self._notify(gone)
        except OSError as error:
            log.warning("sockets-not-told", problem=str(error))
            return f"sockets of removed backends cannot be told: {error}"
        return ""

    def _note(self, owner: Owner, frontends: tuple[Frontend, ...]) -> None:
        if not frontends:
            self.events["delete"] += self.frontends.pop(owner, None) is not None
            return
        self.events["update" if owner in self.frontends else "add"] += 1
        self.frontends[owner] = frontends

    # ---- answers ---------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Return what is not served as written."""
        last = self.last
        found = [f"{owner}: {text}" for owner, texts in last.problems.items() for text in texts]
        found += [f"{owner}: {text}" for owner, text in last.refused.items()]
        found += [f"{owner}: {text}" for owner, text in self.health.problems().items()]
        return [*([last.error] if last.error else []), *sorted(found)]

    def problems_of(self, owner: Owner) -> list[str]:
        """Return what is not served as one object says."""
        refused = [text for text in (self.last.refused.get(owner), self.health.problems().get(owner)) if text]
        return [*self.last.problems.get(owner, ()), *refused]
