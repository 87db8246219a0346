"""Keeps the datapath serving what Services, pods and redirects say: one worker, so that steps never overlap.

Whatever changes calls ``request``; many requests are one pass. A pass takes what has changed to the load balancer
(pure), and what that answers to the datapath, in a thread. Before every source has reported nothing is written: a
Service that is not heard of yet would look like one that is not there, and what a former agent left serves on.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Final, Protocol

import structlog

from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.healthcheck import HealthChecks
from ciliate.daemon.objects import ClusterObjects
from ciliate.daemon.turns import in_turns
from ciliate.k8s.manifests import ObjectKey
from ciliate.loadbalancer.model import Address, Backend, Changes, Frontend, LocalNode, Owner, PodPorts
from ciliate.loadbalancer.table import LoadBalancer

log = structlog.get_logger()
KINDS: Final = ("Service", "EndpointSlice", "Pod", "CiliumLocalRedirectPolicy")
"""Kinds that decide what is served."""
_AGAIN: Final = 1.0
"""Seconds after which a failed pass is repeated, and sockets that could not be told are told."""
_LEFTOVERS: Final = 1.0
"""Seconds after the last change after which its leftovers are freed."""
Change = tuple[Owner, Callable[[LoadBalancer], object]]
"""What the load balancer is to be told, and of which object."""


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
    """What the last pass left. ``error``: it failed, and is tried again; ``untold``: why sockets do not know yet that
    their backend is gone.
    """

    changed: int = 0
    took: float = 0.0
    error: str = ""
    untold: str = ""
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
        self._changes: deque[Change] = deque()
        self._unwritten: dict[Owner, tuple[Frontend, ...]] = {}
        """What the datapath was to take and may not have."""
        self._broken: dict[Owner, Exception] = {}
        """Objects that the load balancer failed on: what they said before is served."""
        self._untold: dict[tuple[Address, int, int], Backend] = {}
        """Backends that are gone and whose sockets have not been told, by address, port and protocol."""
        self._complete = asyncio.Event()
        self._pruned = self._garbage = False
        self._asked = self._tried = self._done = 0
        self._wake = asyncio.Event()
        self._passed = asyncio.Condition()

    # ---- requests --------------------------------------------------------------------------------------------------

    def request(self) -> int:
        """Ask for a pass; return a number for ``programmed``."""
        self._asked += 1
        self._wake.set()
        return self._asked

    async def programmed(self, number: int | None = None) -> bool:
        """Return once a pass that began after request ``number`` (by default all requests so far) has ended: whether
        it was written. If not, ``failures`` says why.
        """
        wanted = self._asked if number is None else number
        async with self._passed:
            await self._passed.wait_for(lambda: self._tried >= wanted)
        return self._done >= wanted

    @property
    def node(self) -> LocalNode:
        """What is known of this node."""
        return self._node

    def set_node(self, node: LocalNode) -> None:
        """Take what is known of this node now."""
        if node != self._node:
            self._node = node
            self._changes.append((Owner("Node", "", node.name), lambda balancer: balancer.set_node(node)))
            self.request()

    def learn(self, cluster: ClusterObjects, endpoints: EndpointTable, keys: Iterable[ObjectKey]) -> None:
        """Take the objects of ``keys`` as they are now, those that are gone too."""
        if not self.enabled:
            return
        self._take([self._change(cluster, endpoints, key) for key in keys if key.kind in KINDS])

    async def learn_in_turns(
        self, cluster: ClusterObjects, endpoints: EndpointTable, keys: Iterable[ObjectKey]
    ) -> None:
        """Do as ``learn``, and let other tasks have their turns. All is one change: no pass sees a part of it.

        ``cluster`` keeps still meanwhile, but pods come and go: they are looked at last, in one go.
        """
        if not self.enabled:
            return
        some = [key for key in keys if key.kind in KINDS]
        found: list[Change] = []
        await in_turns(
            [key for key in some if key.kind != "Pod"],
            lambda key: found.append(self._change(cluster, endpoints, key)),
        )
        self._take(found + [self._change(cluster, endpoints, key) for key in some if key.kind == "Pod"])

    def _take(self, found: Collection[Change]) -> None:
        if found:
            self._changes += found
            self.request()

    def learn_pod(self, cluster: ClusterObjects, endpoints: EndpointTable, namespace: str, name: str) -> None:
        """Take a pod whose addresses have changed."""
        self.learn(cluster, endpoints, (ObjectKey("Pod", namespace, name),))

    def _change(self, cluster: ClusterObjects, endpoints: EndpointTable, key: ObjectKey) -> Change:
        name = (key.namespace, key.name)
        return Owner(key.kind, *name), self._teach(cluster, endpoints, key.kind, name)

    def _teach(
        self, cluster: ClusterObjects, endpoints: EndpointTable, kind: str, name: tuple[str, str]
    ) -> Callable[[LoadBalancer], object]:
        match kind:
            case "Service":
                service = cluster.services.get(name)
                if service is None:
                    return lambda balancer: balancer.remove_service(name)
                return lambda balancer: balancer.set_service(service)
            case "EndpointSlice":
                one = cluster.slices.get(name)
                if one is None:
                    return lambda balancer: balancer.remove_slice(*name)
                return lambda balancer: balancer.set_slice(one)
            case "CiliumLocalRedirectPolicy":
                policy = cluster.redirects.get(name)
                if policy is None:
                    return lambda balancer: balancer.remove_redirect(*name)
                return lambda balancer: balancer.set_redirect(policy)
        pod = self._pod(cluster, endpoints, name)
        if pod is None:
            return lambda balancer: balancer.remove_pod(*name)
        return lambda balancer: balancer.set_pod(pod)

    def _pod(self, cluster: ClusterObjects, endpoints: EndpointTable, name: tuple[str, str]) -> PodPorts | None:
        """Return a pod of this node, with the addresses that it has here; None: not here, or it has ended.

        Its status may name an address long after it was given back here, even to another pod: that counts only where
        nothing is given, on the host's network.
        """
        pod = cluster.pods.get(name)
        if pod is None or pod.ports is None or pod.node_name != self._node.name:
            return None
        if pod.ports.host_network:
            return pod.ports
        return replace(pod.ports, addresses=tuple(ip_address(one) for one in endpoints.addresses_of(*name)))

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
            try:
                await self._pass_once()
                self._done = number
            except Exception as error:  # whatever it is, the agent goes on and the services with it
                self._failed(error)
            self._tried = number
            async with self._passed:
                self._passed.notify_all()

    async def _pass_once(self) -> None:
        changes, self._changes = self._changes, deque()
        try:
            self.last = await asyncio.to_thread(self._pass, changes)
        finally:
            self._changes.extendleft(reversed(changes))
        if self.last.untold:
            self._again()
        self.health.want(self._balancer.health())

    def _pass(self, changes: deque[Change]) -> ServicePass:
        """Take changes, each of which is out of ``changes`` then, and bring what comes of them in force."""
        began = time.perf_counter()
        while changes:
            self._learn(*changes[0])
            changes.popleft()
        known = dict(self._balancer.broken)
        fresh = self._balancer.changes()
        for owner, error in self._balancer.broken.items():
            if known.get(owner) is not error:
                log.error("object-not-served", object=str(owner), exc_info=error)
        for owner, frontends in fresh.items():
            self._note(owner, frontends)
        self._unwritten |= fresh
        for one in (backend for frontends in fresh.values() for at in frontends for backend in at.backends):
            self._untold.pop(_end(one), None)
        outcome = self._programmer.apply(self._unwritten, complete=not self._pruned)
        self._unwritten = {}
        self._pruned, self._garbage = True, True
        self._untold |= {_end(one): one for one in outcome.gone}
        return ServicePass(
            changed=len(fresh),
            took=time.perf_counter() - began,
            untold=self._tell(),
            refused=dict(outcome.problems),
            problems=_merged(self._balancer.problems(), self._broken | self._balancer.broken),
        )

    def _learn(self, owner: Owner, change: Callable[[LoadBalancer], object]) -> None:
        """Take one change. One that fails is its object's problem until that changes, not that of all others."""
        try:
            change(self._balancer)
        except Exception as error:
            log.exception("object-not-served", object=str(owner))
            self._broken[owner] = error
        else:
            self._broken.pop(owner, None)

    def _failed(self, error: Exception) -> None:
        """Have a pass repeated: what was not written is kept."""
        log.exception("services-failed")
        why = error if isinstance(error, OSError) else repr(error)
        self.last = replace(self.last, error=f"the datapath refused a change of services: {why}")
        self._again()

    def _again(self) -> None:
        asyncio.get_running_loop().call_later(_AGAIN, self._wake.set)

    async def _collect(self) -> None:
        """Free what changes have left; what did not fit may fit then."""
        self._garbage = False
        try:
            await asyncio.to_thread(self._programmer.collect)
        except Exception as error:
            self._failed(error)
        if self._programmer.waiting:
            self._wake.set()

    def _tell(self) -> str:
        """Tell sockets that their backends are gone; return what is wrong: then they are told later."""
        if not self._untold:
            return ""
        try:
            self._notify(tuple(self._untold.values()))
        except Exception as error:
            problem = f"sockets of removed backends cannot be told: {error}"
            if problem != self.last.untold:
                log.warning("sockets-not-told", problem=str(error))
            return problem
        self._untold = {}
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
        found += [f"{owner}: {text}" for owner, text in self.health.problems().items()]
        return [*self.failures(), *([last.untold] if last.untold else []), *sorted(found)]

    def failures(self) -> list[str]:
        """Return what the datapath has not taken: the last pass as a whole, and single objects."""
        refused = [f"{owner}: {text}" for owner, text in sorted(self.last.refused.items())]
        return [*([self.last.error] if self.last.error else []), *refused]

    def problems_of(self, owner: Owner) -> list[str]:
        """Return what is not served as one object says."""
        refused = [text for text in (self.last.refused.get(owner), self.health.problems().get(owner)) if text]
        return [*self.last.problems.get(owner, ()), *refused]


def _end(one: Backend) -> tuple[Address, int, int]:
    return one.address, one.port, one.protocol


def _merged(
    problems: Mapping[Owner, tuple[str, ...]], broken: Mapping[Owner, Exception]
) -> dict[Owner, tuple[str, ...]]:
    texts = {owner: f"the load balancer fails on it: {error!r}" for owner, error in broken.items()}
    return {**problems, **{owner: (*problems.get(owner, ()), text) for owner, text in texts.items()}}
