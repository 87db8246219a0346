"""Label selectors of policies, for both kinds of syntax."""

import re
from collections.abc import Callable, Mapping
from typing import Final

from ciliate.identity.labels import NAMESPACE, NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.document import At, shown
from ciliate.policy.schema.common import DNS_SUBDOMAIN

SOURCES: Final = (
    "any", "k8s", "reserved", "cidr", "cidrgroup", "fqdn", "node", "cni", "unspec", "container", "directory",
    "generated",
)  # fmt: skip
"""Where labels come from; a requirement on another source is never met."""
_SOURCE: Final = re.compile(r"[A-Za-z0-9]+")
_PREFIX: Final = re.compile(DNS_SUBDOMAIN)
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_LONGEST_PREFIX: Final = 253
_LONGEST_NAME: Final = 63
_OPERATORS: Final[Mapping[str, Operator]] = {one.value: one for one in Operator}
_NEGATIVE: Final = (Operator.NOT_IN, Operator.DOES_NOT_EXIST)


def cilium_key(text: str, default: str = "any") -> str:
    """Return ``source:key``; a source stands before a colon, without one ``default`` is meant."""
    return text if ":" in text else f"{default}:{text}"


def cilium_selector(at: At, default: str = "any") -> Selector:
    """Return the selector of an ``endpointSelector`` or of one of ``fromEndpoints``."""
    return Selector(requirements=_requirements(at, lambda key: cilium_key(key, default)))


def plain_selector(at: At, source: str) -> Selector:
    """Return a selector whose keys have no source: all are of ``source``."""
    return Selector(requirements=_requirements(at, lambda key: f"{source}:{key}"))


def pod_selector(at: At) -> tuple[Requirement, ...]:
    """Return a NetworkPolicy's ``podSelector``."""
    return plain_selector(at, "k8s").requirements


def namespace_selector(at: At) -> tuple[Requirement, ...]:
    """Return a NetworkPolicy's ``namespaceSelector``: about the labels of the pod's namespace.

    A negative requirement is also met by what has no namespace at all, so that must be asked for.
    """
    found = _requirements(at, lambda key: f"k8s:{NAMESPACE_LABELS}.{key}")
    if not found or any(one.operator in _NEGATIVE for one in found):
        found = (*found, any_namespace())
    return found


def in_namespace(namespace: str) -> Requirement:
    """Return the requirement that a pod is in a namespace."""
    return Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=(namespace,))


def any_namespace() -> Requirement:
    """Return the requirement that it is a pod at all."""
    return Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS)


def names_namespace(one: Requirement) -> bool:
    """Whether a requirement is about the name of the namespace."""
    return one.key in (f"k8s:{NAMESPACE}", f"any:{NAMESPACE}")


def names_namespace_labels(one: Requirement) -> bool:
    """Whether a requirement is about labels of the namespace."""
    return one.key.startswith((f"k8s:{NAMESPACE_LABELS}", f"any:{NAMESPACE_LABELS}"))


def mentions_reserved(selector: Selector) -> bool:
    """Whether a selector is about what is no pod."""
    return any(one.key.startswith("reserved:") for one in selector.requirements)


def _requirements(at: At, key_of: Callable[[str], str]) -> tuple[Requirement, ...]:
    found = []
    labels = at.child("matchLabels")
    for name, value in sorted((labels.value or {}).items()):
        found.append(Requirement(key=_checked(labels, key_of(name)), operator=Operator.IN, values=(value,)))
    for one in at.child("matchExpressions").items():
        key = _checked(one.child("key"), key_of(one.text("key")))
        operator = _OPERATORS[one.text("operator")]
        values = tuple(value.value for value in one.child("values").items())
        if operator in (Operator.IN, Operator.NOT_IN) and not values:
            one.child("values").fail(f"must not be empty with operator {operator}")
        if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST) and values:
            one.child("values").fail(f"must be empty with operator {operator}")
        found.append(Requirement(key=key, operator=operator, values=tuple(sorted(set(values)))))
    return tuple(found)


def _checked(at: At, key: str) -> str:
    """Return ``source:key`` if that can be the key of a label."""
    source, _, rest = key.partition(":")
    if not _SOURCE.fullmatch(source):
        at.fail(f"{shown(key)} is not a valid label key: {shown(source)} is no source of labels")
    if source not in SOURCES:
        at.warn(f"no label has the source {shown(source)} (sources: {', '.join(SOURCES)})")
    if not _valid(rest):
        at.fail(f"{shown(rest)} is not a valid label key")
    return key


def _valid(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > _LONGEST_PREFIX or not _PREFIX.fullmatch(prefix)):
        return False
    longest = _LONGEST_PREFIX if key.startswith(NAMESPACE_LABELS) else _LONGEST_NAME
    return len(name) <= longest and bool(_NAME.fullmatch(name))
