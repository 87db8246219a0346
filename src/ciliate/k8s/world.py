"""Manifests to the world that policy questions are asked about: no cluster is needed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from ciliate.identity.labels import Labels, k8s, pod_labels
from ciliate.k8s.manifests import ManifestError, ObjectKey, Raw, parse_documents
from ciliate.k8s.objects import PROTOCOLS, Namespace, ObjectError, namespace_of, parse_namespace, parse_pod
from ciliate.policy.ask.world import AskError, NodeFacts, PodFacts, World
from ciliate.policy.parse import API_VERSIONS, CIDR_GROUP_KIND, parse_cidr_group, parse_object
from ciliate.policy.rules import CidrGroup, PolicyError, PolicyObject, ServiceFacts

SUFFIXES: Final = (".yaml", ".yml", ".json")
WORKLOADS: Final[Mapping[str, tuple[str, ...]]] = {
    "Deployment": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
"""Kinds whose pods follow from them, and where the template is."""
_MAX_REPLICAS: Final = 1000


@dataclass(slots=True)
class Sources:
    """What files say. ``problems``: one line for each thing that is wrong; ``documents``: the policies as written."""

    pods: dict[tuple[str, str], PodFacts] = field(default_factory=dict)
    nodes: dict[str, NodeFacts] = field(default_factory=dict)
    policies: dict[tuple[str, str, str], PolicyObject] = field(default_factory=dict)
    documents: dict[tuple[str, str, str], Raw] = field(default_factory=dict)
    groups: dict[str, CidrGroup] = field(default_factory=dict)
    services: dict[tuple[str, str], ServiceFacts] = field(default_factory=dict)
    namespaces: dict[str, Namespace] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    made: list[Labels] = field(default_factory=list)
    """Labels of pods that a controller has made."""

    def merged(self, other: "Sources") -> "Sources":
        """Return what both say; what both have is taken from this one."""
        return Sources(
            pods={**other.pods, **self.pods},
            nodes={**other.nodes, **self.nodes},
            policies={**other.policies, **self.policies},
            documents={**other.documents, **self.documents},
            groups={**other.groups, **self.groups},
            services={**other.services, **self.services},
            namespaces={**other.namespaces, **self.namespaces},
            problems=[*self.problems, *other.problems],
        )

    def world(self, cluster: str = "default") -> World:
        """Return the world. Error: AskError."""
        return World.build(
            pods=self.pods.values(),
            nodes=self.nodes.values(),
            objects=self.policies.values(),
            groups=self.groups.values(),
            services=self.services.values(),
            namespaces={name: one.labels for name, one in self.namespaces.items()},
            cluster=cluster,
        )


def texts_of(sources: Sequence[Path], stdin: str = "") -> list[tuple[str, str]]:
    """Return (name, text) of files, of the files in directories, and of ``-``. Error: AskError: it names the file."""
    texts = []
    for source in sources:
        if str(source) == "-":
            texts.append(("standard input", stdin))
            continue
        try:
            paths = sorted(p for p in source.iterdir() if p.suffix in SUFFIXES) if source.is_dir() else [source]
            texts += [(str(path), path.read_text()) for path in paths]
        except OSError as error:
            raise AskError(f"{error.filename}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise AskError(f"{source}: not a text file ({error.reason})") from error
    return texts


def read_sources(texts: Iterable[tuple[str, str]], cluster: str = "default") -> Sources:
    """Return what manifests say. Kinds that policies do not depend on are passed over; problems are collected."""
    found = Sources()
    seen: dict[ObjectKey, str] = {}
    listed: list[tuple[str, ObjectKey, Raw]] = []
    for source, text in texts:
        try:
            for key, raw in parse_documents(text, source):
                if key in seen:
                    found.problems.append(f"{source}: {_title(key)}: is in {seen[key]} already")
                    continue
                seen[key] = source
                listed.append((source, key, raw))
        except ManifestError as error:
            found.problems.append(str(error))
    # namespaces first: their labels are part of what their pods are; then pods: a workload's may be there already
    order = {"Namespace": 0, "Pod": 1}
    for source, key, raw in sorted(listed, key=lambda one: order.get(one[1].kind, 2)):
        try:
            _learn(found, key, raw, cluster)
        except (ObjectError, PolicyError, AskError) as error:
            found.problems.append(f"{source}: {error}")
    return found


def _learn(found: Sources, key: ObjectKey, raw: Raw, cluster: str) -> None:
    match key.kind:
        case "Namespace":
            found.namespaces[key.name] = parse_namespace(raw)
        case "Pod":
            pod = pod_facts(raw, found.namespaces, cluster)
            found.pods[pod.namespace, pod.name] = pod
            if raw["metadata"].get("ownerReferences"):
                found.made.append(pod.labels)
        case "Node":
            found.nodes[key.name] = node_facts(key, raw)
        case "Service":
            found.services[key.namespace, key.name] = service_facts(key, raw)
        case kind if kind == CIDR_GROUP_KIND:
            group = parse_cidr_group(raw)
            found.groups[group.name] = group
        case kind if kind in WORKLOADS:
            if not raw["metadata"].get("ownerReferences"):
                _learn_workload(found, key, raw, cluster)
        case kind if kind in API_VERSIONS:
            policy = parse_object(raw)
            found.policies[policy.key] = policy
            found.documents[policy.key] = raw


def _learn_workload(found: Sources, key: ObjectKey, raw: Raw, cluster: str) -> None:
    """Add replicas, unless the controller's own pods are among the manifests, as in a dump of a cluster."""
    fresh = replicas(key, raw, found.namespaces, cluster)
    if fresh and any(fresh[0].labels <= labels for labels in found.made):
        return
    for pod in fresh:
        found.pods.setdefault((pod.namespace, pod.name), pod)


