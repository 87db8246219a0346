"""What kube-proxy writes for a list of Services: pure text, for ``iptables-restore --noflush`` and for ``nft -f -``.

Chains and their names, order and comments of the rules, and what a connection passes before them are as kube-proxy's
own tests expect them (pkg/proxy/iptables and pkg/proxy/nftables of Kubernetes). Services here have type ClusterIP or
NodePort, traffic policy Cluster and at least one endpoint; a node port of 0 means ClusterIP.
"""

import base64
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

POD_NETWORK: Final = IPv4Network("10.0.0.0/11")
"""All pods of the cluster: kube-proxy's ``--cluster-cidr``."""
SERVICE_NETWORK: Final = IPv4Network("10.96.0.0/12")
PORT: Final = 80
"""Of each Service of ``services()``."""
NODE_PORTS: Final = range(30000, 32768)
_FAR_PODS: Final = IPv4Address("10.16.0.0")
_LARGE_CLUSTER: Final = 1000
"""Endpoints of all Services: with more, kube-proxy leaves comments out of the chains of Services."""
_MASQUERADE: Final = "0x4000"
_TABLE: Final = "ip kube-proxy"
Endpoints = tuple[tuple[IPv4Address, int], ...]
"""(address, port) of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One port of one Service."""

    name: str
    address: IPv4Address
    port: int
    endpoints: Endpoints
    node_port: int = 0
    namespace: str = "bench"
    port_name: str = "http"
    protocol: str = "tcp"

    @property
    def label(self) -> str:
        """kube-proxy's name of the port, in comments and in what is hashed."""
        return f"{self.namespace}/{self.name}:{self.port_name}"

    @property
    def chain(self) -> str:
        """The name that its nftables chains have in common."""
        return _named(f"{self.namespace}/{self.name}/{self.protocol}/{self.port_name}")

    def endpoint_chain(self, address: IPv4Address, port: int) -> str:
        """The name of an endpoint's nftables chain, without its first word."""
        return _named(f"{self.namespace}/{self.name}/{self.protocol}/{self.port_name}__{address}/{port}")


def services(
    count: int, endpoints: int, *, special: Mapping[int, Endpoints] | None = None, node_ports: int = 0
) -> list[Service]:
    """Return ``count`` Services with so many endpoints each, on pods of their own that are nowhere to be found.

    ``special``: the Services with these indices have these endpoints instead. ``node_ports``: so many of the first
    Services have one.
    """
    special = special or {}

    def pods(index: int) -> Endpoints:
        return tuple((_FAR_PODS + index * endpoints + n, 8080) for n in range(endpoints))

    return [
        Service(
            name=f"service-{index}",
            address=SERVICE_NETWORK[index + 1],
            port=PORT,
            endpoints=special.get(index) or pods(index),
            node_port=NODE_PORTS[index] if index < node_ports else 0,
        )
        for index in range(count)
    ]


def _hash(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:length].decode()


def _named(name: str) -> str:
    return f"{_hash(name, 8)}-{name}"


# ---- iptables ------------------------------------------------------------------------------------------------------

_NEW: Final = "-m conntrack --ctstate NEW"
_FILTER_CHAINS: Final = (
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
)
_NAT_CHAINS: Final = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_FILTER_JUMPS: Final = (
    f'-A INPUT {_NEW} -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS',
    f'-A INPUT {_NEW} -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    "-A INPUT -j KUBE-FIREWALL",
    f'-A FORWARD {_NEW} -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    f'-A FORWARD {_NEW} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    f'-A FORWARD {_NEW} -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    f'-A OUTPUT {_NEW} -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    f'-A OUTPUT {_NEW} -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    "-A OUTPUT -j KUBE-FIREWALL",
)
_FILTER_RULES: Final = (
    '-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" '
    "-d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    f'-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {_MASQUERADE}/{_MASQUERADE} '
    "-j ACCEPT",
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
    "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
)
_NAT_JUMPS: Final = (
    '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
)
_NAT_RULES: Final = (
    f"-A KUBE-POSTROUTING -m mark ! --mark {_MASQUERADE}/{_MASQUERADE} -j RETURN",
    f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MASQUERADE}",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MASQUERADE}",
)
_LAST_SERVICE_RULE: Final = (
    '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this '
    'chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
)


