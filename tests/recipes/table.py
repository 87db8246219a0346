"""Policies of the kind that documentation shows, each with who then reaches whom.

A recipe lists policies and, under ``expect``, patterns of flows: the last one that matches a flow decides, and what
none matches is allowed. So every recipe says something about every flow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
PODS = ("shop/web", "shop/api", "shop/db", "bank/web", "bank/audit")
NODE = "node/n1"
WORLD = {"world-a": ("172.31.0.10", "fd00:31::a"), "world-b": ("172.31.0.20", "fd00:31::14")}
"""Addresses outside the cluster, IPv4 and IPv6."""
PORTS = (("tcp", 8080), ("tcp", 9090), ("udp", 5353), ("icmp", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A connection attempt. ``port`` of ICMP: 0, an echo request."""

    source: str
    destination: str
    protocol: str
    port: int
    family: int

    def __str__(self) -> str:
        what = f"{self.protocol}/{self.port}" if self.port else self.protocol
        return f"{self.source} -> {self.destination} {what} v{self.family}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Policies and what they are to do. ``expect``: ("allow" | "deny", pattern)."""

    name: str
    policies: tuple[dict[str, Any], ...]
    expect: tuple[tuple[str, str], ...]

    def allowed(self, flow: Flow) -> bool:
        """Whether the flow is to pass."""
        said = [verdict for verdict, pattern in self.expect if _matches(str(flow), pattern)]
        return not said or said[-1] == "allow"


def _matches(flow: str, pattern: str) -> bool:
    return fnmatchcase(flow, pattern) or fnmatchcase(flow, f"{pattern} v?")


def flows() -> Iterator[Flow]:
    """Yield every flow that is tried."""
    for source, destination, (protocol, port), family in product((*PODS, NODE), (*PODS, *WORLD), PORTS, (4, 6)):
        if source != destination:
            yield Flow(source=source, destination=destination, protocol=protocol, port=port, family=family)


def population(server: str) -> list[dict[str, Any]]:
    """Return namespaces and pods; ``server``: the command that each pod runs."""
    text = (FOLDER / "population.yaml").read_text().replace("[SERVER]", server)
    return list(yaml.safe_load_all(text))


def recipes() -> list[Recipe]:
    """Return all recipes."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name == "population.yaml":
            continue
        document = yaml.safe_load(path.read_text())
        expect = tuple(pair for one in document["expect"] for pair in one.items())
        found.append(Recipe(name=path.stem, policies=tuple(document["policies"]), expect=expect))
    return found
