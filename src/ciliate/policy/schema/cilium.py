"""CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and CiliumCIDRGroup (cilium.io/v2), as of Cilium 1.20."""

from typing import Final

from ciliate.policy.schema.cilium_ports import ICMPS, TO_PORTS, TO_PORTS_DENY
from ciliate.policy.schema.common import (
    ANY_TEXT,
    API_VERSION,
    CIDR,
    DNS_SUBDOMAIN,
    FQDN,
    FQDN_PATTERN,
    KIND,
    LONGEST_FQDN,
    METADATA,
    SELECTOR,
    STATUS,
)
from ciliate.policy.schema.kinds import Anything, Field, Fields, Flag, Kind, Many, Text, fields

ENTITIES: Final = (
    "all", "world", "world-ipv4", "world-ipv6", "cluster", "cluster-mesh", "host", "remote-node", "kube-apiserver",
    "ingress", "init", "health", "unmanaged", "none",
)  # fmt: skip
LONGEST_LOG: Final = 32
_REQUIRES: Final = "was removed in Cilium 1.19: put the labels into the selectors of the peers"
_GROUPS: Final = "is not available: addresses of cloud provider groups are not looked up; use a CiliumCIDRGroup"

CIDR_RULE: Final = Fields(
    name="toCIDRSet[], fromCIDRSet[]",
    one_of=("cidr", "cidrGroupRef", "cidrGroupSelector"),
    fields=fields(
        cidr=Field(of=CIDR, text="A prefix, with its length."),
        cidrGroupRef=Field(
            of=Text(pattern=DNS_SUBDOMAIN, what="an object's name", most=253), text="The name of a CiliumCIDRGroup."
        ),
        cidrGroupSelector=Field(of=SELECTOR, text="CiliumCIDRGroups by their labels; `{}` is all of them."),
        **{"except": Field(of=Many(of=CIDR), text="Prefixes to leave out; with `cidr`, within it.")},
    ),
)
FQDN_SELECTOR: Final = Fields(
    name="toFQDNs[]",
    one_of=("matchName", "matchPattern"),
    fields=fields(
        matchName=Field(
            of=Text(pattern=FQDN, what="a DNS name", most=LONGEST_FQDN),
            text="One name. Case and a final dot do not count.",
        ),
        matchPattern=Field(
            of=Text(pattern=FQDN_PATTERN, what="a pattern of DNS names", most=LONGEST_FQDN),
            text="`*` is any part of one label, a leading `**.` one or more whole labels, `*` alone every name.",
        ),
    ),
)
SERVICE: Final = Fields(
    name="toServices[]",
    fields=fields(
        k8sService=Field(
            of=Fields(
                fields=fields(
                    serviceName=Field(of=Text(least=1), text="The Service's name.", required=True),
                    namespace=Field(of=ANY_TEXT, text="Its namespace; absent: the policy's own."),
                )
            ),
            text="One Service. Not with `k8sServiceSelector`; an entry with neither is about nobody.",
        ),
        k8sServiceSelector=Field(
            of=Fields(
                fields=fields(
                    selector=Field(of=SELECTOR, text="Labels of the Services.", required=True),
                    namespace=Field(of=ANY_TEXT, text="Their namespace; absent: every namespace."),
                )
            ),
            text="Services by their labels.",
        ),
    ),
)
AUTHENTICATION: Final = Fields(
    fields=fields(
        mode=Field(
            of=Text(enum=("disabled", "required", "test-always-fail")),
            text="Only `disabled` is accepted.",
            required=True,
            note="`required` and `test-always-fail` are refused: no connection is authenticated.",
        )
    )
)


def _peers(side: str) -> dict[str, Field]:
    """The peers of both directions; ``side`` is from or to."""
    empty = "Empty: nobody."
    return {
        f"{side}Endpoints": Field(
            of=Many(of=SELECTOR),
            text="Pods by their labels: of the policy's namespace unless the selector names one, in a "
            f"CiliumClusterwideNetworkPolicy of all. {empty}",
        ),
        f"{side}CIDR": Field(of=Many(of=CIDR), text=f"Addresses outside the cluster. {empty}"),
        f"{side}CIDRSet": Field(of=Many(of=CIDR_RULE), text=f"The same, with exceptions and groups. {empty}"),
        f"{side}Entities": Field(of=Many(of=Text(enum=ENTITIES)), text=f"Named sets. {empty}"),
        f"{side}Nodes": Field(of=Many(of=SELECTOR), text=f"Other nodes by their labels. {empty}"),
        f"{side}Groups": Field(of=Many(of=Anything()), text="Groups of a cloud provider.", refused=_GROUPS),
        f"{side}Requires": Field(of=Many(of=SELECTOR), text="Removed in Cilium 1.19.", refused=_REQUIRES),
    }


