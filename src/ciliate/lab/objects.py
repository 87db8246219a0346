"""The lab's API server: one JSON file per object, in the directory that every agent watches.

``plan`` is pure: it turns what is there and what is asked for into what must be written. A Deployment's pods are
objects of their own (``NAME-1`` ... ``NAME-N``), as a controller would make them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from ciliate.k8s.manifests import ManifestError, ObjectKey, Raw, object_key, parse_documents
from ciliate.k8s.objects import ObjectError, parse_namespace, parse_node, parse_pod
from ciliate.k8s.services import parse_endpoint_slice, parse_service
from ciliate.lab import balancers, hostports
from ciliate.lab.services import admit_all
from ciliate.lab.topology import LabError
from ciliate.policy.parse import API_VERSIONS, parse_cidr_group, parse_object
from ciliate.policy.rules import PolicyError

Objects = Mapping[ObjectKey, Raw]
Change = Literal["created", "configured", "unchanged", "deleted"]
OWNER: Final = "ciliate.io/owned-by"
_OTHERS: Final[Mapping[str, str]] = {
    "Namespace": "v1",
    "Node": "v1",
    "Pod": "v1",
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "CiliumCIDRGroup": "cilium.io/v2",
    "CiliumLocalRedirectPolicy": "cilium.io/v2",
    "CiliumLoadBalancerIPPool": "cilium.io/v2",
    "Deployment": "apps/v1",
}
_OLDER: Final[Mapping[str, str]] = {"CiliumLoadBalancerIPPool": "cilium.io/v2alpha1"}
_PARSERS: Final[Mapping[str, Callable[[Raw], object]]] = {
    "Namespace": parse_namespace,
    "Node": parse_node,
    "Service": parse_service,
    "EndpointSlice": parse_endpoint_slice,
    "CiliumCIDRGroup": parse_cidr_group,
    "CiliumLocalRedirectPolicy": balancers.check_redirect_policy,
    "CiliumLoadBalancerIPPool": balancers.check_pool,
}
KINDS: Final[Mapping[str, str]] = {**_OTHERS, **API_VERSIONS}
"""Kinds that the lab takes, with their apiVersion."""
ALIASES: Final[Mapping[str, str]] = {
    "ns": "Namespace", "no": "Node", "po": "Pod", "svc": "Service", "deploy": "Deployment", "netpol": "NetworkPolicy",
    "cnp": "CiliumNetworkPolicy", "ccnp": "CiliumClusterwideNetworkPolicy", "ccg": "CiliumCIDRGroup",
    "networkpolicies": "NetworkPolicy", "ciliumnetworkpolicies": "CiliumNetworkPolicy",
    "ciliumclusterwidenetworkpolicies": "CiliumClusterwideNetworkPolicy",
    "clusternetworkpolicies": "ClusterNetworkPolicy",
    "eps": "EndpointSlice", "clrp": "CiliumLocalRedirectPolicy", "ippool": "CiliumLoadBalancerIPPool",
    "ciliumlocalredirectpolicies": "CiliumLocalRedirectPolicy", "lbippool": "CiliumLoadBalancerIPPool",
    "ippools": "CiliumLoadBalancerIPPool", "lbippools": "CiliumLoadBalancerIPPool",
}  # fmt: skip
_SUFFIXES: Final = (".yaml", ".yml", ".json")


def kind_of(word: str) -> str:
    """Return the kind that a word of the command line means: ``pods``, ``po``, ``Pod``. Error: LabError."""
    lower = word.lower()
    if lower in ALIASES:
        return ALIASES[lower]
    for kind in KINDS:
        if lower in (kind.lower(), f"{kind.lower()}s"):
            return kind
    raise LabError(f"kind {word}: there is none in the lab; it has {', '.join(sorted(KINDS))}")


def text_of(key: ObjectKey) -> str:
    """Return how kubectl names an object: ``pod default/api-1``."""
    return f"{key.kind.lower()} {key.namespace + '/' if key.namespace else ''}{key.name}"


# ---- reading -------------------------------------------------------------------------------------------------------


def read_sources(sources: Sequence[Path], stdin: str = "") -> dict[ObjectKey, Raw]:
    """Return the objects of files and directories; ``-`` is standard input. Error: LabError: it names the file."""
    found: dict[ObjectKey, Raw] = {}
    for source in sources:
        for path, text in _texts(source, stdin):
            try:
                for key, raw in parse_documents(text, path):
                    if key in found:
                        raise LabError(f"{path}: {text_of(key)} is there twice")
                    found[key] = raw
            except ManifestError as error:
                raise LabError(str(error)) from error
    if not found:
        raise LabError(f"{', '.join(map(str, sources))}: no objects in there")
    return found


def _texts(source: Path, stdin: str) -> list[tuple[str, str]]:
    if str(source) == "-":
        return [("standard input", stdin)]
    paths = [source]
    if source.is_dir():
        paths = sorted(one for one in source.iterdir() if one.suffix in _SUFFIXES)
    try:
        return [(str(path), path.read_text()) for path in paths]
    except OSError as error:
        raise LabError(f"{error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"{source}: not a text file ({error.reason})") from error


def validate(key: ObjectKey, raw: Raw) -> None:
    """Error: LabError, which names object and field."""
    if key.kind not in KINDS:
        raise LabError(f"{text_of(key)}: kind {key.kind} is not known to the lab; it takes {', '.join(sorted(KINDS))}")
    if raw.get("apiVersion") not in (KINDS[key.kind], _OLDER.get(key.kind)):
        raise LabError(f"{text_of(key)}: apiVersion: {raw.get('apiVersion')!r} is not {KINDS[key.kind]}")
    _validate_name(key)
    try:
        match key.kind:
            case "Pod":
                parse_pod(raw)
                _containers(key, raw)
            case "Deployment":
                for child, pod in expand(key, raw).items():
                    validate(child, pod)
            case kind if kind in _PARSERS:
                _PARSERS[kind](raw)
            case kind if kind in API_VERSIONS:
                parse_object(raw)
    except (PolicyError, ObjectError) as error:
        raise LabError(str(error)) from error


def _validate_name(key: ObjectKey) -> None:
    for what, name in (("metadata.name", key.name), ("metadata.namespace", key.namespace or "x")):
        labels = name.split(".")
        if len(name) > 253 or not all(_dns_label(label) for label in labels):
            raise LabError(f"{text_of(key)}: {what}: {name!r} is not a DNS name of lower case letters, digits, - and .")


def _dns_label(text: str) -> bool:
    plain = text.replace("-", "")
    return bool(plain) and plain.isascii() and plain.isalnum() and plain == plain.lower() and text.strip("-") == text


# ---- pods ----------------------------------------------------------------------------------------------------------


class HttpGet(msgspec.Struct, kw_only=True, rename="camel"):
    """A probe's request."""

    port: int | str
    path: str = "/"


