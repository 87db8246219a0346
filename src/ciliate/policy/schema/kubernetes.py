"""NetworkPolicy (networking.k8s.io/v1) and ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2)."""

from typing import Final

from ciliate.policy.schema.common import API_VERSION, CIDR, KIND, LONGEST_FQDN, METADATA, SELECTOR, STATUS
from ciliate.policy.schema.kinds import Field, Fields, Many, Number, NumberOrText, Text, fields

# ---- NetworkPolicy ------------------------------------------------------------------------------------------

PEER: Final = Fields(
    name="NetworkPolicy from[], to[]",
    any_of=("podSelector", "namespaceSelector", "ipBlock"),
    fields=fields(
        podSelector=Field(of=SELECTOR, text="Pods: of the policy's namespace, or of those of `namespaceSelector`."),
        namespaceSelector=Field(of=SELECTOR, text="Namespaces by their labels; `{}` is all."),
        ipBlock=Field(
            of=Fields(
                fields=fields(
                    cidr=Field(of=CIDR, text="Addresses outside the cluster.", required=True),
                    **{"except": Field(of=Many(of=CIDR), text="Prefixes within it to leave out.")},
                )
            ),
            text="Addresses; not with the others.",
        ),
    ),
)
_PORTS: Final = Field(
    of=Many(
        of=Fields(
            name="NetworkPolicy ports[]",
            fields=fields(
                protocol=Field(of=Text(enum=("TCP", "UDP", "SCTP")), text="Absent: TCP."),
                port=Field(of=NumberOrText(), text="A number or a name; absent: every port of the protocol."),
                endPort=Field(of=Number(low=1, high=65535), text="The last port of a range; needs a number."),
            ),
        )
    ),
    text="Ports; absent or empty: everything.",
)


def _native(side: str) -> Fields:
    peers = Field(of=Many(of=PEER), text="Peers; absent or empty: everybody.")
    return Fields(fields={side: peers, "ports": _PORTS})


NATIVE: Final = Fields(
    fields=fields(
        apiVersion=API_VERSION,
        kind=KIND,
        metadata=METADATA,
        spec=Field(
            of=Fields(
                name="NetworkPolicy spec",
                fields=fields(
                    podSelector=Field(of=SELECTOR, text="The pods that the policy is for; absent or `{}`: all."),
                    ingress=Field(of=Many(of=_native("from")), text="What may come in."),
                    egress=Field(of=Many(of=_native("to")), text="What may go out."),
                    policyTypes=Field(
                        of=Many(of=Text(enum=("Ingress", "Egress")), most=2),
                        text="Directions that are denied by default. Absent: Ingress, and Egress if it has rules.",
                    ),
                ),
            ),
            text="The policy.",
            required=True,
        ),
        status=STATUS,
    )
)  # fmt: skip

# ---- ClusterNetworkPolicy -----------------------------------------------------------------------------------

