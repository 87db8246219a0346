"""Incremental xDS without I/O: what to send to Envoy, and what its answers mean.

``XdsStore`` has the resources that Envoy should have and remembers what was accepted. ``XdsSession`` is one stream of
one Envoy: ``receive()`` takes a request, ``pending()`` gives the responses that are due. Every resource travels in a
response of its own, so that a refusal names exactly one.

    put -> desired --pending()--> sent --ACK--> acknowledged, last good
                                    \\--NACK--> the last good one is desired again, or the fallback, or none

Protocol: Envoy's "xDS REST and gRPC protocol", section "Incremental xDS".
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ciliate.proxy import _pb as pb
from ciliate.proxy.compile import CLUSTER_TYPE, LISTENER_TYPE, RULES_TYPE, XdsResource

Key = tuple[str, str]
"""Type URL and name of a resource."""

_WILDCARD: Final = frozenset({CLUSTER_TYPE, LISTENER_TYPE})
_ORDER: Final = (CLUSTER_TYPE, LISTENER_TYPE, RULES_TYPE)
_NACK_MEMORY: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Envoy's answer to a resource that it does not take."""

    version: str
    error: str


class XdsStore:
    """Resources that Envoy should have, and what is known of their acceptance."""

    def __init__(self) -> None:
        self._desired: dict[Key, XdsResource] = {}
        self._good: dict[Key, XdsResource] = {}
        self._fallback: dict[Key, XdsResource] = {}
        self._refused: dict[Key, Refusal] = {}
        self._touched: set[Key] = set()
        self.acknowledged: dict[Key, str] = {}
        """Version that the Envoy of the current session has accepted."""

    def put(self, resource: XdsResource, fallback: XdsResource | None = None) -> None:
        """Wants this resource. If Envoy refuses it and never had a good one, ``fallback`` takes its place."""
        key = (resource.type_url, resource.name)
        if self._desired.get(key) == resource:
            return
        self._desired[key] = resource
        self._refused.pop(key, None)
        self._touched.add(key)
        if fallback is not None:
            self._fallback[key] = fallback

    def remove(self, type_url: str, name: str) -> None:
        """Wants this resource no more; forgets what was known of it."""
        key = (type_url, name)
        if self._desired.pop(key, None) is not None:
            self._touched.add(key)
        self._good.pop(key, None)
        self._fallback.pop(key, None)
        self._refused.pop(key, None)

    def get(self, key: Key) -> XdsResource | None:
        """The desired resource."""
        return self._desired.get(key)

    def names(self, type_url: str) -> Iterator[str]:
        """Names of the desired resources of a type."""
        return (name for kind, name in self._desired if kind == type_url)

    def refusal(self, key: Key, version: str) -> str | None:
        """Why this version was refused, or None."""
        refused = self._refused.get(key)
        return refused.error if refused is not None and refused.version == version else None

    def settled(self, key: Key, version: str) -> bool:
        """Whether Envoy has accepted or refused this version."""
        return self.acknowledged.get(key) == version or self.refusal(key, version) is not None

    def take_touched(self) -> set[Key]:
        """What changed since the last call."""
        touched, self._touched = self._touched, set()
        return touched

    def accept(self, resource: XdsResource) -> None:
        """Envoy accepted this."""
        key = (resource.type_url, resource.name)
        self.acknowledged[key] = resource.version
        if key in self._desired:
            self._good[key] = resource

    def refuse(self, resource: XdsResource, error: str) -> None:
        """Envoy refused this: back to the last good one, the fallback, or nothing."""
        key = (resource.type_url, resource.name)
        wanted = self._desired.get(key)
        if wanted is None or wanted.version != resource.version:
            return
        self._refused[key] = Refusal(version=resource.version, error=error[:_NACK_MEMORY])
        self._touched.add(key)
        back = self._good.get(key) or self._fallback.get(key)
        if back is None or back.version == resource.version:
            del self._desired[key]
        else:
            self._desired[key] = back


