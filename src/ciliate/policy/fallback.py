"""What stands in for a policy that is not valid and never was: default deny for whom it selects, where it has rules.

A policy that cannot be read may have been meant to close something; ignoring it would leave that open.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from ciliate.policy.image import Direction
from ciliate.policy.parse import API_VERSIONS, parse_object
from ciliate.policy.rules import PolicyError, PolicyObject

_EGRESS: Final = ("egress", "egressDeny")
_INGRESS: Final = ("ingress", "ingressDeny")


def closed(document: Mapping[str, Any], *, source: str = "") -> PolicyObject:
    """Return the policy that denies by default whom ``document`` selects, in the directions that it has rules for.

    A selector that cannot be read selects every pod that this kind of policy could select. Error: PolicyError (not even
    kind and name can be read).
    """
    strip, close = (_tiered, _closing) if document.get("kind") == "ClusterNetworkPolicy" else (_stripped, _as_it_is)
    try:
        found = parse_object(strip(document, keep_selectors=True), source=source)
    except PolicyError:
        found = parse_object(strip(document, keep_selectors=False), source=source)
    return close(found, document)


def _as_it_is(policy: PolicyObject, document: Mapping[str, Any]) -> PolicyObject:
    del document
    return policy


def _closing(policy: PolicyObject, document: Mapping[str, Any]) -> PolicyObject:
    """A ClusterNetworkPolicy cannot deny by default, so that is added to its form: after all tiers."""
    spec = document.get("spec")
    named = {name for name in ("ingress", "egress") if isinstance(spec, Mapping) and name in spec}
    directions = frozenset(Direction[name.upper()] for name in named or ("ingress", "egress"))
    return replace(policy, subjects=tuple(replace(one, default_deny=directions) for one in policy.subjects))


def _tiered(document: Mapping[str, Any], *, keep_selectors: bool) -> dict[str, Any]:
    spec = document.get("spec")
    subject = spec.get("subject") if keep_selectors and isinstance(spec, Mapping) else {"namespaces": {}}
    return _named(document) | {"spec": {"tier": "Admin", "priority": 0, "subject": subject}}


def _named(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind and name alone."""
    kind = str(document.get("kind"))
    kept: dict[str, Any] = {"apiVersion": API_VERSIONS.get(kind), "kind": kind}
    metadata = document.get("metadata")
    if isinstance(metadata, Mapping):
        kept["metadata"] = {name: metadata[name] for name in ("name", "namespace") if name in metadata}
    return kept


def _stripped(document: Mapping[str, Any], *, keep_selectors: bool) -> dict[str, Any]:
    kept = _named(document)
    specs = [document["spec"]] if document.get("spec") is not None else []
    listed = document.get("specs")
    specs += listed if isinstance(listed, list) else []
    native = document.get("kind") == "NetworkPolicy"
    bare = [_spec(one if isinstance(one, Mapping) else {}, native=native, keep=keep_selectors) for one in specs or [{}]]
    return {**kept, "spec": bare[0]} if native else {**kept, "specs": bare}


def _spec(spec: Mapping[str, Any], *, native: bool, keep: bool) -> dict[str, Any]:
    ingress, egress = (any(name in spec for name in names) for names in (_INGRESS, _EGRESS))
    if native:
        types = spec.get("policyTypes")
        egress = egress or (isinstance(types, list) and "Egress" in types)
        ingress = ingress or not (isinstance(types, list) and types == ["Egress"])
        directions = [name for name, wanted in (("Ingress", ingress), ("Egress", egress)) if wanted]
        return {"podSelector": spec.get("podSelector") if keep else {}, "policyTypes": directions}
    if not ingress and not egress:  # nothing can be told of it
        ingress = egress = True
    selector = {"nodeSelector": spec["nodeSelector"]} if keep and "nodeSelector" in spec else {}
    if not selector:
        selector = {"endpointSelector": spec.get("endpointSelector") if keep else {}}
    return selector | {name: [{}] for name, wanted in (("ingress", ingress), ("egress", egress)) if wanted}
