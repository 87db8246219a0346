"""What the Kubernetes objects say, typed; and what is in force for those that are not valid."""

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from ciliate.daemon.lastvalid import LastValid
from ciliate.k8s.manifests import ObjectKey
from ciliate.k8s.objects import Namespace, ObjectError, Pod, parse_namespace, parse_pod
from ciliate.policy.fallback import closed
from ciliate.policy.parse import API_VERSIONS, parse_object
from ciliate.policy.rules import PolicyError, PolicyObject

log = structlog.get_logger()
Key = tuple[str, str, str]
POLICY_KINDS: Final = frozenset(API_VERSIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An object that is not valid. ``instead``: what is in force for it."""

    problem: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.problem} ({self.instead} stays in force)" if self.instead else self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An object as it was read. ``value`` None: the former one stays."""

    name: Key
    value: Pod | Namespace | PolicyObject | None
    digest: str = ""
    rejected: Rejected | None = None


LAST_VALID = "its last valid form"
CLOSED = "default deny for what it selects"


class ClusterObjects:
    """Typed objects of the cluster by name. An object that turns invalid keeps its last valid form."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where last valid policies are kept. Error: OSError."""
        self.pods: dict[tuple[str, str], Pod] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.policies: dict[Key, PolicyObject] = {}
        """What is to be enforced, for every policy object that there is."""
        self.rejected: dict[Key, Rejected] = {}
        self.digests: dict[Key, str] = {}
        """Of each policy's document as it is written, valid or not: nodes that name the same one agree."""
        self.lingering: set[Key] = set()
        """Policies that only the last valid forms name, since some input cannot be read."""
        self._last_valid = LastValid(folder)
        self._settled = False

    def read(self, key: ObjectKey, document: Mapping[str, Any]) -> Read | None:
        """Return an object's new form, for ``learn``; None: nobody needs it. Changes nothing but files; any thread.

        Error: OSError.
        """
        name: Key = (key.kind, key.namespace, key.name)
        try:
            match key.kind:
                case "Pod":
                    return Read(name=name, value=parse_pod(document))
                case "Namespace":
                    return Read(name=name, value=parse_namespace(document))
                case kind if kind in API_VERSIONS:
                    policy = parse_object(document)
                    self._last_valid.keep(name, document)
                    return Read(name=name, value=policy, digest=_digest(document))
                case _:
                    return None
        except ObjectError as error:
            return Read(name=name, value=None, rejected=Rejected(problem=str(error)))
        except PolicyError as error:
            value, instead = self._instead(name, document)
            rejected = Rejected(problem=str(error), instead=instead)
            return Read(name=name, value=value, digest=_digest(document), rejected=rejected)

    def _instead(self, name: Key, document: Mapping[str, Any]) -> tuple[PolicyObject | None, str]:
        """What is in force for an invalid policy."""
        before = self._last_valid.get(name)
        if before is not None:
            try:
                return parse_object(before), LAST_VALID
            except PolicyError as error:  # a newer agent may be stricter than the one that kept it
                log.error("last-valid-invalid", policy=name, problem=str(error))
        try:
            return closed(document), CLOSED
        except PolicyError:
            return None, ""

    def learn(self, one: Read) -> None:
        """Take an object's new form."""
        kind, namespace, name = one.name
        match one.value:
            case Pod():
                self.pods[namespace, name] = one.value
            case Namespace():
                self.namespaces[name] = one.value
            case PolicyObject():
                self.policies[one.name] = one.value
            case None:
                pass
        if one.digest:
            self.digests[one.name] = one.digest
        if one.rejected is None:
            self.rejected.pop(one.name, None)
            return
        self.rejected[one.name] = one.rejected
        log.warning("object-rejected", kind=kind, namespace=namespace, name=name, problem=str(one.rejected))

    def forget(self, key: ObjectKey) -> None:
        """Drop a deleted object. Error: OSError."""
        name: Key = (key.kind, key.namespace, key.name)
        self.rejected.pop(name, None)
        match key.kind:
            case "Pod":
                self.pods.pop((key.namespace, key.name), None)
            case "Namespace":
                self.namespaces.pop(key.name, None)
            case kind if kind in API_VERSIONS:
                self.policies.pop(name, None)
                self.digests.pop(name, None)
                self._last_valid.forget(name)

    def settle(self, present: Set[ObjectKey], *, unreadable: bool) -> None:
        """All objects that there are have been learned. Error: OSError.

        ``unreadable``: some input cannot be read at all. Then policies that were in force before a restart and that
        nothing names now may be in there: they stay. Else they were deleted while no agent ran.
        """
        named = {(one.kind, one.namespace, one.name) for one in present}
        if not unreadable:
            for key in self.lingering - named:
                self.policies.pop(key, None)
                self.rejected.pop(key, None)
            self.lingering = set()
            if not self._settled:
                self._last_valid.prune(named)
        elif not self._settled:
            for document in self._last_valid.others(named):
                self._linger(document)
        self._settled = True
        self.lingering -= named

    def _linger(self, document: Mapping[str, Any]) -> None:
        try:
            policy = parse_object(document)
        except PolicyError as error:
            log.error("last-valid-invalid", problem=str(error))
            return
        self.policies[policy.key] = policy
        self.lingering.add(policy.key)
        self.rejected[policy.key] = Rejected(problem="its file cannot be read", instead=LAST_VALID)


def _digest(document: Mapping[str, Any]) -> str:
    """What a policy says, in short: its specs, without what an API server adds."""
    said = {name: document.get(name) for name in ("kind", "spec", "specs")}
    return hashlib.sha256(msgspec.json.encode(said, order="deterministic")).hexdigest()[:16]