class XdsSession:
    """One stream. The newest session is the one that counts: making it forgets what an earlier Envoy had accepted."""

    def __init__(self, store: XdsStore) -> None:
        self._store = store
        store.acknowledged.clear()
        self._subscribed: dict[str, set[str]] = {}
        self._sent: dict[Key, str] = {}
        self._in_flight: dict[str, tuple[XdsResource, ...]] = {}
        self._due: set[Key] = set()
        self._empty_due: list[str] = []
        self._nonce = 0

    def receive(self, request: pb.Message) -> None:
        """Takes a DeltaDiscoveryRequest: subscriptions, and the answer to a response if there is one in it."""
        type_url: str = request.type_url
        first = type_url not in self._subscribed
        names = self._subscribed.setdefault(type_url, set())
        if first:
            self._resume(type_url, dict(request.initial_resource_versions))
        for name in request.resource_names_unsubscribe:
            names.discard(name)
            self._sent.pop((type_url, name), None)
        known = request.initial_resource_versions
        for name in request.resource_names_subscribe:
            names.add(name)
            if name not in known:
                self._sent.pop((type_url, name), None)
            self._due.add((type_url, name))
        if request.response_nonce:
            self._answer(request)
        if first and type_url in _WILDCARD:
            there = {(type_url, name) for name in self._store.names(type_url)}
            there.update(key for key in self._sent if key[0] == type_url)
            self._due.update(there)
            if not there:
                self._empty_due.append(type_url)  # tells Envoy that it need not wait for more

    def touch(self, keys: Iterable[Key]) -> None:
        """These resources changed in the store."""
        self._due.update(keys)

    def pending(self) -> Sequence[pb.Message]:
        """The DeltaDiscoveryResponses that are due, in the order clusters, listeners, rules."""
        due, self._due = self._due, set()
        responses = [self._response(type_url) for type_url in self._empty_due]
        self._empty_due = []
        for key in sorted(due, key=lambda each: (_ORDER.index(each[0]) if each[0] in _ORDER else len(_ORDER), each[1])):
            response = self._for(key)
            if response is not None:
                responses.append(response)
        return responses

    def _resume(self, type_url: str, versions: dict[str, str]) -> None:
        for name, version in versions.items():
            key = (type_url, name)
            self._sent[key] = version
            wanted = self._store.get(key)
            if wanted is not None and wanted.version == version:
                self._store.accept(wanted)

    def _answer(self, request: pb.Message) -> None:
        resources = self._in_flight.pop(request.response_nonce, ())
        refused = request.HasField("error_detail")
        for resource in resources:
            key = (resource.type_url, resource.name)
            if not refused:
                self._store.accept(resource)
                continue
            self._store.refuse(resource, request.error_detail.message)
            if self._sent.get(key) == resource.version:
                accepted = self._store.acknowledged.get(key)
                if accepted is None:
                    self._sent.pop(key)
                else:
                    self._sent[key] = accepted
            self._due.add(key)

    def _for(self, key: Key) -> pb.Message | None:
        type_url, name = key
        names = self._subscribed.get(type_url)
        if names is None or (type_url not in _WILDCARD and name not in names):
            return None
        wanted = self._store.get(key)
        if wanted is None:
            # A listener that goes drains its connections, and these keep their rules: sent rules are not removed.
            if (key in self._sent) != (type_url in _WILDCARD):
                return None
            self._sent.pop(key, None)
            return self._response(type_url, removed=name)
        if self._sent.get(key) == wanted.version:
            return None
        self._sent[key] = wanted.version
        return self._response(type_url, wanted)

    def _response(self, type_url: str, resource: XdsResource | None = None, removed: str | None = None) -> pb.Message:
        self._nonce += 1
        response = pb.DeltaDiscoveryResponse(type_url=type_url, nonce=str(self._nonce))
        if resource is not None:
            response.resources.append(pb.Resource(name=resource.name, version=resource.version, resource=resource.body))
            self._in_flight[response.nonce] = (resource,)
        else:
            self._in_flight[response.nonce] = ()
        if removed is not None:
            response.removed_resources.append(removed)
            self._store.acknowledged.pop((type_url, removed), None)
        return response