class TcpSocket(msgspec.Struct, kw_only=True):
    """A probe that only connects."""

    port: int | str


class Probe(msgspec.Struct, kw_only=True, rename="camel"):
    """``readinessProbe``, as far as the lab executes it."""

    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    timeout_seconds: float = 1

    @property
    def port(self) -> int | str:
        """The port that it asks, 0 for none."""
        asked = self.http_get or self.tcp_socket
        return asked.port if asked else 0


class _FieldRef(msgspec.Struct, kw_only=True, rename="camel"):
    field_path: str


class _ValueFrom(msgspec.Struct, kw_only=True, rename="camel"):
    field_ref: _FieldRef | None = None


class EnvVar(msgspec.Struct, kw_only=True, rename="camel"):
    """An environment variable: a value, or a field of the pod."""

    name: str
    value: str = ""
    value_from: _ValueFrom | None = None

    @property
    def field_path(self) -> str:
        """The pod's field that it takes its value from, "" for none."""
        return self.value_from.field_ref.field_path if self.value_from and self.value_from.field_ref else ""


class _Port(msgspec.Struct, kw_only=True, rename="camel"):
    container_port: int
    name: str = ""


class Container(msgspec.Struct, kw_only=True, rename="camel"):
    """A container: a command of the host's file system. Without one there is nothing to run."""

    name: str = "main"
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    ports: list[_Port] = []
    readiness_probe: Probe | None = None
    working_dir: str | None = None

    def port(self, wanted: int | str) -> int:
        """Return a port by number or name. Error: LabError."""
        if isinstance(wanted, int):
            return wanted
        for one in self.ports:
            if one.name == wanted:
                return one.container_port
        raise LabError(f"container {self.name}: it has no port named {wanted}")


