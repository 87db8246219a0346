"""What stands in for a policy that is not valid and never was: default deny for whom it selects, where it has rules.

A policy that cannot be read may have been meant to close something; ignoring it would leave that open.
"""

from collections.abc import Mapping
from typing import Any, Final

from ciliate.policy.parse import API_VERSIONS, parse_object
from ciliate.policy.rules import PolicyError, PolicyObject

_EGRESS: Final = ("egress", "egressDeny")
_INGRESS: Final = ("ingress", "ingressDeny")


def closed(document: Mapping[str, Any], *, source: str = "") -> PolicyObject:
    """Return the policy that denies by default whom ``document`` selects, in the directions that it has rules for.

    A selector that cannot be read selects every pod that this kind of policy could select. Error: PolicyError (not even
    kind and name can be read).
    """
    try:
        return parse_object(_stripped(document, keep_selectors=True), source=source)
    except PolicyError:
        return parse_object(_stripped(document, keep_selectors=False), source=source)


def _stripped(document: Mapping[str, Any], *, keep_selectors: bool) -> dict[str, Any]:
    kind = str(document.get("kind"))
    kept: dict[str, Any] = {"apiVersion": API_VERSIONS.get(kind), "kind": kind}
    metadata = document.get("metadata")
    if isinstance(metadata, Mapping):
        kept["metadata"] = {name: metadata[name] for name in ("name", "namespace") if name in metadata}
    specs = [document["spec"]] if document.get("spec") is not None else []
    listed = document.get("specs")
    specs += listed if isinstance(listed, list) else []
    native = kind == "NetworkPolicy"
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
