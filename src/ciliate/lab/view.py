"""What ``lab get`` and ``lab logs`` show."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ciliate.client import AgentError
from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.lab import agents, pods, state, tables
from ciliate.lab.cluster import client, store
from ciliate.lab.objects import kind_of
from ciliate.lab.topology import LabError, Topology

Document = dict[str, Any]


def documents(topology: Topology, word: str, name: str | None, namespace: str | None) -> list[Document]:
    """Return objects with their status, in order. Error: LabError (unknown kind, or the named one is not there)."""
    kind = "" if word == "all" else kind_of(word)
    present = store(topology).load()
    known = state.pods(topology)
    found = [_document(key, raw, known) for key, raw in sorted(present.items()) if kind in ("", key.kind)]
    if kind in ("", "Node"):
        found = [one for one in found if one["kind"] != "Node"] + [
            _node(topology, node.name, present) for node in topology.nodes
        ]
    if kind in ("", "Namespace"):
        names = {one["metadata"]["name"] for one in found if one["kind"] == "Namespace"}
        found += [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": one}}
            for one in ("default", "kube-system")
            if one not in names
        ]
    if namespace is not None:
        found = [one for one in found if one["metadata"].get("namespace") == namespace]
    if name is not None:
        found = [one for one in found if one["metadata"]["name"] == name]
        if not found:
            raise LabError(f"{word}/{name}: not found{f' in namespace {namespace}' if namespace else ''}")
    return found


def _document(key: ObjectKey, raw: Raw, known: dict[tuple[str, str], state.PodFile]) -> Document:
    if key.kind != "Pod":
        return dict(raw)
    return {**raw, "status": pods.status_of(known.get((key.namespace, key.name)))}


def _node(topology: Topology, name: str, present: dict[ObjectKey, Raw]) -> Document:
    node = topology.node(name)
    given = present.get(ObjectKey("Node", "", name), {})
    ready, why = "False", "the agent does not run"
    if agents.running(topology, name):
        try:
            health = client(topology, name).health()
            ready, why = str(bool(health["ready"])), ", ".join(health["reasons"])
        except AgentError as error:
            why = str(error)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, **{k: v for k, v in dict(given.get("metadata", {})).items() if k != "name"}},
        "spec": {"podCIDRs": [str(one) for one in node.pod_cidrs]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": str(one.ip)} for one in node.addresses],
            "conditions": [{"type": "Ready", "status": ready, "message": why}],
        },
    }


def rows(found: Sequence[Document], *, wide: bool) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of objects. Several kinds together have a kind column only."""
    kinds = {one["kind"] for one in found}
    if kinds == {"Pod"}:
        columns = ["namespace", "name", "ready", "status", "ip", "node"] + (["ips", "labels"] if wide else [])
        return columns, [_pod_row(one, wide=wide) for one in found]
    if kinds == {"Node"}:
        columns = ["name", "ready", "address", "pod cidrs"] + (["message"] if wide else [])
        return columns, [_node_row(one, wide=wide) for one in found]
    now = datetime.now(UTC)
    match sorted(kinds):
        case ["Service"]:
            return tables.service_rows(found, now, wide=wide)
        case ["EndpointSlice"]:
            return tables.slice_rows(found, now, wide=wide)
        case ["CiliumLoadBalancerIPPool"]:
            return tables.pool_rows(found, now)
    columns = ["kind", "namespace", "name"] + (["labels"] if wide else [])
    listed = []
    for one in found:
        metadata = one["metadata"]
        row = [one["kind"], metadata.get("namespace"), metadata["name"]]
        listed.append(row + ([metadata.get("labels")] if wide else []))
    return columns, listed


def _ready(one: Document) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in one["status"].get("conditions", ()))


def _pod_row(one: Document, *, wide: bool) -> list[Any]:
    metadata, status = one["metadata"], one["status"]
    row = [metadata["namespace"], metadata["name"], _ready(one), status["phase"], status.get("podIP"),
           one["spec"].get("nodeName")]  # fmt: skip
    if wide:
        row += [[ip["ip"] for ip in status.get("podIPs", ())], metadata.get("labels")]
    return row


def _node_row(one: Document, *, wide: bool) -> list[Any]:
    status = one["status"]
    addresses = [address["address"] for address in status["addresses"]]
    row = [one["metadata"]["name"], _ready(one), addresses, one["spec"]["podCIDRs"]]
    return row + ([status["conditions"][0]["message"]] if wide else [])


def log_of(topology: Topology, name: str, namespace: str, container: str | None, *, proxy: bool) -> Path:
    """Return a pod's or a node's log. Error: LabError."""
    if "/" in name and not name.startswith(("pod/", "node/")):
        namespace, _, name = name.partition("/")
    bare = name.rpartition("/")[2]
    pod = None if name.startswith("node/") else state.pods(topology).get((namespace, bare))
    if pod is None:
        if not name.startswith("pod/") and bare in {one.name for one in topology.nodes}:
            return _existing(agents.log_path(topology, bare, agents.PROXY if proxy else agents.AGENT), bare)
        raise LabError(f"{name}: neither a pod of namespace {namespace} nor a node; see `ciliate lab get pods`")
    names = [one.name for one in pod.processes]
    wanted = container or (names[0] if names else "")
    if wanted not in names:
        raise LabError(f"pod {namespace}/{bare}: it runs no container {wanted!r}; it has {', '.join(names) or 'none'}")
    return _existing(pods.log_path(topology, namespace, bare, wanted), bare)


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise LabError(f"{name}: it has written nothing")
    return path
