"""What a Service's annotations and labels ask for. Names and values are those of Cilium and Kubernetes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from ciliate.identity.labels import Labels, k8s
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.loadbalancer.model import Algorithm, Forwarding, FrontendKind, LocalNode, Service

PREFIX: Final = "service.cilium.io/"
SERVICE_PROXY_NAME: Final = "service.kubernetes.io/service-proxy-name"
HEADLESS: Final = "service.kubernetes.io/headless"

_T = TypeVar("_T")
_CLUSTER_MESH: Final = frozenset({"global", "global-sync-endpoint-slices", "shared", "affinity"})
_TYPES: Final = {
    "clusterip": FrontendKind.CLUSTER_IP,
    "nodeport": FrontendKind.NODE_PORT,
    "loadbalancer": FrontendKind.LOAD_BALANCER,
}
_EVERY_KIND: Final = frozenset(_TYPES.values())
_TERM: Final = re.compile(
    r"\s*(?:"
    r"(?P<set>[^\s,!=()]+)\s+(?P<how>in|notin)\s*\(\s*(?P<values>[^()]*?)\s*\)"
    r"|(?P<key>[^\s,!=()]+)\s*(?P<sign>==|!=|=)\s*(?P<value>[^\s,!=()]*)"
    r"|(?P<absent>!)?\s*(?P<bare>[^\s,!=()]+)"
    r")\s*(?P<end>,|$)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What annotations and labels make of a service. ``here``: whether it is served on this node at all."""

    here: bool = True
    exposed: frozenset[FrontendKind] = _EVERY_KIND
    algorithm: Algorithm = Algorithm.RANDOM
    forwarding: Forwarding = Forwarding.SNAT
    source_deny: bool = False
    problems: tuple[str, ...] = ()


def label_set(labels: Mapping[str, str]) -> Labels:
    """Return an object's labels in the form that selectors match."""
    return frozenset(k8s(key, value) for key, value in labels.items())


def parse_selector(text: str) -> Selector:
    """Return a label selector written as text (``a=b,c in (d,e),!f``). Error: ValueError, which cites it."""
    found: list[Requirement] = []
    at = 0
    while at < len(text.rstrip()):
        term = _TERM.match(text, at)
        if term is None or (term["end"] and term.end() == len(text)):
            raise ValueError(f"{text!r} is not a label selector")
        found.append(_requirement(term))
        at = term.end()
    return Selector(requirements=tuple(found))


def _requirement(term: re.Match[str]) -> Requirement:
    if term["set"]:
        operator = Operator.IN if term["how"] == "in" else Operator.NOT_IN
        values = tuple(one.strip() for one in term["values"].split(","))
        return Requirement(key=f"k8s:{term['set']}", operator=operator, values=values)
    if term["key"]:
        operator = Operator.NOT_IN if term["sign"] == "!=" else Operator.IN
        return Requirement(key=f"k8s:{term['key']}", operator=operator, values=(term["value"],))
    operator = Operator.DOES_NOT_EXIST if term["absent"] else Operator.EXISTS
    return Requirement(key=f"k8s:{term['bare']}", operator=operator)


def served_by_others(service: Service) -> bool:
    """Whether the service is none of our business: it names another proxy, or says that it is headless."""
    return SERVICE_PROXY_NAME in service.labels or HEADLESS in service.labels


def wishes_of(service: Service, node: LocalNode) -> Wishes:
    """Return what a service asks for on this node. A value that makes no sense counts as not given, with a problem."""
    given = {key.removeprefix(PREFIX): value for key, value in service.annotations.items() if key.startswith(PREFIX)}
    if not given:
        return Wishes(algorithm=node.algorithm, forwarding=node.forwarding)
    reader = _Reader(given)
    chosen = Wishes(
        here=reader.here(node),
        exposed=reader.one_of("type", {key: frozenset({kind}) for key, kind in _TYPES.items()}, _EVERY_KIND),
        algorithm=reader.one_of("lb-algorithm", {one.value: one for one in Algorithm}, node.algorithm),
        forwarding=reader.one_of("forwarding-mode", {one.value: one for one in Forwarding}, node.forwarding),
        source_deny=reader.one_of("src-ranges-policy", {"allow": False, "deny": True}, False),
    )
    reader.one_of("proxy-delegation", {"none": None}, None)
    reader.others()
    return replace(chosen, problems=tuple(sorted(reader.problems)))


class _Reader:
    """Reads annotations, notes which were read, and what is wrong with them."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self._read: set[str] = set()
        self.problems: list[str] = []

    def one_of(self, name: str, values: Mapping[str, _T], default: _T) -> _T:
        self._read.add(name)
        if (text := self._given.get(name)) is None:
            return default
        if (key := text.strip().lower()) in values:
            return values[key]
        self.problems.append(f"annotation {PREFIX}{name}: {text!r} is not one of: {', '.join(values)}; ignored")
        return default

    def here(self, node: LocalNode) -> bool:
        """The selector wins over the name, as under Cilium."""
        self._read |= {"node", "node-selector"}
        if (text := self._given.get("node-selector")) is not None:
            try:
                return parse_selector(text).matches(label_set(node.labels))
            except ValueError as error:
                self.problems.append(f"annotation {PREFIX}node-selector: {error}; ignored")
                return True
        name = self._given.get("node")
        return name is None or node.labels.get(f"{PREFIX}node") == name

    def others(self) -> None:
        for name in self._given.keys() - self._read:
            if name in _CLUSTER_MESH:
                self.problems.append(f"annotation {PREFIX}{name}: has no effect without a cluster mesh")
            else:
                self.problems.append(f"annotation {PREFIX}{name}: is not known; ignored")
