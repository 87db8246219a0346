"""The load balancer of a node: objects go in, in any order, and frontends that changed come out.

What is in force depends on the objects that there are, not on how they came: the same objects give the same frontends.
A change costs what its own service, pod or policy costs, however many others there are.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeVar

from ciliate.loadbalancer.arbiter import Arbiter
from ciliate.loadbalancer.hostports import rule_on_pod
from ciliate.loadbalancer.model import (
    Address,
    Changes,
    EndpointSlice,
    HealthCheck,
    LocalNode,
    Owner,
    PodPorts,
    Service,
)
from ciliate.loadbalancer.redirect import LocalRedirectPolicy, rule_on_redirect
from ciliate.loadbalancer.rules import NOTHING, Ruling, rule_on_service

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")
_Key = tuple[str, str]
"""(namespace, name)."""


@dataclass(slots=True, eq=False)
class _Service:
    """A service with its slices; either may come first."""

    owner: Owner
    service: Service | None = None
    slices: dict[str, EndpointSlice] = field(default_factory=dict)

    def in_order(self) -> list[EndpointSlice]:
        if len(self.slices) < 2:
            return list(self.slices.values())
        return [one for _, one in sorted(self.slices.items())]


class LoadBalancer:
    """Services, slices, local pods and redirects of this node. Setting what is there already costs nothing."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._services: dict[_Key, _Service] = {}
        self._slices: dict[_Key, EndpointSlice] = {}
        self._pods: dict[str, dict[str, PodPorts]] = {}
        """By namespace."""
        self._redirects: dict[str, dict[str, LocalRedirectPolicy]] = {}
        """By namespace."""
        self._redirected: dict[_Key, set[str]] = {}
        """Names of the policies that name a service, which are of its namespace."""
        self._by_ingress: dict[Address, set[_Key]] = {}
        self._stale_services: dict[_Key, None] = {}
        self._stale_pods: dict[_Key, None] = {}
        self._stale_redirects: dict[_Key, None] = {}
        self._arbiter = Arbiter()
        self._health = _Health()
        self.broken: dict[Owner, Exception] = {}
        """Objects that ``changes`` failed on, a defect: what they said before is in force until they change."""

    # ---- what there is ---------------------------------------------------------------------------------------------

    def set_node(self, node: LocalNode) -> None:
        """Take what is known of this node now. Other addresses cost the services that have them as ingress addresses,
        anything else costs as much as everything anew.
        """
        old, self._node = self._node, node
        if replace(old, addresses=node.addresses) != node:
            self._stale_services.update(dict.fromkeys(self._services))
            self._stale_pods.update(dict.fromkeys(_keys(self._pods)))
            self._stale_redirects.update(dict.fromkeys(_keys(self._redirects)))
            return
        for address in old.addresses ^ node.addresses:
            self._stale_services.update(dict.fromkeys(self._by_ingress.get(address, ())))

    def set_service(self, service: Service) -> None:
        """Add a service, or take its new version."""
        key = (service.namespace, service.name)
        entry = self._service(key)
        if entry.service == service:
            return
        self._index_ingress(key, entry.service, service)
        entry.service = service
        self._touch_service(key)
        self._touch_redirects(key)

    def remove_service(self, owner: Owner | tuple[str, str]) -> None:
        """Take a service out; none: nothing happens. Its slices stay until they are removed."""
        key = owner if isinstance(owner, tuple) else (owner.namespace, owner.name)
        entry = self._services.get(key)
        if entry is None or entry.service is None:
            return
        self._index_ingress(key, entry.service, None)
        entry.service = None
        self._touch_service(key)
        self._touch_redirects(key)

    def set_slice(self, one: EndpointSlice) -> None:
        """Add a slice, or take its new version, which may be of another service."""
        key = (one.namespace, one.name)
        old = self._slices.get(key)
        if old == one:
            return
        if old is not None and old.service != one.service:
            self._drop_slice(old)
        self._slices[key] = one
        if one.service:
            target = (one.namespace, one.service)
            self._service(target).slices[one.name] = one
            self._touch_service(target)

    def remove_slice(self, namespace: str, name: str) -> None:
        """Take a slice out; none: nothing happens."""
        if (old := self._slices.pop((namespace, name), None)) is not None:
            self._drop_slice(old)

    def set_pod(self, pod: PodPorts) -> None:
        """Add a pod of this node, or take its new version."""
        pods = self._pods.setdefault(pod.namespace, {})
        if pods.get(pod.name) == pod:
            return
        pods[pod.name] = pod
        self._touch_pod(pod.namespace, pod.name)

    def remove_pod(self, namespace: str, name: str) -> None:
        """Take a pod out; none: nothing happens."""
        if _take(self._pods, namespace, name) is not None:
            self._touch_pod(namespace, name)

    def set_redirect(self, policy: LocalRedirectPolicy) -> None:
        """Add a redirect, or take its new version."""
        policies = self._redirects.setdefault(policy.namespace, {})
        old = policies.get(policy.name)
        if old == policy:
            return
        self._index_redirect(old, policy)
        policies[policy.name] = policy
        self._stale_redirects[(policy.namespace, policy.name)] = None

    def remove_redirect(self, namespace: str, name: str) -> None:
        """Take a redirect out; none: nothing happens."""
        if (old := _take(self._redirects, namespace, name)) is not None:
            self._index_redirect(old, None)
            self._stale_redirects[(namespace, name)] = None

    # ---- what comes of it ------------------------------------------------------------------------------------------

    def changes(self) -> Changes:
        """Return all frontends of every owner whose frontends changed since the last call."""
        self._rule("Service", self._stale_services, lambda namespace, name: self._rule_on_service((namespace, name)))
        self._rule("Pod", self._stale_pods, self._rule_on_pod)
        self._rule("CiliumLocalRedirectPolicy", self._stale_redirects, self._rule_on_redirect)
        self._stale_services.clear()
        self._stale_pods.clear()
        self._stale_redirects.clear()
        return self._arbiter.settle()

    def _rule(self, kind: str, keys: Iterable[_Key], rule: Callable[[str, str], None]) -> None:
        """Rule on objects. One that fails must not keep the others from being served."""
        for key in keys:
            owner = Owner(kind, *key)
            try:
                rule(*key)
            except Exception as error:
                self.broken[owner] = error
            else:
                self.broken.pop(owner, None)

    def health(self) -> Mapping[int, HealthCheck]:
        """Return what each ``healthCheckNodePort`` answers, as of the last call of ``changes``: a live view."""
        return self._health.answers

    def problems(self) -> Mapping[Owner, tuple[str, ...]]:
        """Return what is wrong with which object, as of the last call of ``changes``."""
        found = dict(self._arbiter.problems)
        for owner, problem in self._health.problems.items():
            found[owner] = (*found.get(owner, ()), problem)
        return found

    @property
    def idle(self) -> bool:
        """Whether nothing is kept: for tests, after everything was taken away."""
        kept = (
            *(self._services, self._slices, self._pods, self._redirects, self._redirected, self._by_ingress),
            *(self._stale_services, self._stale_pods, self._stale_redirects),
            *(self._health.answers, self._health.problems),
        )
        return self._arbiter.idle and not any(kept)

    # ---- rulings ---------------------------------------------------------------------------------------------------

    def _rule_on_service(self, key: _Key) -> None:
        entry = self._services[key]
        service = entry.service
        ruling = NOTHING if service is None else rule_on_service(service, entry.in_order(), self._node)
        self._health.set(entry.owner, ruling.health)
        self._arbiter.offer(entry.owner, service.created if service else "", ruling.frontends, ruling.problems)
        if service is None and not entry.slices:
            del self._services[key]

    def _rule_on_pod(self, namespace: str, name: str) -> None:
        pod = self._pods.get(namespace, {}).get(name)
        ruling = NOTHING if pod is None else rule_on_pod(pod, self._node)
        owner = Owner("Pod", namespace, name)
        self._arbiter.offer(owner, pod.created if pod else "", ruling.frontends, ruling.problems)

    def _rule_on_redirect(self, namespace: str, name: str) -> None:
        policy = self._redirects.get(namespace, {}).get(name)
        if policy is None:
            self._arbiter.offer(Owner("CiliumLocalRedirectPolicy", namespace, name), "", ())
            return
        ruling = self._ruling_on(policy)
        self._arbiter.offer(policy.owner, policy.created, ruling.frontends, ruling.problems, policy.overrides)

    def _ruling_on(self, policy: LocalRedirectPolicy) -> Ruling:
        entry = self._services.get((policy.namespace, policy.service)) if policy.service else None
        pods = self._pods.get(policy.namespace, {}).values()
        return rule_on_redirect(policy, entry.service if entry else None, pods, self._node)

    # ---- what depends on what --------------------------------------------------------------------------------------

    def _service(self, key: _Key) -> _Service:
        entry = self._services.get(key)
        if entry is None:
            entry = self._services[key] = _Service(Owner("Service", *key))
        return entry

    def _touch_service(self, key: _Key) -> None:
        self._stale_services[key] = None

    def _touch_redirects(self, key: _Key) -> None:
        for name in self._redirected.get(key, ()):
            self._stale_redirects[(key[0], name)] = None

    def _touch_pod(self, namespace: str, name: str) -> None:
        self._stale_pods[(namespace, name)] = None
        for policy in self._redirects.get(namespace, ()):
            self._stale_redirects[(namespace, policy)] = None

    def _drop_slice(self, old: EndpointSlice) -> None:
        if old.service:
            target = (old.namespace, old.service)
            self._services[target].slices.pop(old.name)
            self._touch_service(target)

    def _index_ingress(self, key: _Key, old: Service | None, new: Service | None) -> None:
        for address in old.ingress_ips if old else ():
            _unfile(self._by_ingress, address, key)
        for address in new.ingress_ips if new else ():
            self._by_ingress.setdefault(address, set()).add(key)

    def _index_redirect(self, old: LocalRedirectPolicy | None, new: LocalRedirectPolicy | None) -> None:
        if old is not None and old.service:
            _unfile(self._redirected, (old.namespace, old.service), old.name)
        if new is not None and new.service:
            self._redirected.setdefault((new.namespace, new.service), set()).add(new.name)


