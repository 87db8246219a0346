"""CiliumLocalRedirectPolicy (cilium.io/v2) and CiliumLoadBalancerIPPool (cilium.io/v2, v2alpha1), as of Cilium 1.20."""

from typing import Final

from ciliate.policy.schema.common import (
    ANY_TEXT,
    API_VERSION,
    CIDR,
    DNS_LABEL,
    KIND,
    METADATA,
    SELECTOR,
    STATUS,
)
from ciliate.policy.schema.kinds import Field, Fields, Flag, Many, Text, fields

PORT_NUMBER: Final = (
    r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"  # 1 to 65535
)
_PORT: Final = Fields(
    name="toPorts[] of a redirect",
    fields=fields(
        port=Field(of=Text(pattern=PORT_NUMBER, what="a port from 1 to 65535"), text="The number, as a string.",
                   required=True),
        protocol=Field(of=Text(enum=("TCP", "UDP")), text="The protocol.", required=True),
        name=Field(
            of=Text(pattern=r"[a-zA-Z0-9](-?[a-zA-Z0-9])*", what="a port's name", most=15),
            text="Joins a port of the frontend with one of the backend; needed where there are several.",
        ),
    ),
)  # fmt: skip
_PORTS: Final = Many(of=_PORT)
_FRONTEND: Final = Fields(
    one_of=("addressMatcher", "serviceMatcher"),
    fields=fields(
        addressMatcher=Field(
            of=Fields(
                fields=fields(
                    ip=Field(of=Text(least=1), text="An address that no Service has.", required=True),
                    toPorts=Field(of=_PORTS, text="Which of its ports.", required=True),
                )
            ),
            text="Traffic to an address.",
        ),
        serviceMatcher=Field(
            of=Fields(
                fields=fields(
                    serviceName=Field(
                        of=Text(pattern=DNS_LABEL, what="a Service's name", most=63), text="Of type ClusterIP.",
                        required=True,
                    ),
                    namespace=Field(
                        of=Text(pattern=DNS_LABEL, what="a namespace's name", most=63),
                        text="The policy's own: no other is allowed.", required=True,
                    ),
                    toPorts=Field(of=_PORTS, text="Which of its ports; absent: all of them."),
                )
            ),
            text="Traffic to a Service's cluster address.",
        ),
    ),
)  # fmt: skip
LOCAL_REDIRECT_POLICY: Final = Fields(
    fields=fields(
        apiVersion=API_VERSION,
        kind=KIND,
        metadata=METADATA,
        spec=Field(
            of=Fields(
                name="CiliumLocalRedirectPolicy spec",
                fields=fields(
                    redirectFrontend=Field(of=_FRONTEND, text="What is redirected.", required=True),
                    redirectBackend=Field(
                        of=Fields(
                            fields=fields(
                                localEndpointSelector=Field(
                                    of=SELECTOR, text="Pods of the client's node, in the policy's namespace.",
                                    required=True,
                                ),
                                toPorts=Field(of=_PORTS, text="The port of each.", required=True),
                            )
                        ),
                        text="Whereto.",
                        required=True,
                    ),
                    skipRedirectFromBackend=Field(
                        of=Flag(), text="The backends themselves reach what is redirected (default: `false`)."
                    ),
                    description=Field(of=ANY_TEXT, text="For people."),
                ),
            ),
            text="The redirect. Without a local backend traffic goes where it would go without the policy.",
            required=True,
        ),
        status=STATUS,
    )
)  # fmt: skip
_BLOCK: Final = Fields(
    fields=fields(
        cidr=Field(of=CIDR, text="A prefix. Not with `start`."),
        start=Field(of=Text(least=1), text="First address of a range; the last one is `stop`, or itself."),
        stop=Field(of=Text(least=1), text="Last address of a range."),
    )
)
IP_POOL: Final = Fields(
    fields=fields(
        apiVersion=API_VERSION,
        kind=KIND,
        metadata=METADATA,
        spec=Field(
            of=Fields(
                name="CiliumLoadBalancerIPPool spec",
                fields=fields(
                    blocks=Field(of=Many(of=_BLOCK), text="Addresses to give out."),
                    serviceSelector=Field(
                        of=SELECTOR,
                        text="Services that may have them, by labels; `io.kubernetes.service.name` and "
                        "`io.kubernetes.service.namespace` are labels too. Absent: all.",
                    ),
                    allowFirstLastIPs=Field(
                        of=Text(enum=("Yes", "No")),
                        text="Whether the first and last address of a `cidr` may be given out (default: `Yes`).",
                    ),
                    disabled=Field(of=Flag(), text="Nothing new is given out; what has been stays."),
                ),
            ),
            text="The pool.",
            required=True,
        ),
        status=STATUS,
    )
)
