"""Rows of the datapath's maps for display, with numbers resolved to names."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

from ciliate.daemon.agent import Agent
from ciliate.daemon.monitor import PROTOCOLS, rule_text
from ciliate.daemon.sockets import service_name
from ciliate.datapath import services_view
from ciliate.datapath.policy_tables import list_policies, list_rows

Rows = list[dict[str, Any]]


def _connections(agent: Agent, limit: int) -> Rows:
    rows = []
    for row in islice(agent.datapath.conntrack.list(limit), limit):
        rules = {name: _rules(agent, number) for name, number in zip(("egress", "ingress"), row["rule"], strict=True)}
        names = {"from": agent.table.name_of(row["source"]), "to": agent.table.name_of(row["destination"])}
        rows.append(row | {"protocol": PROTOCOLS.get(row["protocol"], row["protocol"]), "rules": rules} | names)
    return rows


def _rules(agent: Agent, number: int) -> list[str]:
    return [rule_text(ref) for ref in agent.datapath.policy.explain(number)]


def _nat(agent: Agent, limit: int) -> Rows:
    return list(agent.datapath.conntrack.list_nat(limit))


def _ipcache(agent: Agent, limit: int) -> Rows:
    rows = []
    for row in agent.datapath.ipcache.list(limit):
        address, _, bits = row["prefix"].partition("/")
        name = agent.table.name_of(address) if bits in ("32", "128") else ""
        rows.append(row | {"name": name})
    return rows


def _endpoints(agent: Agent, limit: int) -> Rows:
    return list(islice(agent.datapath.endpoints.list(), limit))


def _counters(agent: Agent, limit: int) -> Rows:
    reasons = agent.datapath.drop_reasons()
    return [
        {
            "reason": reasons.get(one.reason, str(one.reason)) if one.reason else "FORWARDED",
            "direction": "ingress" if one.direction else "egress",
            "packets": one.packets,
            "bytes": one.bytes,
        }
        for one in agent.datapath.counters()[:limit]
    ]


def _config(agent: Agent, limit: int) -> Rows:
    config: Mapping[str, str] = agent.datapath.status()["config"]
    return [{"name": name, "value": value} for name, value in list(config.items())[:limit]]


def _maps(agent: Agent, limit: int) -> Rows:
    usage = agent.datapath.usage()
    return [
        {"map": name, "rows": used, "capacity": size, "full": round(used / size, 4)}
        for name, (used, size) in islice(sorted(usage.items()), limit)
    ]


def _policies(agent: Agent, limit: int) -> Rows:
    return list(islice(list_policies(agent.datapath.map), limit))


def _classes(agent: Agent, limit: int) -> Rows:
    rows: Iterable[dict[str, Any]] = list_rows(agent.datapath.map)
    return [
        row
        | {"protocol": PROTOCOLS.get(row["protocol"], row["protocol"] or "any"), "rules": _rules(agent, row["rule"])}
        for row in islice(rows, limit)
    ]


def _services(kind: str, address: str = "") -> Callable[[Agent, int], Rows]:
    """Return what reads one kind of rows of the maps of services. ``address``: only frontends of it."""

    def read(agent: Agent, limit: int) -> Rows:
        datapath = agent.datapath
        tables = {name: datapath.map(name) for name in services_view.TABLES}
        named = partial(service_name, datapath.services)
        rows = services_view.documents(tables, datapath.btf, kind, limit=limit, name=named, address=address)
        return [_protocols(row) for row in rows]

    return read


def _protocols(row: dict[str, Any]) -> dict[str, Any]:
    """Name the protocols of a row and of the backends in it; 0 is any."""
    found = dict(row)
    if "protocol" in row:
        found["protocol"] = PROTOCOLS.get(row["protocol"], row["protocol"] or "any")
    if "backends" in row:
        found["backends"] = [_protocols(one) for one in row["backends"]]
    return found


_READERS: Final[Mapping[str, Callable[[Agent, int], Rows]]] = {
    "ct": _connections,
    "nat": _nat,
    "ipcache": _ipcache,
    "endpoints": _endpoints,
    "counters": _counters,
    "config": _config,
    "maps": _maps,
    "policy": _policies,
    "classes": _classes,
    "lb": _services("frontends"),
    "lb-backends": _services("backends"),
    "lb-affinities": _services("affinities"),
    "lb-source-ranges": _services("source_ranges"),
    "lb-skips": _services("skips"),
    "lb-translations": _services("translations"),
    "lb-sockets": _services("socket_peers"),
}
TABLES: Final = tuple(_READERS)


def table_rows(agent: Agent, name: str, limit: int, address: str = "") -> Rows:
    """Return up to ``limit`` rows of a table. ``address``: only the frontends of it. Blocking. Error: KeyError,
    ValueError (not an address, or the table cannot be asked for one).
    """
    if address and name != "lb":
        raise ValueError(f"table {name} cannot be asked for an address")
    return _services("frontends", address)(agent, limit) if address else _READERS[name](agent, limit)