class _Health:
    """Who answers on which port. Of several services with one port the first by name does."""

    def __init__(self) -> None:
        self._of: dict[Owner, HealthCheck] = {}
        self._on: dict[int, dict[Owner, HealthCheck]] = {}
        self._answers: dict[int, HealthCheck] = {}
        self.answers: Final[Mapping[int, HealthCheck]] = MappingProxyType(self._answers)
        self.problems: dict[Owner, str] = {}
        """Of services whose port another one answers on."""

    def set(self, owner: Owner, check: HealthCheck | None) -> None:
        old = self._of.get(owner)
        if old == check:
            return
        if old is not None:
            self._on[old.port].pop(owner)
            del self._of[owner]
            self.problems.pop(owner, None)
            self._answer(old.port)
        if check is not None:
            self._on.setdefault(check.port, {})[owner] = check
            self._of[owner] = check
            self._answer(check.port)

    def _answer(self, port: int) -> None:
        if checks := self._on[port]:
            first = min(checks)
            self._answers[port] = checks[first]
            self.problems.pop(first, None)
            others = (owner for owner in checks if owner != first)
            self.problems.update(dict.fromkeys(others, f"healthCheckNodePort {port}: {first} answers on it"))
        else:
            del self._on[port]
            self._answers.pop(port, None)


def _keys(by_namespace: Mapping[str, Iterable[str]]) -> Iterator[_Key]:
    return ((namespace, name) for namespace, names in by_namespace.items() for name in names)


def _take(by_namespace: dict[str, dict[str, _V]], namespace: str, name: str) -> _V | None:
    found = by_namespace.get(namespace, {})
    one = found.pop(name, None)
    if not found:
        by_namespace.pop(namespace, None)
    return one


def _unfile(index: dict[_K, set[_V]], key: _K, value: _V) -> None:
    if (found := index.get(key)) is not None:
        found.discard(value)
        if not found:
            del index[key]
