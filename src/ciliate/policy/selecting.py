"""Label selectors of policies, for both kinds of syntax."""

import re
from collections.abc import Mapping
from typing import Final

from ciliate.identity.labels import NAMESPACE, NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.document import At

_SOURCES: Final = ("k8s", "reserved", "any", "cidr")
_KEY: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_OPERATORS: Final[Mapping[str, Operator]] = {one.value: one for one in Operator}


def cilium_key(text: str, default: str = "any") -> str:
    """Return ``source:key``; Cilium also writes ``source.key``, and without a source any is meant."""
    for source in _SOURCES:
        for separator in (":", "."):
            if text.startswith(f"{source}{separator}"):
                return f"{source}:{text[len(source) + 1 :]}"
    return f"{default}:{text}"


def cilium_selector(at: At) -> Selector:
    """Return the selector of an ``endpointSelector`` or of one of ``fromEndpoints``."""
    return Selector(requirements=_requirements(at, lambda key: cilium_key(key)))


def pod_selector(at: At) -> tuple[Requirement, ...]:
    """Return a NetworkPolicy's ``podSelector``."""
    return _requirements(at, lambda key: f"k8s:{key}")


def namespace_selector(at: At) -> tuple[Requirement, ...]:
    """Return a NetworkPolicy's ``namespaceSelector``: about the labels of the pod's namespace."""
    found = _requirements(at, lambda key: f"k8s:{NAMESPACE_LABELS}.{key}")
    return found or (Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS),)


def in_namespace(namespace: str) -> Requirement:
    """Return the requirement that a pod is in a namespace."""
    return Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=(namespace,))


def any_namespace() -> Requirement:
    """Return the requirement that it is a pod at all."""
    return Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS)


def mentions_namespace(selector: Selector) -> bool:
    """Whether a selector says for itself which namespaces it means."""
    return any(
        (key := one.key.partition(":")[2]) == NAMESPACE or key.startswith(f"{NAMESPACE_LABELS}.")
        for one in selector.requirements
    )


def mentions_reserved(selector: Selector) -> bool:
    """Whether a selector is about what is no pod."""
    return any(one.key.startswith("reserved:") for one in selector.requirements)


def _requirements(at: At, key_of: object) -> tuple[Requirement, ...]:
    at.mapping({"matchLabels", "matchExpressions"})
    assert callable(key_of)
    found = []
    labels = at.child("matchLabels")
    for name, value in sorted(labels.pairs().items()):
        _check_key(labels, name)
        found.append(Requirement(key=key_of(name), operator=Operator.IN, values=(value,)))
    for one in at.child("matchExpressions").items():
        one.mapping({"key", "operator", "values"})
        name = one.child("key").text()
        _check_key(one.child("key"), name)
        operator = _OPERATORS.get(one.child("operator").text())
        if operator is None:
            one.child("operator").fail(f"{one.value['operator']!r} is none of {', '.join(_OPERATORS)}")
        values = tuple(value.text() for value in one.child("values").items())
        if operator in (Operator.IN, Operator.NOT_IN) and not values:
            one.child("values").fail(f"must not be empty with operator {operator}")
        if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST) and values:
            one.child("values").fail(f"must be empty with operator {operator}")
        found.append(Requirement(key=key_of(name), operator=operator, values=tuple(sorted(values))))
    return tuple(found)


def _check_key(at: At, name: str) -> None:
    bare = cilium_key(name).partition(":")[2]
    if not _KEY.fullmatch(bare):
        at.fail(f"{name!r} is not a valid label key")
