"""CustomResourceDefinitions of cilium.io, from the declarations that the parser checks with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from ciliate.policy.schema.cilium import CIDR_GROUP, NETWORK_POLICY
from ciliate.policy.schema.kinds import Anything, Fields, Flag, Kind, Many, Number, NumberOrText, Pairs, Text
from ciliate.policy.schema.services import IP_POOL, LOCAL_REDIRECT_POLICY

HEADER: Final = "# Written by `make docs` from src/ciliate/policy/schema; do not edit.\n"
_AGE: Final = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_VALID: Final = {"name": "Valid", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Valid')].status"}
_POOL_COLUMNS: Final[tuple[Mapping[str, str], ...]] = (
    {"name": "Disabled", "type": "boolean", "jsonPath": ".spec.disabled"},
    {
        "name": "Conflicting",
        "type": "string",
        "jsonPath": ".status.conditions[?(@.type=='cilium.io/PoolConflict')].status",
    },
    {
        "name": "IPs Available",
        "type": "string",
        "jsonPath": ".status.conditions[?(@.type=='cilium.io/IPsAvailable')].message",
    },
)
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What a CustomResourceDefinition says beside the schema.

    ``status``: it has the subresource; ``columns``: what ``kubectl get`` shows beside the age; ``older``: versions that
    are served with the same schema.
    """

    kind: str
    plural: str
    short: tuple[str, ...]
    categories: tuple[str, ...]
    namespaced: bool
    status: bool
    document: Fields
    columns: tuple[Mapping[str, str], ...] = ()
    older: tuple[str, ...] = ()


RESOURCES: Final = (
    Resource(
        kind="CiliumNetworkPolicy", plural="ciliumnetworkpolicies", short=("cnp", "ciliumnp"),
        categories=("cilium", "ciliumpolicy"), namespaced=True, status=True, document=NETWORK_POLICY,
        columns=(_VALID,),
    ),
    Resource(
        kind="CiliumClusterwideNetworkPolicy", plural="ciliumclusterwidenetworkpolicies", short=("ccnp",),
        categories=("cilium", "ciliumpolicy"), namespaced=False, status=True, document=NETWORK_POLICY,
        columns=(_VALID,),
    ),
    Resource(
        kind="CiliumCIDRGroup", plural="ciliumcidrgroups", short=("ccg",),
        categories=("cilium",), namespaced=False, status=False, document=CIDR_GROUP,
    ),
    Resource(
        kind="CiliumLocalRedirectPolicy", plural="ciliumlocalredirectpolicies", short=("clrp",),
        categories=("cilium", "ciliumpolicy"), namespaced=True, status=True, document=LOCAL_REDIRECT_POLICY,
    ),
    Resource(
        kind="CiliumLoadBalancerIPPool", plural="ciliumloadbalancerippools",
        short=("ippools", "ippool", "lbippool", "lbippools"), categories=("cilium",), namespaced=False, status=True,
        document=IP_POOL, columns=_POOL_COLUMNS, older=("v2alpha1",),
    ),
)  # fmt: skip


def files() -> dict[str, str]:
    """Return the text of each file of ``install/crds``, by its name."""
    return {
        f"{one.plural}.yaml": HEADER + yaml.safe_dump(definition(one), sort_keys=False, width=110, allow_unicode=True)
        for one in RESOURCES
    }


def definition(one: Resource) -> Schema:
    """Return the CustomResourceDefinition of a resource."""
    version: Schema = {
        "name": "v2",
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [dict(_AGE), *(dict(column) for column in one.columns)],
        "schema": {"openAPIV3Schema": document_schema(one.document)},
    }
    if one.status:
        version["subresources"] = {"status": {}}
    versions = [version, *({**version, "name": name, "storage": False} for name in one.older)]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{one.plural}.cilium.io"},
        "spec": {
            "group": "cilium.io",
            "names": {
                "kind": one.kind,
                "listKind": f"{one.kind}List",
                "plural": one.plural,
                "singular": one.kind.lower(),
                "shortNames": list(one.short),
                "categories": list(one.categories),
            },
            "scope": "Namespaced" if one.namespaced else "Cluster",
            "versions": versions,
        },
    }


def document_schema(document: Fields) -> Schema:
    """Return the schema of a whole object; the API server knows ``metadata`` itself."""
    found = schema(document)
    found["properties"]["metadata"] = {"type": "object"}
    return found


def schema(of: Kind) -> Schema:
    """Return the structural OpenAPI v3 schema of a declaration."""
    match of:
        case Fields():
            return _fields(of)
        case Many():
            return _many(of)
        case Text():
            return _text(of)
        case Number():
            return {"type": "integer", "minimum": of.low, "maximum": of.high}
        case NumberOrText():
            pattern = {"pattern": _anchored(of.pattern)} if of.pattern else {}
            return {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}], **pattern}
        case Flag():
            return {"type": "boolean"}
        case Pairs():
            value: Schema = {"type": "string"}
            if of.most:
                value["maxLength"] = of.most
            if of.pattern:
                value["pattern"] = _anchored(of.pattern)
            return {"type": "object", "additionalProperties": value}
        case Anything():
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _fields(of: Fields) -> Schema:
    found: Schema = {"type": "object", "properties": dict(_properties(of))}
    if required := [name for name, field in of.fields.items() if field.required]:
        found["required"] = required
    if of.one_of:
        found["oneOf"] = [{"required": [name]} for name in of.one_of]
    if of.any_of:
        found["anyOf"] = [{"required": [name]} for name in of.any_of]
    return found


def _properties(of: Fields) -> Iterator[tuple[str, Schema]]:
    for name, field in of.fields.items():
        if not field.refused:
            yield name, {"description": field.text + (f" {field.note}" if field.note else ""), **schema(field.of)}
        elif isinstance(field.of, Many):
            nothing: Mapping[str, Any] = {"type": "array", "maxItems": 0, "items": {"type": "string"}}
            yield name, {"description": f"{field.text} It {field.refused}.", **nothing}


def _many(of: Many) -> Schema:
    found: Schema = {"type": "array", "items": schema(of.of)}
    if of.least:
        found["minItems"] = of.least
    if of.most is not None:
        found["maxItems"] = of.most
    if of.unique:
        found["x-kubernetes-list-type"] = "set"
    return found


def _text(of: Text) -> Schema:
    found: Schema = {"type": "string"}
    if of.enum:
        found["enum"] = list(of.enum)
    if of.format:
        found["format"] = of.format
    if of.pattern:
        found["pattern"] = _anchored(of.pattern)
    if of.least:
        found["minLength"] = of.least
    if of.most:
        found["maxLength"] = of.most
    return found


def _anchored(pattern: str) -> str:
    return f"^({pattern})$"
