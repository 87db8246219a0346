"""Are these policies valid? What ``ciliate policy validate`` says, without a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from ciliate.policy.parse import API_VERSIONS, parse_object
from ciliate.policy.rules import PolicyError, PolicyObject

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One document. ``error`` empty: valid. ``policy`` None: not a policy, or not valid."""

    object: str
    error: str = ""
    policy: PolicyObject | None = None


def validate_documents(text: str, source: str) -> list[Report]:
    """Return a report on every document of a YAML text; what is no policy is not judged. A ``List`` is opened."""
    try:
        documents = list(yaml.load_all(text, Loader=_LOADER))
    except yaml.YAMLError as error:
        return [Report(object=source, error=" ".join(str(error).split()))]
    return [
        _report(one, where) for index, one in enumerate(documents) for one, where in _opened(one, f"{source}[{index}]")
    ]


def _opened(document: Any, where: str) -> Iterator[tuple[Any, str]]:
    if document is None:
        return
    if isinstance(document, dict) and str(document.get("kind")).endswith("List"):
        for index, item in enumerate(document.get("items") or []):
            yield from _opened(item, f"{where}.items[{index}]")
        return
    yield document, where


def _report(document: Any, where: str) -> Report:
    if not isinstance(document, dict):
        return Report(object=where, error=f"{where}: an object with kind and metadata is expected")
    if document.get("kind") not in API_VERSIONS:
        return Report(object=f"{where} ({document.get('kind')})")
    try:
        policy = parse_object(document, source=where)
    except PolicyError as error:
        return Report(object=error.object, error=str(error))
    namespace = f"{policy.namespace}/" if policy.namespace else ""
    return Report(object=f"{policy.kind} {namespace}{policy.name}", policy=policy)