def service_chain(service: Service) -> str:
    """Return the name of a Service's iptables chain."""
    return f"KUBE-SVC-{_hash(service.label + service.protocol, 16)}"


def _endpoint_chain(service: Service, endpoint: tuple[IPv4Address, int]) -> str:
    return f"KUBE-SEP-{_hash(f'{service.label}{service.protocol}{endpoint[0]}:{endpoint[1]}', 16)}"


def _external_chain(service: Service) -> str:
    return service_chain(service).replace("SVC", "EXT")


def _chains(service: Service) -> Iterator[str]:
    yield service_chain(service)
    if service.node_port:
        yield _external_chain(service)
    for endpoint in service.endpoints:
        yield _endpoint_chain(service, endpoint)


def _entries(listed: Sequence[Service]) -> Iterator[str]:
    """Yield the rules that lead to Services; each sync writes all of them, whatever changed."""
    for service in listed:
        match = f"-m {service.protocol} -p {service.protocol}"
        if service.node_port:
            yield (
                f"-A KUBE-NODEPORTS -m comment --comment {service.label} {match} --dport {service.node_port} "
                f"-j {_external_chain(service)}"
            )
        yield (
            f'-A KUBE-SERVICES -m comment --comment "{service.label} cluster IP" {match} -d {service.address} '
            f"--dport {service.port} -j {service_chain(service)}"
        )
    yield _LAST_SERVICE_RULE


def _service_rules(service: Service, comments: bool) -> Iterator[str]:
    """Yield the rules of a Service's own chains."""
    chain = service_chain(service)
    match = f"-m {service.protocol} -p {service.protocol}"

    def comment(text: str) -> str:
        return f'-m comment --comment "{text}" ' if comments else ""

    yield (
        f"-A {chain} {comment(f'{service.label} cluster IP')}{match} -d {service.address} --dport {service.port} "
        f"! -s {POD_NETWORK} -j KUBE-MARK-MASQ"
    )
    if service.node_port:
        external = _external_chain(service)
        note = comment(f"masquerade traffic for {service.label} external destinations")
        yield f"-A {external} {note}-j KUBE-MARK-MASQ"
        yield f"-A {external} -j {chain}"
    left = len(service.endpoints)
    for endpoint in service.endpoints:
        address, port = endpoint
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        left -= 1
        own = _endpoint_chain(service, endpoint)
        yield f"-A {chain} {comment(f'{service.label} -> {address}:{port}')}{chance}-j {own}"
        yield f"-A {own} {comment(service.label)}-s {address} -j KUBE-MARK-MASQ"
        yield f"-A {own} {comment(service.label)}{match} -j DNAT --to-destination {address}:{port}"


def _restore(listed: Sequence[Service], written: Sequence[Service], *, first: bool) -> str:
    comments = sum(len(service.endpoints) for service in listed) <= _LARGE_CLUSTER
    nat_chains = (*_NAT_CHAINS, *(chain for service in written for chain in _chains(service)))
    lines = [
        "*filter",
        *(f":{chain} - [0:0]" for chain in _FILTER_CHAINS),
        *(_FILTER_JUMPS if first else ()),
        *_FILTER_RULES,
        "COMMIT",
        "*nat",
        *(f":{chain} - [0:0]" for chain in nat_chains),
        *(_NAT_JUMPS if first else ()),
        *_NAT_RULES,
        *_entries(listed),
        *(rule for service in written for rule in _service_rules(service, comments)),
        "COMMIT",
    ]
    return "\n".join(lines) + "\n"


