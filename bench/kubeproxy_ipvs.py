"""What kube-proxy's IPVS mode writes: addresses of a dummy device, virtual servers, sets, and rules that use the sets.

As in ``kubeproxy``: Services of type ClusterIP, pure text. Kernel modules, devices and sysctls are the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.kubeproxy import POD_NETWORK, Service

DEVICE: Final = "kube-ipvs0"
"""A dummy device that has the addresses of all Services, so that their packets come to the node itself."""
SYSCTLS: Final = (
    "net.ipv4.vs.conntrack=1",
    "net.ipv4.vs.conn_reuse_mode=0",
    "net.ipv4.vs.expire_nodest_conn=1",
    "net.ipv4.vs.expire_quiescent_template=1",
)
_MASQUERADE: Final = "0x4000"
_RULES: Final = f"""*filter
:KUBE-FORWARD - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {_MASQUERADE}/{_MASQUERADE} -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-IPVS-FILTER -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -s 127.0.0.0/8 -j RETURN
-A KUBE-SERVICES ! -s {POD_NETWORK} -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-POSTROUTING -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark {_MASQUERADE}/{_MASQUERADE} -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark {_MASQUERADE}
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark {_MASQUERADE}
COMMIT
"""


@dataclass(frozen=True, slots=True)
class IpvsRules:
    """Input of ``ip -batch -``, ``ipvsadm --restore``, ``ipset restore`` and ``iptables-restore --noflush``."""

    addresses: str
    servers: str
    sets: str
    rules: str


def ipvs_rules(listed: Sequence[Service]) -> IpvsRules:
    """Return what leads to all Services; ``sets`` comes before ``rules``."""
    servers, sets = [], []
    for kind, name in (("ip,port", "CLUSTER-IP"), ("ip,port,ip", "LOOP-BACK"), ("ip", "IPVS-IPS")):
        sets.append(f"create KUBE-{name} hash:{kind} maxelem {max(65536, 2 * len(listed))}")
    for service in listed:
        at = f"{service.address}:{service.port}"
        servers.append(f"-A -t {at} -s rr")
        servers += (f"-a -t {at} -r {address}:{port} -m -w 1" for address, port in service.endpoints)
        sets.append(f"add KUBE-CLUSTER-IP {service.address},{service.protocol}:{service.port}")
        sets.append(f"add KUBE-IPVS-IPS {service.address}")
    local = dict.fromkeys((service.protocol, *endpoint) for service in listed for endpoint in service.endpoints)
    sets += (f"add KUBE-LOOP-BACK {address},{protocol}:{port},{address}" for protocol, address, port in local)
    return IpvsRules(
        addresses="".join(f"address add {service.address}/32 dev {DEVICE}\n" for service in listed),
        servers="\n".join(servers) + "\n",
        sets="\n".join(sets) + "\n",
        rules=_RULES,
    )