class _Spec(msgspec.Struct, kw_only=True, rename="camel"):
    containers: list[Container] = []
    termination_grace_period_seconds: float = 2
    """Kubernetes waits 30 seconds where it is not set."""


class _Pod(msgspec.Struct, kw_only=True):
    spec: _Spec


def containers_of(raw: Raw) -> list[Container]:
    """Return a valid pod's containers."""
    return msgspec.convert(raw, _Pod).spec.containers


def grace_of(raw: Raw) -> float:
    """Return the seconds that a valid pod's processes have between SIGTERM and SIGKILL."""
    return max(0.0, msgspec.convert(raw, _Pod).spec.termination_grace_period_seconds)


def _containers(key: ObjectKey, raw: Raw) -> None:
    try:
        found = containers_of(raw)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).rpartition(" - at ")
        raise LabError(f"{text_of(key)}: {where.strip('`$.')}: {problem}") from error
    for one in found:
        if one.args and not one.command:
            raise LabError(f"{text_of(key)}: container {one.name}: args without command; the lab pulls no images")
        if one.readiness_probe:
            one.port(one.readiness_probe.port)
        for variable in one.env:
            if variable.field_path and variable.field_path not in FIELDS:
                raise LabError(f"{text_of(key)}: container {one.name}: env {variable.name}: {variable.field_path}: "
                               f"the lab knows {', '.join(FIELDS)}")  # fmt: skip
    if len({one.name for one in found}) != len(found):
        raise LabError(f"{text_of(key)}: spec.containers: two have the same name")


FIELDS: Final = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "status.podIP", "status.podIPs",
    "status.hostIP",
)  # fmt: skip


def expand(key: ObjectKey, raw: Raw) -> dict[ObjectKey, Raw]:
    """Return the pods that a Deployment asks for. Error: LabError."""
    spec = raw.get("spec")
    template = spec.get("template") if isinstance(spec, Mapping) else None
    if not isinstance(spec, Mapping) or not isinstance(template, Mapping) or "spec" not in template:
        raise LabError(f"{text_of(key)}: spec.template.spec: must be set")
    replicas = spec.get("replicas", 1)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= 1000:
        raise LabError(f"{text_of(key)}: spec.replicas: {replicas!r} is not in 0..1000")
    metadata = template.get("metadata") or {}
    labels = dict(metadata.get("labels") or {})
    wanted = (spec.get("selector") or {}).get("matchLabels") or {}
    if any(labels.get(name) != value for name, value in wanted.items()):
        raise LabError(f"{text_of(key)}: spec.selector.matchLabels: the template's labels do not match")
    annotations = {**(metadata.get("annotations") or {}), OWNER: f"{key.kind}/{key.name}"}
    found: dict[ObjectKey, Raw] = {}
    for number in range(1, replicas + 1):
        name = f"{key.name}-{number}"
        meta = {"name": name, "namespace": key.namespace, "labels": labels, "annotations": annotations}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": dict(template["spec"])}
        found[ObjectKey("Pod", key.namespace, name)] = pod
    return found


def owner_of(raw: Raw) -> str:
    """Return ``Deployment/NAME`` of a pod that was made for one, else ""."""
    return str((raw.get("metadata", {}).get("annotations") or {}).get(OWNER, ""))


