"""``ciliate status`` as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from ciliate.cli.output import cell


def status_text(document: Mapping[str, Any]) -> str:
    """Return an agent's status; unknown and missing parts do no harm."""
    return "".join(f"{name + ':':<14}{text}\n" for name, text in _lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    health = document.get("health") or {}
    reasons = ", ".join(health.get("reasons") or ())
    cluster = document.get("cluster") or {}
    yield "Node", f"{document.get('node', '?')}, cluster {cluster.get('name', '?')} (id {cluster.get('id', 0)})"
    yield "Ready", "yes" if health.get("ready") else f"no: {reasons}"
    families = " and ".join(name for key, name in (("ipv4", "IPv4"), ("ipv6", "IPv6")) if document.get(key))
    masquerade = "masquerade" if document.get("masquerade") else "no masquerade"
    yield "Network", f"{families}, {document.get('routing_mode', '?')}, {masquerade}"
    for pool in document.get("ipam") or ():
        yield "Addresses", f"{pool.get('cidr')}: {pool.get('used')} in use"
    counts = ("nodes", "endpoints", "identities", "policies")
    yield "Objects", ", ".join(f"{document.get(key, '?')} {key}" for key in counts)
    last = document.get("enforcement") or {}
    yield "Enforced", f"revision {last.get('revision')}, epoch {last.get('epoch')}, took {last.get('milliseconds')} ms"
    yield from _services(document.get("services") or {})
    if proxy := document.get("proxy"):
        yield "Proxy", cell(proxy)
    yield from _datapath(document.get("datapath") or {})
    problems = document.get("problems") or ["none"]
    for index, problem in enumerate(problems):
        yield ("Problems" if index == 0 else ""), str(problem)


def _services(services: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not services:
        return
    if not services.get("kube_proxy_replacement"):
        yield "Services", "not served here: kube-proxy does (kube-proxy-replacement: false)"
        return
    outside = f"{services.get('mode', '?')} to other nodes, {services.get('algorithm', '?')}"
    hooks = [f"{name}: {services[key]}" for name, key in (("sockets", "socket_lb"), ("XDP", "xdp")) if key in services]
    low, high = services.get("node_port_range") or ("?", "?")
    yield "Services", f"instead of kube-proxy; {outside}; {', '.join(hooks)}; node ports {low}-{high}"
    counts = ", ".join(f"{count} {kind}" for kind, count in (services.get("frontends") or {}).items())
    total = f"{services.get('services', '?')} services, {services.get('backends', '?')} backends"
    yield "Frontends", f"{counts or 'none'}, of {total}; the last change took {services.get('milliseconds')} ms"


def _datapath(datapath: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not datapath:
        return
    yield "Kernel", f"{datapath.get('kernel', '?')}, programs attached by {datapath.get('attach', '?')}"
    features = datapath.get("features") or {}
    if have := [name for name, one in features.items() if one.get("available")]:
        yield "Features", ", ".join(have)
    for name, one in features.items():
        if not one.get("available"):
            yield "Fallback", f"no {name}: {one.get('fallback') or 'none'} ({one.get('purpose', '')})"
    for name, usage in sorted((datapath.get("maps") or {}).items()):
        rows, size = (usage.get("rows", 0), usage.get("capacity", 0)) if isinstance(usage, Mapping) else usage
        if size and rows / size >= 0.5:
            yield "Pressure", f"map {name}: {rows} of {size} rows"
