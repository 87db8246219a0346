"""CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy and CiliumCIDRGroup."""

from collections.abc import Iterator
from typing import Final

from ciliate.identity.labels import NAMESPACE, Labels
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.document import At
from ciliate.policy.image import Direction
from ciliate.policy.parse_common import Owner, Place, network
from ciliate.policy.parse_peers import peers_of
from ciliate.policy.parse_ports import ports_of
from ciliate.policy.rules import Action, CidrGroup, Rule, Subject
from ciliate.policy.selecting import cilium_selector, in_namespace, names_namespace

_SECTIONS: Final = {
    "ingress": (Direction.INGRESS, False),
    "ingressDeny": (Direction.INGRESS, True),
    "egress": (Direction.EGRESS, False),
    "egressDeny": (Direction.EGRESS, True),
}
_DIRECTIONS: Final = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}


def cilium_policy(root: At, owner: Owner) -> tuple[tuple[Subject, ...], Labels]:
    """Return the specs of a policy of cilium.io, and its own labels."""
    specs = [] if root.child("spec").absent else [root.child("spec")]
    specs += root.child("specs").items()
    if not specs:
        root.child("specs").warn("is empty: the policy says nothing")
    counts = dict.fromkeys(_SECTIONS, 0)
    subjects = tuple(_spec(spec, owner, counts) for spec in specs)
    return subjects, frozenset(label for spec in specs for label in _labels(spec.child("labels")))


def cidr_group(root: At, name: str) -> CidrGroup:
    """Return a CiliumCIDRGroup; selectors see its labels with the source ``cidrgroup``."""
    metadata = root.child("metadata").child("labels")
    if not isinstance(metadata.value or {}, dict):
        metadata.fail("a mapping is expected")
    found = set()
    for key, value in (metadata.value or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            metadata.fail("strings are expected; put quotes around numbers")
        found.add(f"cidrgroup:{key}={value}")
    listed = root.child("spec").child("externalCIDRs")
    return CidrGroup(
        name=name, labels=frozenset(found), networks=tuple(network(one, plain=True) for one in listed.items())
    )


def _spec(at: At, owner: Owner, counts: dict[str, int]) -> Subject:
    """``counts``: rules of each section so far, so that a rule's index is unique in the object."""
    nodes = not at.child("nodeSelector").absent
    if nodes and owner.namespace:
        at.child("nodeSelector").fail("only a CiliumClusterwideNetworkPolicy can be for nodes")
    selector = cilium_selector(at.child("nodeSelector" if nodes else "endpointSelector"))
    init = any(one.key == "reserved:init" for one in selector.requirements)
    if owner.namespace:
        selector = _own_namespace(at.child("endpointSelector"), selector, owner.namespace)
    present = frozenset(direction for name, (direction, _) in _SECTIONS.items() if at.child(name).value)
    if not present:
        names = ", ".join(_SECTIONS)
        at.fail(f"must have at least one of {names} with a rule in it; the rule {{}} allows nothing")
    rules: list[Rule] = []
    for section, (direction, deny) in _SECTIONS.items():
        place = Place(owner=owner, direction=direction, deny=deny, nodes=nodes)
        for item in at.child(section).items():
            rules += _rule(item, place, (section, counts[section]), init=init)
            counts[section] += 1
    return Subject(
        selector=selector,
        rules=tuple(rules),
        default_deny=_default_deny(at.child("enableDefaultDeny"), present),
        nodes=nodes,
        log=_log(at.child("log")),
    )


def _own_namespace(at: At, selector: Selector, namespace: str) -> Selector:
    """Add the policy's own namespace; as under Cilium, ``matchLabels`` cannot name another."""
    own = f"k8s:{NAMESPACE}"
    given = (at.value.get("matchLabels") or {}).get(own)
    kept: list[Requirement] = []
    for one in selector.requirements:
        replaced = one.key == own and one.operator is Operator.IN and one.values == (given,)
        if names_namespace(one) and one.operator is Operator.IN and namespace not in one.values:
            effect = "that does not count" if replaced else "it selects nothing"
            at.warn(
                f"a policy of namespace {namespace} is about its own pods, not of {', '.join(one.values)}: {effect}"
            )
        if not replaced:
            kept.append(one)
    return Selector(requirements=(*kept, in_namespace(namespace)))


def _default_deny(at: At, present: frozenset[Direction]) -> frozenset[Direction]:
    wanted = set(present)
    for one in () if at.absent else at.fields():
        if one.name not in _DIRECTIONS:
            continue
        direction = _DIRECTIONS[one.name]
        if one.value is False:
            wanted.discard(direction)
        elif direction not in present:
            one.warn(f"does nothing without rules: {one.name}: [{{}}] denies by default")
    return frozenset(wanted)


def _log(at: At) -> str:
    text = "" if at.absent else at.text("value")
    if not text.isprintable():
        at.child("value").fail("only printable characters are allowed")
    return text


def _labels(at: At) -> Iterator[str]:
    for one in at.items():
        value = one.text("value")
        yield f"{one.text('source') or 'unspec'}:{one.text('key')}" + (f"={value}" if value else "")


def _rule(at: At, place: Place, where: tuple[str, int], *, init: bool) -> list[Rule]:
    if not place.deny:
        _check_authentication(at.child("authentication"))
    peers, ports = peers_of(at, place, init=init), ports_of(at, place)
    if peers is None and ports is None:
        return []  # a rule that names nobody and nothing allows nothing; its section still imposes default deny
    action = Action.DENY if place.deny else Action.ALLOW
    return [Rule(ref=place.owner.ref(*where), direction=place.direction, action=action, peers=peers, ports=ports)]


def _check_authentication(at: At) -> None:
    """Traffic that must be authenticated, but is not, must not be let through: such a policy is refused."""
    if not at.absent and at.text("mode") != "disabled":
        at.child("mode").fail(
            f"{at.text('mode')} is refused, because no connection is authenticated here and the rule would let through "
            "what it must not; only disabled is accepted"
        )
