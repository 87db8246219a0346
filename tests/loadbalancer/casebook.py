"""Reads ``cases/*.yaml`` and runs one: Kubernetes objects in, a table of frontends out.

A file has ``objects`` by name and ``cases``. A case takes objects ``with`` their names, or ``{of: name, ...}`` with a
merge patch on them, and tells what comes of them in ``gives``: a line for each frontend, its scope, kind and flags,
then its backends. Marks of a backend: ``*`` it is local, ``~`` it terminates, ``x3`` its weight if that is not 1.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from ciliate.k8s.objects import parse_pod
from ciliate.k8s.redirects import parse_local_redirect
from ciliate.k8s.services import parse_endpoint_slice, parse_service
from ciliate.loadbalancer.model import (
    Algorithm,
    Backend,
    EndpointSlice,
    Forwarding,
    Frontend,
    FrontendAddress,
    LocalNode,
    Owner,
    PodPorts,
    Service,
)
from ciliate.loadbalancer.redirect import LocalRedirectPolicy
from ciliate.loadbalancer.rules import PROTOCOL_NAMES
from ciliate.loadbalancer.table import LoadBalancer

CASES = Path(__file__).parent / "cases"
Object = Service | EndpointSlice | PodPorts | LocalRedirectPolicy


@dataclass(frozen=True)
class Case:
    """One case. ``given``: raw Kubernetes objects."""

    file: str
    name: str
    node: LocalNode
    given: tuple[Mapping[str, Any], ...]
    gives: str
    problems: Mapping[str, list[str]]
    health: Mapping[int, int]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def objects(self) -> list[Object]:
        return [parsed(one) for one in self.given]


def cases() -> Iterator[Case]:
    for path in sorted(CASES.glob("*.yaml")):
        book = yaml.safe_load(path.read_text())
        for one in book["cases"]:
            unknown = one.keys() - {"name", "with", "node", "gives", "problems", "health"}
            assert not unknown, f"{path.name}: {one['name']}: {unknown}"
            yield Case(
                file=path.stem,
                name=one["name"],
                node=node_of(one.get("node", {})),
                given=tuple(_given(book["objects"], entry) for entry in one["with"]),
                gives=one.get("gives", ""),
                problems=one.get("problems", {}),
                health=one.get("health", {}),
            )


def node_of(raw: Mapping[str, Any]) -> LocalNode:
    return LocalNode(
        name=raw.get("name", "here"),
        zone=raw.get("zone", "a"),
        labels=raw.get("labels", {}),
        families=frozenset(raw.get("families", (4, 6))),
        addresses=frozenset(ip_address(one) for one in raw.get("addresses", ())),
        algorithm=Algorithm(raw.get("algorithm", "random")),
        forwarding=Forwarding(raw.get("forwarding", "snat")),
    )


def _given(objects: Mapping[str, Any], entry: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(entry, str):
        return dict(objects[entry])
    patch = dict(entry)
    return _merged(objects[patch.pop("of")], patch)


def _merged(base: Any, patch: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(patch, dict):
        return patch
    both = {**base, **{key: _merged(base.get(key), value) for key, value in patch.items()}}
    return {key: value for key, value in both.items() if value is not None}


def parsed(raw: Mapping[str, Any]) -> Object:
    match raw["kind"]:
        case "Service":
            return parse_service(raw)
        case "EndpointSlice":
            return parse_endpoint_slice(raw)
        case "Pod":
            ports = parse_pod(raw).ports
            assert ports is not None
            return ports
        case "CiliumLocalRedirectPolicy":
            return parse_local_redirect(raw)
        case kind:
            raise AssertionError(kind)


# ---- one load balancer, and what it told ---------------------------------------------------------------------------


class Watched:
    """A load balancer whose changes are collected, as a reconciler would."""

    def __init__(self, node: LocalNode) -> None:
        self.table = LoadBalancer(node)
        self.told: dict[Owner, tuple[Frontend, ...]] = {}

    def add(self, one: Object) -> None:
        setters: dict[type, Callable[[Any], None]] = {
            Service: self.table.set_service,
            EndpointSlice: self.table.set_slice,
            PodPorts: self.table.set_pod,
            LocalRedirectPolicy: self.table.set_redirect,
        }
        setters[type(one)](one)

    def remove(self, one: Object) -> None:
        match one:
            case Service():
                self.table.remove_service(one.owner)
            case EndpointSlice():
                self.table.remove_slice(one.namespace, one.name)
            case PodPorts():
                self.table.remove_pod(one.namespace, one.name)
            case LocalRedirectPolicy():
                self.table.remove_redirect(one.namespace, one.name)

    def collect(self) -> "Watched":
        for owner, frontends in self.table.changes().items():
            assert frontends != self.told.get(owner, ()), f"{owner} was told though nothing changed"
            if frontends:
                self.told[owner] = frontends
            else:
                del self.told[owner]
        places = [one.at for frontends in self.told.values() for one in frontends]
        assert len(places) == len(set(places)), "an address has two frontends"
        return self

    def state(self) -> tuple[Any, ...]:
        """Return everything that can be seen of it."""
        return dict(self.told), dict(self.table.health()), dict(self.table.problems())


def arrivals(objects: Sequence[Object]) -> Iterator[list[Object]]:
    """Yield orders in which objects may come: as written, backwards, and shuffled."""
    yield list(objects)
    yield list(reversed(objects))
    dice = random.Random(len(objects))
    for _ in range(4):
        yield dice.sample(objects, len(objects))


# ---- the table's text ----------------------------------------------------------------------------------------------


def table(frontends: Iterable[Frontend]) -> list[str]:
    """Return the lines that a case tells: sorted by address, one for both scopes where they are alike."""
    both: dict[tuple[Any, ...], list[tuple[FrontendAddress, str]]] = {}
    for one in sorted(frontends, key=lambda one: _sorted_by(one.at)):
        at = one.at
        where = f"[{at.address}]" if at.address.version == 6 else str(at.address)
        if at.port:
            where += f":{at.port}/{PROTOCOL_NAMES[at.protocol]}"
        rest = " ".join(filter(None, (one.owner.name, one.port_name, str(one.kind), *_flags(one), "->", _served(one))))
        both.setdefault((at.address.version, int(at.address), at.port, at.protocol, where, rest), []).append((at, ""))
    lines = []
    for (*_, where, rest), places in both.items():
        scope = "both" if len(places) == 2 else places[0][0].scope.name.lower()
        lines.append(f"{where} {scope} {rest}")
    return lines


def _sorted_by(at: FrontendAddress) -> tuple[int, int, int, int, int]:
    return at.address.version, int(at.address), at.port, at.protocol, at.scope


def _flags(one: Frontend) -> Iterator[str]:
    if one.local:
        yield "local"
    if one.algorithm is not Algorithm.RANDOM:
        yield one.algorithm
    if one.forwarding is not Forwarding.SNAT:
        yield one.forwarding
    if one.affinity:
        yield f"affinity={one.affinity}"
    if one.source_ranges:
        yield ("not-from=" if one.source_deny else "from=") + ",".join(map(str, one.source_ranges))
    if one.skips:
        yield "skips=" + ",".join(map(str, one.skips))


def _served(one: Frontend) -> str:
    found = [_backend(backend) for backend in one.backends]
    if not any(backend.weight for backend in one.backends):
        found.append("drop" if one.drop else "reject")
    else:
        assert not one.drop, "dropped, though somebody serves it"
    return " ".join(found)


def _backend(one: Backend) -> str:
    where = f"[{one.address}]" if one.address.version == 6 else str(one.address)
    marks = ("*" if one.local else "") + ("~" if one.terminating else "")
    return f"{where}:{one.port}{marks}" + (f"x{one.weight}" if one.weight != 1 else "")
