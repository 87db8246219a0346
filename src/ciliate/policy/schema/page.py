"""The reference page of the policy language, from the declarations."""

from collections.abc import Iterator
from typing import Final

from ciliate.policy.schema.cilium import CIDR_GROUP, ENTITIES, NETWORK_POLICY
from ciliate.policy.schema.kinds import Anything, Field, Fields, Flag, Kind, Many, Number, NumberOrText, Pairs, Text
from ciliate.policy.schema.kubernetes import NATIVE, TIERED
from ciliate.policy.schema.services import IP_POOL, LOCAL_REDIRECT_POLICY

_GENERAL: Final = ("apiVersion", "kind", "metadata", "status")
_INTRODUCTION: Final = """\
# The policy language

Four kinds of object say who may talk to whom: `NetworkPolicy` (`networking.k8s.io/v1`), `CiliumNetworkPolicy` and
`CiliumClusterwideNetworkPolicy` (`cilium.io/v2`, as of Cilium 1.20, with the Kafka rules of 1.19), and
`ClusterNetworkPolicy` (`policy.networking.k8s.io/v1alpha2`). A `CiliumCIDRGroup` names addresses for them. What they
mean together: [policy](../explanation/policy.md).

Every field is enforced, or refused with its reason, or fails closed; nothing is ignored. What fails closed today:
traffic that DNS, Kafka and TLS rules, `headerMatches` or listeners are about is dropped, since nobody serves them yet,
and the policy's status says so; `toFQDNs` is about nobody until names are learned. In files and on the command line an
unknown field is an error, in an object of the Kubernetes API it is a warning in its status. `ciliate policy validate
-f FILE` checks files without a cluster. The tables say what each field is and what limits it has; `!` marks what must
be set. The schemas in `install/crds` come from the same declarations.

Where Ciliate is stricter than Cilium, on purpose:

- `authentication` with a mode other than `disabled`, `toGroups`, `fromGroups`: refused, because they would not be
  enforced.
- `toFQDNs: []` and `toServices: []` are about nobody, as every other empty list of peers; Cilium takes them as
  everybody.
- `http: []` and `dns: []` allow no request; Cilium takes them as if there were no rules, and lets everything through.
- An entry of `toServices` with a Service and a selector, an `endPort` less than its port, and an ICMP type over 255
  are refused.
- `k8sService` without a namespace is a Service of the policy's own; Cilium takes one of that name in any namespace.
- `serverNames`, TLS and listeners need TCP; with protocol `ANY` they are about TCP alone. They are not for nodes.

Empty things: `ingress: [{}]` denies by default and allows nothing; `ingress: []` alone is refused; an empty list of
peers is nobody, an absent one everybody; `toPorts: []` is every port; `toPorts: [{}]` is none; `http: []` allows no
request.
"""


def policy_page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield from _INTRODUCTION.splitlines()
    yield from ("", "Entities: " + ", ".join(f"`{one}`" for one in ENTITIES) + ".")
    yield from _documents(
        ("CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy", NETWORK_POLICY),
        ("CiliumCIDRGroup", CIDR_GROUP),
        ("NetworkPolicy", NATIVE),
        ("ClusterNetworkPolicy", TIERED),
    )


_SERVICES: Final = """\
# Objects around Services

Beside Services and EndpointSlices (`v1`, `discovery.k8s.io/v1`) two kinds of `cilium.io` say where traffic goes.
`!` marks what must be set. The schemas in `install/crds` come from the same declarations.
"""


def services_page() -> Iterator[str]:
    """Yield the lines of the page about the objects around Services."""
    yield from _SERVICES.splitlines()
    yield from _documents(
        ("CiliumLocalRedirectPolicy (cilium.io/v2)", LOCAL_REDIRECT_POLICY),
        ("CiliumLoadBalancerIPPool (cilium.io/v2, v2alpha1)", IP_POOL),
    )


def _documents(*documents: tuple[str, Fields]) -> Iterator[str]:
    seen: set[str] = set()
    for title, document in documents:
        yield from ("", f"## {title}")
        for one in _named(document):
            if one.name not in seen:
                seen.add(one.name)
                yield from _table(one)


def _named(of: Kind) -> Iterator[Fields]:
    """Yield the mappings that have a table of their own, in the order in which they are met."""
    match of:
        case Many():
            yield from _named(of.of)
        case Fields():
            if of.name:
                yield of
            for field in of.fields.values():
                if not field.refused:
                    yield from _named(field.of)


def _table(one: Fields) -> Iterator[str]:
    yield from ("", f"### {one.name}", "", "| field | value | meaning |", "|---|---|---|")
    yield from _rows(one, "")
    if one.one_of:
        yield from ("", f"Exactly one of {_list(one.one_of)}.")
    if one.any_of:
        yield from ("", f"At least one of {_list(one.any_of)}.")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows(of: Fields, prefix: str) -> Iterator[str]:
    for name, field in of.fields.items():
        if not prefix and name in _GENERAL:
            continue
        yield f"| `{prefix}{name}`{'!' if field.required else ''} | {_value(field)} | {_meaning(field)} |"
        inner, step = field.of, name
        while isinstance(inner, Many):
            inner, step = inner.of, f"{step}[]"
        if isinstance(inner, Fields) and not inner.name and not field.refused:
            yield from _rows(inner, f"{prefix}{step}.")


def _meaning(field: Field) -> str:
    parts = [field.text, f"**Refused**: it {field.refused}." if field.refused else "", field.note]
    return " ".join(part for part in parts if part).replace("|", "\\|")


def _value(field: Field) -> str:
    return "" if field.refused else _kind(field.of).replace("|", "\\|")


def _kind(of: Kind) -> str:
    match of:
        case Many():
            bounds = [f"at least {of.least}" if of.least else "", f"at most {of.most}" if of.most is not None else ""]
            limits = ", ".join(one for one in bounds if one)
            return f"list of {_kind(of.of)}" + (f" ({limits})" if limits else "")
        case Text():
            if of.enum:
                return "entities" if of.enum == ENTITIES else ", ".join(f"`{one}`" for one in of.enum)
            return of.format or ("text" if not of.most else f"text, at most {of.most}")
        case Number():
            return f"{of.low} to {of.high}"
        case NumberOrText():
            return "number or text"
        case Flag():
            return "`true`, `false`"
        case Pairs():
            return "labels"
        case Anything():
            return "mapping"
        case Fields():
            return (of.name and f"[{of.name}](#{_anchor(of.name)})") or "mapping"


def _anchor(name: str) -> str:
    kept = "".join(one for one in name.lower() if one.isalnum() or one in " -")
    return kept.replace(" ", "-")