# ---- planning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. ``objects``: all that there will be; ``changes``: by object that was asked for."""

    objects: Objects
    changes: Mapping[ObjectKey, Change]
    write: frozenset[ObjectKey]
    remove: frozenset[ObjectKey]
    start: tuple[ObjectKey, ...] = ()
    stop: tuple[ObjectKey, ...] = field(default=())


def plan(
    present: Objects,
    wanted: Objects,
    deleted: Iterable[ObjectKey],
    nodes: Sequence[str],
    families: tuple[str, ...] = ("IPv4", "IPv6"),
    now: str = "",
) -> Plan:
    """Return how to get from ``present`` to what is asked for. Error: LabError, and nothing is to be done.

    A pod whose spec changes is stopped and started again; one whose labels change keeps running. Pods without a node
    go to the node with the fewest. ``families``: the cluster's; ``now``: in RFC 3339, for what is created.
    """
    gone = set(deleted)
    target: dict[ObjectKey, Raw] = {key: raw for key, raw in present.items() if key not in gone}
    changes: dict[ObjectKey, Change] = dict.fromkeys(sorted(gone), "deleted")
    for key, raw in wanted.items():
        validate(key, raw)
    for key, fresh in _admitted(wanted, target, families).items():
        former = present.get(key)
        fresh = _kept(key, fresh, former, now)
        changes[key] = "created" if former is None else "unchanged" if former == fresh else "configured"
        target[key] = fresh
    _expand_all(target, present, now)
    _check_namespaces(target, wanted)
    hostports.check(target)
    _schedule(target, nodes)
    try:
        target |= balancers.assigned(target, families, now)
    except ObjectError as error:
        raise LabError(str(error)) from error
    write = frozenset(key for key, raw in target.items() if present.get(key) != raw)
    remove = frozenset(present.keys() - target.keys())
    pods = sorted(key for key in write if key.kind == "Pod")
    changed = [key for key in pods if key in present and present[key].get("spec") != target[key].get("spec")]
    return Plan(
        objects=target,
        changes=changes,
        write=write,
        remove=remove,
        start=tuple(key for key in pods if key not in present or key in changed),
        stop=(*(key for key in sorted(remove) if key.kind == "Pod"), *changed),
    )


def _admitted(wanted: Objects, target: Objects, families: tuple[str, ...]) -> dict[ObjectKey, Raw]:
    """Return objects as the API server takes them in."""
    fresh = {key: _normal(key, raw) for key, raw in wanted.items()}
    services = {key: raw for key, raw in fresh.items() if key.kind == "Service"}
    if services:
        fresh |= admit_all(services, {key: raw for key, raw in target.items() if key.kind == "Service"}, families)
    return fresh


def _kept(key: ObjectKey, fresh: Raw, former: Raw | None, now: str) -> Raw:
    """Return an object with what a user does not write: a pod's node, a status, when it was made."""
    if key.kind == "Pod" and former is not None:
        fresh = _keep_node(fresh, former)
    if key.kind not in AGED:
        return fresh
    created = former["metadata"].get("creationTimestamp") if former else now
    metadata = {name: value for name, value in fresh["metadata"].items() if name != "creationTimestamp"}
    if created:
        metadata["creationTimestamp"] = created
    status = former.get("status") if former and (key.kind != "Pod" or former["spec"] == fresh["spec"]) else None
    if status is None and key.kind == "Service":
        status = {"loadBalancer": {}}
    return {**fresh, "metadata": metadata, **({"status": status} if status is not None else {})}


AGED: Final = ("Pod", "Service", "EndpointSlice", "CiliumLocalRedirectPolicy", "CiliumLoadBalancerIPPool")
"""Kinds that remember when they were made, and have a status that others write."""


