"""Host ports of pods, as the scheduler sees them: a node has each of its ports once. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.lab.topology import LabError

_ANY = ("", "0.0.0.0", "::")


class HostPort(NamedTuple):
    """A port of a node; ``address`` "" is all its addresses."""

    protocol: str
    port: int
    address: str

    def clashes(self, other: "HostPort") -> bool:
        """Whether a node can have only one of both."""
        same = "" in (self.address, other.address) or self.address == other.address
        return same and (self.protocol, self.port) == (other.protocol, other.port)


Taken = dict[str, dict[HostPort, ObjectKey]]
"""By node."""


def host_ports(raw: Raw) -> Iterator[HostPort]:
    """Yield a valid pod's host ports; in the node's own namespace each port is one."""
    spec = raw["spec"]
    for container in spec.get("containers") or ():
        for one in container.get("ports") or ():
            number = one.get("hostPort") or (one["containerPort"] if spec.get("hostNetwork") else 0)
            if number:
                address = str(one.get("hostIP") or "")
                yield HostPort(one.get("protocol") or "TCP", number, "" if address in _ANY else address)


def check(objects: Mapping[ObjectKey, Raw]) -> None:
    """Error: LabError, where a pod in its node's namespace has a host port that is not its own port."""
    for key, raw in objects.items():
        if key.kind == "Pod" and raw["spec"].get("hostNetwork"):
            for index, container in enumerate(raw["spec"].get("containers") or ()):
                for number, one in enumerate(container.get("ports") or ()):
                    if one.get("hostPort") not in (None, 0, one["containerPort"]):
                        where = f"pod {key.namespace}/{key.name}: spec.containers[{index}].ports[{number}].hostPort"
                        raise LabError(f"{where}: with hostNetwork it must be the containerPort")


def taken(objects: Mapping[ObjectKey, Raw]) -> Taken:
    """Return what pods that have a node take there. Error: LabError (two take the same)."""
    found: Taken = {}
    for key in sorted(one for one in objects if one.kind == "Pod" and objects[one]["spec"].get("nodeName")):
        take(found, key, objects[key], objects[key]["spec"]["nodeName"])
    return found


def take(found: Taken, key: ObjectKey, raw: Raw, node: str) -> None:
    """Note a pod's host ports. Error: LabError (another pod of the node has one)."""
    for one in host_ports(raw):
        if holder := _holder(found, one, node):
            said = f"host port {one.port}/{one.protocol} of {node} is taken by pod {holder.namespace}/{holder.name}"
            raise LabError(f"pod {key.namespace}/{key.name}: {said}")
        found.setdefault(node, {})[one] = key


def _holder(found: Taken, wanted: HostPort, node: str) -> ObjectKey | None:
    return next((key for one, key in found.get(node, {}).items() if one.clashes(wanted)), None)


def fitting(key: ObjectKey, raw: Raw, nodes: Sequence[str], found: Taken) -> list[str]:
    """Return the nodes on which a pod's host ports are free. Error: LabError (there is none)."""
    wanted = list(host_ports(raw))
    free = [node for node in nodes if not any(_holder(found, one, node) for one in wanted)]
    if not free:
        ports = ", ".join(f"{one.port}/{one.protocol}" for one in wanted)
        raise LabError(f"pod {key.namespace}/{key.name}: no node has its host ports free: {ports}")
    return free