def _title(key: ObjectKey) -> str:
    return f"{key.kind} {key.namespace}/{key.name}" if key.namespace else f"{key.kind} {key.name}"


# ---- pods ---------------------------------------------------------------------------------------------------


def pod_facts(raw: Raw, namespaces: Mapping[str, Namespace], cluster: str, workload: str = "") -> PodFacts:
    """Return what policies need of a Pod. Error: ObjectError."""
    pod = parse_pod(raw)
    known = namespaces.get(pod.namespace) or namespace_of(pod.namespace, {})
    labels = pod_labels(
        namespace=pod.namespace,
        labels=pod.labels,
        namespace_labels=known.labels,
        service_account=pod.service_account,
        cluster=cluster,
    )
    return PodFacts(
        namespace=pod.namespace,
        name=pod.name,
        labels=labels,
        named_ports=pod.named_ports,
        declared=_declared(raw),
        addresses=_pod_addresses(raw),
        node=pod.node_name,
        host_network=pod.host_network,
        workload=workload,
    )


def _declared(raw: Raw) -> tuple[tuple[int, int], ...]:
    found = {
        (PROTOCOLS[port.get("protocol", "TCP")], port["containerPort"])
        for container in raw["spec"].get("containers") or ()
        for port in container.get("ports") or ()
    }
    return tuple(sorted(found))


def _pod_addresses(raw: Raw) -> tuple[str, ...]:
    status = raw.get("status") or {}
    listed = [one.get("ip") for one in status.get("podIPs") or () if isinstance(one, Mapping)]
    try:
        return tuple(dict.fromkeys(str(ip_address(one)) for one in [*listed, status.get("podIP")] if one))
    except ValueError as error:
        raise ObjectError(f"Pod {raw['metadata']['name']}: status.podIPs: {error}") from error


def replicas(key: ObjectKey, raw: Raw, namespaces: Mapping[str, Namespace], cluster: str) -> list[PodFacts]:
    """Return the pods of a workload, ``NAME-1`` and so on, as the lab names them. Error: ObjectError."""
    template: Any = raw
    for name in WORKLOADS[key.kind]:
        template = template.get(name) if isinstance(template, Mapping) else None
    where = f"{_title(key)}: {'.'.join(WORKLOADS[key.kind])}"
    if not isinstance(template, Mapping) or not isinstance(template.get("spec"), Mapping):
        raise ObjectError(f"{where}.spec: must be set")
    metadata = template.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ObjectError(f"{where}.metadata: must be a mapping")
    count = raw["spec"].get("replicas", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ObjectError(f"{_title(key)}: spec.replicas: {count!r} is not a number of pods")
    found = []
    for number in range(1, min(count, _MAX_REPLICAS) + 1):
        own = {"name": f"{key.name}-{number}", "namespace": key.namespace, "labels": metadata.get("labels")}
        pod = {"kind": "Pod", "metadata": own, "spec": template["spec"]}
        try:
            found.append(pod_facts(pod, namespaces, cluster, key.name))
        except ObjectError as error:
            raise ObjectError(f"{where}: {error}") from error
    return found


# ---- other kinds --------------------------------------------------------------------------------------------


def node_facts(key: ObjectKey, raw: Raw) -> NodeFacts:
    """Return what policies need of a Node. Error: ObjectError."""
    labels, status = raw["metadata"].get("labels") or {}, raw.get("status") or {}
    if not isinstance(labels, Mapping) or not isinstance(status, Mapping):
        raise ObjectError(f"Node {key.name}: metadata.labels and status: mappings are expected")
    found = []
    for index, one in enumerate(status.get("addresses") or ()):
        if one.get("type") in ("InternalIP", "ExternalIP"):
            try:
                found.append(str(ip_address(one.get("address"))))
            except ValueError as error:
                raise ObjectError(f"Node {key.name}: status.addresses[{index}].address: {error}") from error
    return NodeFacts(name=key.name, labels={str(k): str(v) for k, v in labels.items()}, addresses=tuple(found))


def service_facts(key: ObjectKey, raw: Raw) -> ServiceFacts:
    """Return what policies need of a Service. Error: ObjectError."""
    spec, labels = raw.get("spec") or {}, raw["metadata"].get("labels") or {}
    selector = spec.get("selector") or {}
    for name, value in (("metadata.labels", labels), ("spec.selector", selector)):
        if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value.values()):
            raise ObjectError(f"{_title(key)}: {name}: strings are expected")
    return ServiceFacts(
        namespace=key.namespace,
        name=key.name,
        labels=frozenset(k8s(name, value) for name, value in labels.items()),
        selector=dict(selector),
    )