_TO_SERVICES: Final = Field(of=Many(of=SERVICE), text="Backends of Services. Empty: nobody.")
_TO_FQDNS: Final = Field(
    of=Many(of=FQDN_SELECTOR),
    text="Addresses that the pod was told for names. Needs a `dns` rule towards the resolver, which feeds it.",
    note="Empty means nobody, as with every other peer, and is warned of; Cilium ignores the empty list.",
)
_AUTH: Final = Field(of=AUTHENTICATION, text="Mutual authentication.")

INGRESS: Final = Fields(
    name="ingress[]", fields={**_peers("from"), "toPorts": TO_PORTS, "icmps": ICMPS, "authentication": _AUTH}
)
INGRESS_DENY: Final = Fields(name="ingressDeny[]", fields={**_peers("from"), "toPorts": TO_PORTS_DENY, "icmps": ICMPS})
EGRESS: Final = Fields(
    name="egress[]",
    fields={
        **_peers("to"),
        "toServices": _TO_SERVICES,
        "toFQDNs": _TO_FQDNS,
        "toPorts": TO_PORTS,
        "icmps": ICMPS,
        "authentication": _AUTH,
    },
)
EGRESS_DENY: Final = Fields(
    name="egressDeny[]",
    fields={**_peers("to"), "toServices": _TO_SERVICES, "toPorts": TO_PORTS_DENY, "icmps": ICMPS},
)
_DENY_MODE: Final = "Default deny in this direction; absent: if the direction has rules."
SPEC: Final = Fields(
    name="spec, specs[]",
    one_of=("endpointSelector", "nodeSelector"),
    any_of=("ingress", "ingressDeny", "egress", "egressDeny"),
    fields=fields(
        endpointSelector=Field(
            of=SELECTOR,
            text="The pods that the policy is for; `{}` is every pod: of the namespace, or of the cluster.",
        ),
        nodeSelector=Field(
            of=SELECTOR,
            text="The nodes that the policy is for (host firewall).",
            note="Only in a CiliumClusterwideNetworkPolicy. Then `http` and `kafka` rules and TLS cannot be used.",
        ),
        ingress=Field(of=Many(of=INGRESS), text="What may come in. `[{}]` allows nothing and denies by default."),
        ingressDeny=Field(of=Many(of=INGRESS_DENY), text="What may not, whatever any policy allows."),
        egress=Field(of=Many(of=EGRESS), text="What may go out."),
        egressDeny=Field(of=Many(of=EGRESS_DENY), text="What may not, whatever any policy allows."),
        enableDefaultDeny=Field(
            of=Fields(
                fields=fields(
                    ingress=Field(of=Flag(), text=_DENY_MODE),
                    egress=Field(of=Flag(), text=_DENY_MODE),
                )
            ),
            text="Whether what no rule allows is denied.",
            note="`true` in a direction without rules does nothing, as under Cilium, and is warned of.",
        ),
        labels=Field(
            of=Many(
                of=Fields(
                    fields=fields(
                        key=Field(of=Text(least=1), text="Key.", required=True),
                        value=Field(of=ANY_TEXT, text="Value."),
                        source=Field(of=ANY_TEXT, text="Source; absent: `unspec`."),
                    )
                )
            ),
            text="Labels of the policy itself, for reports.",
        ),
        description=Field(of=ANY_TEXT, text="Free text."),
        log=Field(
            of=Fields(
                fields=fields(
                    value=Field(
                        of=Text(most=LONGEST_LOG), text=f"At most {LONGEST_LOG} printable characters."
                    )
                )
            ),
            text="Text that every flow judged by the policy carries.",
        ),
    ),
)  # fmt: skip


def _document(spec: Kind) -> Fields:
    return Fields(
        any_of=("spec", "specs"),
        fields=fields(
            apiVersion=API_VERSION,
            kind=KIND,
            metadata=METADATA,
            spec=Field(of=spec, text="One policy."),
            specs=Field(of=Many(of=spec), text="Several, under one name."),
            status=STATUS,
        ),
    )


NETWORK_POLICY: Final = _document(SPEC)
CIDR_GROUP: Final = Fields(
    fields=fields(
        apiVersion=API_VERSION,
        kind=KIND,
        metadata=METADATA,
        spec=Field(
            of=Fields(
                name="CiliumCIDRGroup spec",
                fields=fields(
                    externalCIDRs=Field(
                        of=Many(of=CIDR), text="Addresses outside the cluster.", required=True
                    )
                ),
            ),
            text="What is in the group.",
            required=True,
        ),
    )
)  # fmt: skip