def _normal(key: ObjectKey, raw: Raw) -> Raw:
    """Return an object as it is stored: with its namespace, without a status."""
    metadata = dict(raw["metadata"])
    metadata["name"] = key.name
    if key.namespace:
        metadata["namespace"] = key.namespace
    body = {name: value for name, value in raw.items() if name not in ("status", "metadata", "apiVersion", "kind")}
    # through JSON, so that what was read from YAML equals what was read back
    document: Raw = msgspec.json.decode(
        msgspec.json.encode({"apiVersion": raw["apiVersion"], "kind": key.kind, "metadata": metadata, **body})
    )
    return document


def _keep_node(fresh: Raw, former: Raw) -> Raw:
    node = former.get("spec", {}).get("nodeName")
    if not node or fresh["spec"].get("nodeName"):
        return fresh
    return {**fresh, "spec": {**fresh["spec"], "nodeName": node}}


def _expand_all(target: dict[ObjectKey, Raw], present: Objects, now: str) -> None:
    """Bring the pods of Deployments in line with them."""
    wanted: dict[ObjectKey, Raw] = {}
    for key in [one for one in target if one.kind == "Deployment"]:
        wanted |= {child: _normal(child, pod) for child, pod in expand(key, target[key]).items()}
    for key in [one for one, raw in target.items() if one.kind == "Pod" and owner_of(raw) and one not in wanted]:
        del target[key]
    for key, pod in wanted.items():
        if key in present and not owner_of(present[key]):
            raise LabError(f"{text_of(key)}: {owner_of(pod)} needs this name; delete the pod, or rename it")
        target[key] = _kept(key, pod, present.get(key), now)


def _check_namespaces(target: Objects, wanted: Objects) -> None:
    known = {"default", "kube-system"} | {key.name for key in target if key.kind == "Namespace"}
    for key in target:
        if key.namespace and key.namespace not in known:
            what = "is not there; create it too" if key in wanted else "is still used; delete what is in it first"
            raise LabError(f"{text_of(key)}: namespace {key.namespace} {what}")


def _schedule(target: dict[ObjectKey, Raw], nodes: Sequence[str]) -> None:
    count = dict.fromkeys(nodes, 0)
    waiting = []
    for key in sorted(one for one in target if one.kind == "Pod"):
        node = target[key]["spec"].get("nodeName")
        if not node:
            waiting.append(key)
        elif node in count:
            count[node] += 1
        else:
            raise LabError(f"{text_of(key)}: spec.nodeName: there is no node {node}; there are {', '.join(nodes)}")
    taken = hostports.taken(target)
    for key in waiting:
        node = min(hostports.fitting(key, target[key], nodes, taken), key=lambda one: count[one])
        count[node] += 1
        hostports.take(taken, key, target[key], node)
        target[key] = {**target[key], "spec": {**target[key]["spec"], "nodeName": node}}


# ---- the store -----------------------------------------------------------------------------------------------------


class Store:
    """The directory."""

    def __init__(self, directory: Path) -> None:
        """Make it. Error: OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def _path(self, key: ObjectKey) -> Path:
        return self._directory / f"{key.kind.lower()}.{key.namespace or '_'}.{key.name}.json"

    def load(self) -> dict[ObjectKey, Raw]:
        """Return all objects. Error: LabError."""
        found: dict[ObjectKey, Raw] = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                raw: dict[str, Any] = msgspec.json.decode(path.read_bytes())
                found[object_key(raw, str(path))] = raw
            except (msgspec.MsgspecError, ManifestError) as error:
                raise LabError(f"{path}: {error}; remove the file") from error
        return found

    def change(self, write: Objects, remove: Iterable[ObjectKey]) -> None:
        """Write and remove objects, each in one step. Error: OSError."""
        for key, raw in write.items():
            path = self._path(key)
            fresh = path.with_suffix(".new")
            fresh.write_bytes(msgspec.json.format(msgspec.json.encode(raw), indent=1) + b"\n")
            fresh.replace(path)
        for key in remove:
            self._path(key).unlink(missing_ok=True)