ACTIONS: Final = ("Accept", "Deny", "Pass")
TIERS: Final = ("Admin", "Baseline")
MOST: Final = 25
_NUMBER: Final = Number(low=1, high=65535)
DOMAIN: Final = (
    r"(\*\.)?([a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.)+[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.?"
)  # fmt: skip
PODS: Final = Fields(
    fields=fields(
        namespaceSelector=Field(of=SELECTOR, text="Namespaces by their labels; absent or `{}`: all."),
        podSelector=Field(
            of=SELECTOR,
            text="Pods in them; `{}` is all. Without namespaces it may name what is no pod, as `reserved:host`.",
            required=True,
        ),
    )
)
_PODS: Final = fields(
    namespaces=Field(of=SELECTOR, text="All pods of namespaces, by the namespaces' labels."),
    pods=Field(of=PODS, text="Pods by their labels, in namespaces by theirs."),
)
SUBJECT: Final = Fields(name="ClusterNetworkPolicy subject", one_of=("namespaces", "pods"), fields=_PODS)
TIER_INGRESS_PEER: Final = Fields(
    name="ClusterNetworkPolicy from[]", one_of=("namespaces", "pods"), growing=True, fields=_PODS
)
TIER_EGRESS_PEER: Final = Fields(
    name="ClusterNetworkPolicy to[]",
    one_of=("namespaces", "pods", "nodes", "networks", "domainNames"),
    growing=True,
    fields={
        **_PODS,
        **fields(
            nodes=Field(of=SELECTOR, text="Nodes by their labels."),
            networks=Field(
                of=Many(of=CIDR, least=1, most=MOST, unique=True),
                text="Addresses.",
                note="Addresses outside the cluster, as under Cilium: a prefix does not match pods in it.",
            ),
            domainNames=Field(
                of=Many(
                    of=Text(pattern=DOMAIN, what="a domain name (*. may stand first)", most=LONGEST_FQDN),
                    least=1,
                    most=MOST,
                    unique=True,
                ),
                text="Names; `*.x` is every name below x. With action Accept alone.",
                note="Also lets the subject ask the cluster's DNS (`k8s-app: kube-dns`) for them.",
            ),
        ),
    },
)
_PORT: Final = Fields(
    fields=fields(
        destinationPort=Field(
            of=Fields(
                one_of=("number", "range"),
                fields=fields(
                    number=Field(of=_NUMBER, text="One port."),
                    range=Field(
                        of=Fields(
                            fields=fields(
                                start=Field(of=_NUMBER, text="The first.", required=True),
                                end=Field(of=_NUMBER, text="The last, greater than the first.", required=True),
                            )
                        ),
                        text="Several.",
                    ),
                ),
            ),
            text="Destination port.",
            required=True,
        )
    )
)
PROTOCOL: Final = Fields(
    name="ClusterNetworkPolicy protocols[]",
    one_of=("tcp", "udp", "sctp", "destinationNamedPort"),
    fields=fields(
        tcp=Field(of=_PORT, text="TCP."),
        udp=Field(of=_PORT, text="UDP."),
        sctp=Field(of=_PORT, text="SCTP."),
        destinationNamedPort=Field(of=Text(least=1), text="A container port's name; of pods alone."),
    ),
)


def _tier_rule(side: str, peer: Fields) -> Fields:
    return Fields(
        name=f"ClusterNetworkPolicy {'ingress' if side == 'from' else 'egress'}[]",
        fields={
            **fields(
                name=Field(of=Text(most=100), text="The rule's name."),
                action=Field(of=Text(enum=ACTIONS), text="`Pass` leaves it to the next tier.", required=True),
                protocols=Field(of=Many(of=PROTOCOL, least=1, most=MOST), text="Protocols and ports; absent: all."),
            ),
            side: Field(of=Many(of=peer, least=1, most=MOST), text="Peers.", required=True),
        },
    )


TIERED: Final = Fields(
    fields=fields(
        apiVersion=API_VERSION,
        kind=KIND,
        metadata=METADATA,
        spec=Field(
            of=Fields(
                name="ClusterNetworkPolicy spec",
                fields=fields(
                    tier=Field(
                        of=Text(enum=TIERS), required=True,
                        text="`Admin` goes before all other policies, `Baseline` after.",
                    ),
                    priority=Field(of=Number(low=0, high=1000), text="Lower goes first in the tier.", required=True),
                    subject=Field(of=SUBJECT, text="The pods that the policy is for.", required=True),
                    ingress=Field(of=Many(of=_tier_rule("from", TIER_INGRESS_PEER), most=MOST), text="Rules in order."),
                    egress=Field(of=Many(of=_tier_rule("to", TIER_EGRESS_PEER), most=MOST), text="Rules in order."),
                ),
            ),
            text="The policy.",
            required=True,
        ),
        status=STATUS,
    )
)  # fmt: skip
