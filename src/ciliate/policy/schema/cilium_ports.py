"""``toPorts`` and ``icmps`` of cilium.io/v2; Kafka rules as they were in Cilium 1.19."""

from typing import Final

from ciliate.policy.schema.common import ANY_TEXT, FQDN, FQDN_PATTERN, LONGEST_FQDN
from ciliate.policy.schema.kinds import Anything, Field, Fields, Many, Number, NumberOrText, Text, fields

MAX_PORTS: Final = 40
PROTOCOLS: Final = ("TCP", "UDP", "SCTP", "VRRP", "IGMP", "GRE", "IPIP", "IPV6", "ESP", "AH", "ANY")
LISTENER_KINDS: Final = ("CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig")
MISMATCHES: Final = ("LOG", "ADD", "DELETE", "REPLACE")
_GENERIC: Final = "was removed in Cilium 1.20 and is not available"
_REGEX: Final = "A regular expression (RE2) that matches the whole"

PORT: Final = Fields(
    name="ports[]",
    fields=fields(
        port=Field(
            of=Text(pattern=r"[0-9_]*|[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*", what="a port number or a port name"),
            text='A number or a name, as a string; `"0"` is every port. Absent only with protocols without ports.',
        ),
        endPort=Field(of=Number(low=0, high=65535), text="The last port of a range; 0: no range. Not with a name."),
        protocol=Field(
            of=Text(enum=PROTOCOLS, folded=True),
            text="Absent: `ANY`, which is TCP, UDP and SCTP. VRRP, IGMP, GRE, IPIP, IPV6, ESP and AH have no ports.",
        ),
    ),
)
_PORTS: Final = Field(of=Many(of=PORT, most=MAX_PORTS), text=f"At most {MAX_PORTS}. Empty: nothing is allowed.")
SECRET: Final = Fields(
    fields=fields(
        name=Field(of=Text(least=1), text="The Secret's name.", required=True),
        namespace=Field(of=ANY_TEXT, text="Its namespace; absent: the policy's, or `default`."),
    )
)
TLS: Final = Fields(
    name="terminatingTLS, originatingTLS",
    fields=fields(
        secret=Field(of=SECRET, text="Where the certificates are.", required=True),
        trustedCA=Field(of=ANY_TEXT, text="Entry of the Secret; absent: `ca.crt`, if there."),
        certificate=Field(of=ANY_TEXT, text="Entry of the Secret; absent: `tls.crt`, if there."),
        privateKey=Field(of=ANY_TEXT, text="Entry of the Secret; absent: `tls.key`, if there."),
    ),
)
LISTENER: Final = Fields(
    name="listener",
    fields=fields(
        envoyConfig=Field(
            of=Fields(
                fields=fields(
                    kind=Field(
                        of=Text(enum=LISTENER_KINDS),
                        text="Absent: `CiliumEnvoyConfig` in a CiliumNetworkPolicy, else the clusterwide kind.",
                    ),
                    name=Field(of=Text(least=1), text="The object's name.", required=True),
                )
            ),
            text="Where the listener is.",
            required=True,
        ),
        name=Field(of=Text(least=1), text="The listener's name.", required=True),
        priority=Field(of=Number(low=1, high=100), text="Lower wins where listeners meet."),
    ),
)
HTTP: Final = Fields(
    name="http[]",
    fields=fields(
        method=Field(of=ANY_TEXT, text=f"{_REGEX} method."),
        path=Field(of=ANY_TEXT, text=f"{_REGEX} path, with the query."),
        host=Field(of=ANY_TEXT, text=f"{_REGEX} Host header."),
        headers=Field(
            of=Many(of=ANY_TEXT),
            text="`Name: value` (exact) or `Name` (present). What follows the first blank is the value.",
        ),
        headerMatches=Field(
            of=Many(
                of=Fields(
                    fields=fields(
                        name=Field(of=Text(least=1), text="The header's name.", required=True),
                        value=Field(of=ANY_TEXT, text="Its exact value; absent, without a secret: any."),
                        secret=Field(of=SECRET, text="Where the value is."),
                        mismatch=Field(
                            of=Text(enum=MISMATCHES), text="What happens instead of a denial if it does not match."
                        ),
                    )
                )
            ),
            text="Headers with values that may be secret.",
        ),
    ),
)
KAFKA: Final = Fields(
    name="kafka[]",
    fields=fields(
        role=Field(of=ANY_TEXT, text="`produce` or `consume`: all the API keys that it takes. Not with `apiKey`."),
        apiKey=Field(of=ANY_TEXT, text="The name of a request (`fetch`, `createtopics`)."),
        apiVersion=Field(
            of=Text(pattern=r"[+-]?[0-9]*", what="a version number in 0..32767"),
            text="The request's version, as a string.",
        ),
        clientID=Field(of=ANY_TEXT, text="The client's identifier."),
        topic=Field(
            of=Text(pattern=r"[a-zA-Z0-9._\\-]*", what="a topic's name (letters, digits, . _ -)", most=255),
            text="The topic; every topic of a request must be allowed.",
        ),
    ),
)  # fmt: skip
DNS: Final = Fields(
    one_of=("matchName", "matchPattern"),
    fields=fields(
        matchName=Field(
            of=Text(pattern=FQDN, what="a DNS name", most=LONGEST_FQDN), text="A name that may be asked for."
        ),
        matchPattern=Field(
            of=Text(pattern=FQDN_PATTERN, what="a pattern of DNS names", most=LONGEST_FQDN),
            text="Names that may be asked for.",
        ),
    ),
)
RULES: Final = Fields(
    name="rules",
    one_of=("http", "kafka", "dns"),
    fields=fields(
        http=Field(of=Many(of=HTTP), text="HTTP and gRPC requests. Empty: none is allowed."),
        kafka=Field(
            of=Many(of=KAFKA), text="Kafka requests, as in Cilium 1.19. Empty: none is allowed.",
            note="Removed in Cilium 1.20.",
        ),
        dns=Field(of=Many(of=DNS), text="DNS queries; in `egress` alone."),
        l7proto=Field(of=ANY_TEXT, text="Removed in Cilium 1.20.", refused=_GENERIC),
        l7=Field(of=Many(of=Anything()), text="Removed in Cilium 1.20.", refused=_GENERIC),
    ),
)  # fmt: skip
TO_PORTS: Final = Field(
    of=Many(
        of=Fields(
            name="toPorts[]",
            fields=fields(
                ports=_PORTS,
                rules=Field(
                    of=RULES, text="What may be said on the ports. Needs protocol TCP, for `dns` UDP, TCP or ANY."
                ),
                serverNames=Field(
                    of=Many(
                        of=Text(
                            least=1, most=LONGEST_FQDN, pattern=FQDN_PATTERN,
                            what="a server name or a pattern of them",
                        ),
                        least=1,
                        unique=True,
                    ),
                    text="TLS server names (SNI), or patterns as for DNS. With `rules`, TLS must be terminated.",
                ),
                terminatingTLS=Field(of=TLS, text="TLS from the client ends in the proxy, with these certificates."),
                originatingTLS=Field(of=TLS, text="The proxy speaks TLS to the server, and trusts these."),
                listener=Field(
                    of=LISTENER, text="A listener of an Envoy configuration; in `egress` alone, without `rules`."
                ),
            ),
        )
    ),
    text="Ports. Absent or empty: every port and protocol.",
)  # fmt: skip
TO_PORTS_DENY: Final = Field(
    of=Many(of=Fields(fields=fields(ports=_PORTS))), text="Ports; without rules. Absent or empty: everything."
)
ICMPS: Final = Field(
    of=Many(
        of=Fields(
            fields=fields(
                fields=Field(
                    of=Many(
                        of=Fields(
                            name="icmps[].fields[]",
                            fields=fields(
                                family=Field(of=Text(enum=("IPv4", "IPv6")), text="Absent: `IPv4`."),
                                type=Field(
                                    of=NumberOrText(pattern=r"[0-9]+|[A-Za-z]+( Reply| Request)?"),
                                    text="The type, 0 to 255 or a name (`EchoRequest`).",
                                    required=True,
                                ),
                            ),
                        ),
                        most=MAX_PORTS,
                    ),
                    text=f"At most {MAX_PORTS} types.",
                )
            )
        )
    ),
    text="ICMP types; not with `toPorts`.",
)