def iptables_rules(listed: Sequence[Service]) -> str:
    """Return the input of ``iptables-restore --noflush`` for all Services, with the jumps from the built-in chains."""
    return _restore(listed, listed, first=True)


def iptables_update(listed: Sequence[Service], changed: Sequence[Service]) -> str:
    """Return the input for a sync in which only some Services changed; ``listed``: all, as they are now.

    Chains of unchanged Services stay; KUBE-SERVICES is written as a whole. Chains of endpoints that are gone stay until
    a later sync removes them: in a large cluster kube-proxy does not look for them each time.
    """
    return _restore(listed, changed, first=False)


# ---- nftables ------------------------------------------------------------------------------------------------------

_SERVICE_KEY: Final = "type ipv4_addr . inet_proto . inet_service : verdict"
_PORT_KEY: Final = "type inet_proto . inet_service : verdict"
_OBJECTS: Final = (
    f'add table {_TABLE} {{ comment "rules for kube-proxy" ; }}',
    f'add set {_TABLE} cluster-ips {{ type ipv4_addr ; comment "Active ClusterIPs" ; }}',
    f'add set {_TABLE} nodeport-ips {{ type ipv4_addr ; comment "IPs that accept NodePort traffic" ; }}',
    f"add map {_TABLE} firewall-ips {{ {_SERVICE_KEY} ; "
    'comment "destinations that are subject to LoadBalancerSourceRanges" ; }',
    f"add map {_TABLE} no-endpoint-nodeports {{ {_PORT_KEY} ; "
    'comment "vmap to drop or reject packets to service nodeports with no endpoints" ; }',
    f"add map {_TABLE} no-endpoint-services {{ {_SERVICE_KEY} ; "
    'comment "vmap to drop or reject packets to services with no endpoints" ; }',
    f"add map {_TABLE} service-ips {{ {_SERVICE_KEY} ; "
    'comment "ClusterIP, ExternalIP and LoadBalancer IP traffic" ; }',
    f'add map {_TABLE} service-nodeports {{ {_PORT_KEY} ; comment "NodePort traffic" ; }}',
)
_HOOKS: Final = {
    "filter-prerouting-pre-dnat": "type filter hook prerouting priority -110",
    "filter-output-pre-dnat": "type filter hook output priority -110",
    "filter-forward": "type filter hook forward priority 0",
    "filter-input": "type filter hook input priority 0",
    "filter-output": "type filter hook output priority 0",
    "nat-output": "type nat hook output priority -100",
    "nat-postrouting": "type nat hook postrouting priority 100",
    "nat-prerouting": "type nat hook prerouting priority -100",
}
_PLAIN_CHAINS: Final = (
    "cluster-ips-check",
    "firewall-check",
    "mark-for-masquerade",
    "masquerading",
    "nodeport-endpoints-check",
    "reject-chain",
    "services",
    "service-endpoints-check",
)
_BASE_RULES: Final = (
    'cluster-ips-check ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"',
    f'cluster-ips-check ip daddr {{ {SERVICE_NETWORK} }} drop comment "Drop traffic to unallocated ClusterIPs"',
    "filter-prerouting-pre-dnat ct state new jump firewall-check",
    "filter-forward ct state new jump service-endpoints-check",
    "filter-forward ct state new jump cluster-ips-check",
    "filter-input ct state new jump nodeport-endpoints-check",
    "filter-input ct state new jump service-endpoints-check",
    "filter-output ct state new jump service-endpoints-check",
    "filter-output-pre-dnat ct state new jump firewall-check",
    "filter-output ct state new jump cluster-ips-check",
    "firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips",
    f"mark-for-masquerade mark set mark or {_MASQUERADE}",
    f"masquerading mark and {_MASQUERADE} == 0 return",
    f"masquerading mark set mark xor {_MASQUERADE}",
    "masquerading masquerade fully-random",
    "nat-output jump services",
    "nat-postrouting jump masquerading",
    "nat-prerouting jump services",
    "nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
    "reject-chain reject",
    "services ip daddr . meta l4proto . th dport vmap @service-ips",
    "services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports",
    "service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services",
)


