"""Declarations that more than one kind of object uses."""

from typing import Final

from ciliate.policy.schema.kinds import Anything, Field, Fields, Many, Pairs, Text, fields

LABEL_VALUE: Final = r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
DNS_SUBDOMAIN: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
DNS_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
FQDN: Final = r"[-a-zA-Z0-9_]+(\.[-a-zA-Z0-9_]+)*\.?"
FQDN_PATTERN: Final = r"[-a-zA-Z0-9_*]+(\.[-a-zA-Z0-9_*]+)*\.?"
LONGEST_FQDN: Final = 255
OPERATORS: Final = ("In", "NotIn", "Exists", "DoesNotExist")
ANY_TEXT: Final = Text()
API_VERSION: Final = Field(of=ANY_TEXT, text="The version of the API.")
KIND: Final = Field(of=ANY_TEXT, text="The kind of the object.")
METADATA: Final = Field(of=Anything(), text="Name, namespace, labels.", required=True)
STATUS: Final = Field(of=Anything(), text="Written by the agents; not read.")
CIDR: Final = Text(format="cidr", least=1)
SELECTOR: Final = Fields(
    name="Label selector",
    fields=fields(
        matchLabels=Field(
            of=Pairs(pattern=LABEL_VALUE, most=63),
            text="Labels that must be there with this value. A key may name its source (`k8s:app`, `reserved:host`, "
            "`any:app`); "
            "without one any is meant, in a NetworkPolicy and a ClusterNetworkPolicy `k8s`.",
        ),
        matchExpressions=Field(
            of=Many(
                of=Fields(
                    fields=fields(
                        key=Field(of=ANY_TEXT, text="The label's key.", required=True),
                        operator=Field(
                            of=Text(enum=OPERATORS), text="`NotIn` and `DoesNotExist` also match what lacks the label.",
                            required=True,
                        ),
                        values=Field(
                            of=Many(of=Text(pattern=LABEL_VALUE, what="a valid label value", most=63)),
                            text="At least one with `In` and `NotIn`, none with the others.",
                        ),
                    )
                )
            ),
            text="Further conditions; all must hold, with `matchLabels`.",
        ),
    ),
)  # fmt: skip
