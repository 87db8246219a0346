"""The peers of a rule of cilium.io."""

from collections.abc import Callable, Mapping
from typing import Final

from ciliate.identity.selectors import Operator, Selector
from ciliate.policy.document import At
from ciliate.policy.image import Direction
from ciliate.policy.parse_common import Place, excepts, network
from ciliate.policy.parse_l7 import dns_name, dns_pattern
from ciliate.policy.rules import (
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    ServicePeer,
)
from ciliate.policy.selecting import (
    any_namespace,
    cilium_selector,
    in_namespace,
    mentions_reserved,
    names_namespace,
    names_namespace_labels,
    plain_selector,
)

_NEGATIVE: Final = (Operator.NOT_IN, Operator.DOES_NOT_EXIST)
_IGNORED_BY_CILIUM: Final = ("toFQDNs", "toServices")


def peers_of(at: At, place: Place, *, init: bool) -> tuple[Peer, ...] | None:
    """Return a rule's peers: None for everybody, nothing for nobody. Only one kind of peer can be named in a rule.

    ``init``: the policy selects pods whose labels are not known yet.
    """
    prefix = "from" if place.direction is Direction.INGRESS else "to"
    given = [at.child(prefix + kind) for kind in _PARSERS if at.value.get(prefix + kind) is not None]
    named = [one for one in given if one.value]
    if len(named) > 1:
        names = " and ".join(one.name for one in named)
        at.fail(f"{names} cannot be combined in one rule: write one rule for each")
    if not given:
        return None
    for one in given:
        if not one.value and named:
            one.warn(f"is empty: the rule is about nobody, and {named[0].name} does not count")
        elif not one.value and one.name in _IGNORED_BY_CILIUM:
            one.warn("is empty: the rule is about nobody (Cilium takes it as everybody)")
    if len(named) < len(given):
        return ()
    (one,) = named
    parse = _PARSERS[one.name.removeprefix(prefix)]
    return tuple(peer for item in one.items() for peer in parse(item, place, init))


def _endpoint(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    selector, namespace = cilium_selector(at), place.owner.namespace
    if mentions_reserved(selector):
        return (LabelPeer(selector=selector),)
    about = [one for one in selector.requirements if names_namespace(one)]
    if not about and not namespace:
        extra = () if init else (any_namespace(),)
        return (LabelPeer(selector=Selector(requirements=(*selector.requirements, *extra))),)
    labels = [one for one in selector.requirements if names_namespace_labels(one)]
    if not about and not labels:
        return (LabelPeer(selector=Selector(requirements=(*selector.requirements, in_namespace(namespace)))),)
    if all(one.operator in _NEGATIVE for one in (*about, *labels)):
        at.warn("only says which namespaces are not meant: what is in none (the world, nodes) is meant as well")
    return (LabelPeer(selector=selector),)


def _cidr(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del place, init
    return (CidrPeer(network=network(at, plain=True)),)


def _cidr_rule(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del place, init
    if not at.child("cidr").absent:
        outer = network(at.child("cidr"))
        return (CidrPeer(network=outer, excepts=excepts(at.child("except"), outer)),)
    without = tuple(network(one) for one in at.child("except").items())
    selector = at.child("cidrGroupSelector")
    if selector.absent:
        return (CidrGroupPeer(name=at.text("cidrGroupRef"), excepts=without),)
    return (CidrGroupPeer(selector=plain_selector(selector, "cidrgroup"), excepts=without),)


def _entity(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del place, init
    return (EntityPeer(name=at.value),)


def _node(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del place, init
    return (NodePeer(selector=cilium_selector(at)),)


def _service(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del init
    service, chosen = at.child("k8sService"), at.child("k8sServiceSelector")
    if service.absent and chosen.absent:
        at.warn("names no Service: it is about nobody")
        return ()
    if not service.absent and not chosen.absent:
        at.fail("k8sService and k8sServiceSelector cannot be combined: write two entries")
    if service.absent:
        return (ServicePeer(namespace=chosen.text("namespace"), selector=cilium_selector(chosen.child("selector"))),)
    namespace = service.text("namespace") or place.owner.namespace
    if not namespace:
        service.child("namespace").fail(f"must be set in a {place.owner.kind}")
    return (ServicePeer(namespace=namespace, name=service.text("serviceName")),)


def _fqdn(at: At, place: Place, init: bool) -> tuple[Peer, ...]:
    del place, init
    if at.child("matchName").absent:
        return (FqdnPeer(pattern=dns_pattern(at.text("matchPattern"))),)
    return (FqdnPeer(name=dns_name(at.text("matchName"))),)


_PARSERS: Final[Mapping[str, Callable[[At, Place, bool], tuple[Peer, ...]]]] = {
    "Endpoints": _endpoint,
    "CIDR": _cidr,
    "CIDRSet": _cidr_rule,
    "Entities": _entity,
    "Nodes": _node,
    "Services": _service,
    "FQDNs": _fqdn,
}