def _nft_base(node_addresses: Sequence[IPv4Address]) -> Iterator[str]:
    yield from _OBJECTS
    yield from (f"add chain {_TABLE} {name}" for name in _PLAIN_CHAINS)
    yield from (f"add chain {_TABLE} {name} {{ {hook} ; }}" for name, hook in _HOOKS.items())
    yield from (f"add rule {_TABLE} {rule}" for rule in _BASE_RULES)
    yield from (f"add element {_TABLE} nodeport-ips {{ {address} }}" for address in node_addresses)


def _nft_chains(service: Service, *, draw: bool = True) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the chains of a Service with their rules; those of endpoints first, as others lead to them."""
    targets = []
    for number, (address, port) in enumerate(service.endpoints):
        chain = f"endpoint-{service.endpoint_chain(address, port)}"
        targets.append(f"{number} : goto {chain}")
        yield (
            chain,
            (
                f"ip saddr {address} jump mark-for-masquerade",
                f"meta l4proto {service.protocol} dnat to {address}:{port}",
            ),
        )
    drawn = f"numgen random mod {len(targets)} vmap {{ {' , '.join(targets)} }}"
    masquerade = f"ip daddr {service.address} ip saddr != {POD_NETWORK} jump mark-for-masquerade"
    yield f"service-{service.chain}", (masquerade, drawn if draw else targets[0].partition(" : ")[2])
    if service.node_port:
        yield f"external-{service.chain}", ("jump mark-for-masquerade", f"goto service-{service.chain}")


def _nft_elements(service: Service) -> Iterator[str]:
    yield f"cluster-ips {{ {service.address} }}"
    target = f"goto service-{service.chain}"
    yield f"service-ips {{ {service.address} . {service.protocol} . {service.port} : {target} }}"
    if service.node_port:
        yield f"service-nodeports {{ {service.protocol} . {service.node_port} : goto external-{service.chain} }}"


def nftables_rules(
    listed: Sequence[Service], node_addresses: Sequence[IPv4Address] = (), *, asked: Collection[int] | None = None
) -> str:
    """Return the input of ``nft -f -`` for all Services. Node ports are open on ``node_addresses``.

    ``asked``: indices of the Services that will be asked for; the others' chains lead straight to their first endpoint.
    The way to a Service is the same, but the kernel loads 30,000 in seconds instead of minutes: the draw of an endpoint
    is an anonymous map, and for the name of each the kernel goes through all others. None: as kube-proxy writes it.
    """
    lines = list(_nft_base(node_addresses))
    for index, service in enumerate(listed):
        for chain, rules in _nft_chains(service, draw=asked is None or index in asked):
            lines.append(f"add chain {_TABLE} {chain}")
            lines += (f"add rule {_TABLE} {chain} {rule}" for rule in rules)
        lines += (f"add element {_TABLE} {element}" for element in _nft_elements(service))
    return "\n".join(lines) + "\n"


def nftables_update(old: Service, new: Service) -> str:
    """Return the transaction for one Service whose endpoints changed: what is in its chains is replaced.

    Chains of endpoints that are gone are emptied; kube-proxy deletes them in a later transaction.
    """
    written = dict(_nft_chains(new))
    lines = []
    for chain, rules in written.items():
        lines += [f"add chain {_TABLE} {chain}", f"flush chain {_TABLE} {chain}"]
        lines += (f"add rule {_TABLE} {chain} {rule}" for rule in rules)
    lines += (f"flush chain {_TABLE} {chain}" for chain, _ in _nft_chains(old) if chain not in written)
    before = set(_nft_elements(old))
    after = set(_nft_elements(new))
    lines += (f"delete element {_TABLE} {element}" for element in sorted(before - after))
    lines += (f"add element {_TABLE} {element}" for element in sorted(after - before))
    return "\n".join(lines) + "\n"
