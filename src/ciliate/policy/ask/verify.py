"""Properties of policies, decided over every end and port that policies can tell apart; where one fails, an example."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Final

from ciliate.identity.labels import NAMESPACE
from ciliate.identity.numbers import Reserved
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.ask.evaluate import Side, Verdict, final_of, side_of
from ciliate.policy.ask.flows import NAMES, parse_point, rule_document, rule_text, verdict_of
from ciliate.policy.ask.space import OTHER_PROTOCOL, Member, Piece, Space, Views, build_space
from ciliate.policy.ask.world import AskError, World
from ciliate.policy.image import Direction, Row, RowVerdict, RuleSet
from ciliate.policy.l7 import HttpRule, L7Protocol
from ciliate.policy.rules import PROTOCOLS, PolicyObject

_HOST: Final = int(Reserved.HOST)
HOST_ASSUMPTION: Final = "a pod's own node may always reach it and is not counted"
Meaning = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``exact``: over all pods that could be, else over those that exist. ``rows``: what there is to list."""

    question: str
    holds: bool
    exact: bool
    assumptions: tuple[str, ...] = ()
    counterexample: dict[str, Any] | None = None
    rows: tuple[dict[str, Any], ...] = field(default=())

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "question": self.question,
            "holds": self.holds,
            "exact": self.exact,
            "over": "every pod that could be" if self.exact else "the pods of the manifests",
            "assumptions": list(self.assumptions),
            "counterexample": self.counterexample,
            "rows": list(self.rows),
        }


# ---- who can reach ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """One of ``--only``: whom a question allows."""

    text: str
    matches: Callable[[Member], bool]
    selector: Selector | None = None


def parse_allowed(world: World, text: str) -> Allowed:
    """Return whom namespace/pod, namespace:NAME, KEY=VALUE,..., a CIDR or reserved:X means. Error: AskError."""
    if text.startswith("namespace:"):
        selector = _in_namespace(text.removeprefix("namespace:"))
        return Allowed(text=text, selector=selector, matches=lambda one: selector.matches(one.labels))
    if "=" in text:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(key and equals for key, equals, _ in pairs):
            raise AskError(f"{text!r}: labels are written KEY=VALUE,KEY=VALUE")
        wanted = Selector(
            requirements=tuple(Requirement(key=f"k8s:{k}", operator=Operator.IN, values=(v,)) for k, _, v in pairs)
        )
        return Allowed(text=text, selector=wanted, matches=lambda one: wanted.matches(one.labels))
    end = world.end(text)
    if end.pod is not None:
        name = end.pod.text
        return Allowed(text=text, matches=lambda one: name in one.pods)
    network = end.network
    if network is not None:
        return Allowed(
            text=text,
            matches=lambda one: bool(one.address) and ip_address(one.address) in ip_network(network),
        )
    return Allowed(text=text, matches=lambda one: not one.address and end.labels <= one.labels)


def parse_target(text: str) -> tuple[str, tuple[int, int] | None]:
    """Return (pod, (protocol, port)) of ``shop/db``, ``shop/db:5432`` or ``shop/db:53/UDP``. Error: AskError."""
    pod, colon, port = text.partition(":")
    return pod, parse_point(port) if colon else None


def reach(
    world: World, target: str, only: Sequence[str] = (), *, existing: bool = False, host: bool = False
) -> Finding:
    """Return who can reach a pod; with ``only``: whether nobody else can. Error: AskError."""
    name, point = parse_target(target)
    end = world.end(name)
    if end.pod is None:
        raise AskError(f"{name}: policies are enforced at pods only")
    allowed = [parse_allowed(world, one) for one in only]
    space = build_space(world, world.objects, [one.selector for one in allowed if one.selector], existing=existing)
    views = Views(space, world.objects)
    there = Member(
        identity=end.identity,
        labels=end.labels,
        named_ports=end.pod.named_ports,
        pods=(end.pod.text,),
        local=True,
    )
    asked = _asked(space, point)
    rows, counterexample = [], None
    for member in space.members:
        if (member.identity == _HOST and not host) or member.pods == (end.pod.text,):
            continue
        found = views.passes(member, there) & asked
        if not found:
            continue
        rows.append(_reached(views, member, there, found, point))
        if allowed and counterexample is None and (stranger := _stranger(member, allowed, end.pod.text)) is not None:
            counterexample = _example(views, stranger, there, found, point)
    question = f"who can reach {target}" if not only else f"only {', '.join(only)} can reach {target}"
    return Finding(
        question=question,
        holds=counterexample is None,
        exact=space.exact,
        assumptions=(*space.assumptions, *(() if host else (HOST_ASSUMPTION,))),
        counterexample=counterexample,
        rows=tuple(_merged(rows)),
    )


def _stranger(member: Member, allowed: Sequence[Allowed], itself: str) -> Member | None:
    """Return a member of the class that nobody allows, None: there is none."""
    if not member.pods:
        return None if any(one.matches(member) for one in allowed) else member
    for pod in member.pods:
        alone = Member(
            identity=member.identity,
            labels=member.labels,
            named_ports=member.named_ports,
            pods=(pod,),
            local=member.local,
        )
        if pod != itself and not any(one.matches(alone) for one in allowed):
            return alone
    return None


def _asked(space: Space, point: tuple[int, int] | None) -> int:
    if point is None:
        return (1 << len(space.pieces)) - 1
    protocol, port = point
    return sum(
        1 << index
        for index, one in enumerate(space.pieces)
        if (one.protocol == protocol or (one.protocol == OTHER_PROTOCOL and protocol not in NAMES))
        and (one.low <= port <= one.high or one.protocol == OTHER_PROTOCOL)
    )


def _reached(views: Views, member: Member, there: Member, found: int, point: tuple[int, int] | None) -> dict[str, Any]:
    pieces = [(index, one) for index, one in enumerate(views.space.pieces) if found >> index & 1]
    rules: dict[str, None] = {}
    l7 = False
    for source, direction, peer in ((there, Direction.INGRESS, member), (member, Direction.EGRESS, there)):
        image = views.image(source, direction) if source.local else None
        rows = views.rows(image, peer) if image is not None else ()
        for index, _ in pieces:
            row = rows[index] if rows else None
            if row is not None:
                rules |= dict.fromkeys(map(rule_text, row.rules))
                l7 |= row.verdict is RowVerdict.REDIRECT
    return {
        "from": member.title,
        "pods": list(member.pods),
        "exists": bool(member.pods or member.address or not member.namespace),
        "ports": [point_text(point)] if point else ports_text([one for _, one in pieces], views.space.pieces),
        "l7": l7,
        "rules": list(rules) or ["no policy selects it"],
    }


def point_text(point: tuple[int, int]) -> str:
    """Return ``TCP/80``."""
    return f"{NAMES.get(point[0], str(point[0]))}/{point[1]}"


def ports_text(pieces: Sequence[Piece], everything: Sequence[Piece]) -> list[str]:
    """Return ports as people write them: ``TCP/80``, ``UDP/1000-2000``, ``SCTP``, ``all``."""
    if len(pieces) == len(everything):
        return ["all"]
    if len(pieces) * 2 > len(everything):
        return ["all but " + ", ".join(ports_text([one for one in everything if one not in pieces], everything))]
    texts = []
    for protocol in dict.fromkeys(one.protocol for one in pieces):
        mine = [one for one in pieces if one.protocol == protocol]
        name = "other protocols" if protocol == OTHER_PROTOCOL else NAMES.get(protocol, str(protocol))
        if len(mine) == sum(one.protocol == protocol for one in everything):
            texts.append(name)
            continue
        ranges: list[tuple[int, int]] = []
        for one in mine:
            if ranges and ranges[-1][1] + 1 == one.low:
                ranges[-1] = (ranges[-1][0], one.high)
            else:
                ranges.append((one.low, one.high))
        texts += [f"{name}/{low}" if low == high else f"{name}/{low}-{high}" for low, high in ranges]
    return texts


def _merged(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pods that could be, and may do the same by the same rules, are one row: the one with the fewest labels first."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda one: (not one["exists"], one["from"].count("="), one["from"])):
        key = (tuple(row["ports"]), tuple(row["rules"])) if not row["exists"] else (row["from"],)
        if key in found:
            found[key]["others"] = found[key].get("others", 0) + 1
        else:
            found[key] = row
    yield from found.values()


# ---- isolation ----------------------------------------------------------------------------------------------


def isolation(world: World, namespace: str, *, existing: bool = False, host: bool = False) -> Finding:
    """Return whether nothing outside a namespace can reach a pod in it. Error: AskError."""
    known = world.namespaces.keys() | {pod.namespace for pod in world.pods.values()}
    if namespace not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise AskError(f"namespace {namespace}: the manifests have none of that name; they have {listed}")
    inside = _in_namespace(namespace)
    space = build_space(world, world.objects, [inside], existing=existing)
    views = Views(space, world.objects)
    targets = [one for one in space.members if one.local and one.namespace == namespace]
    others = [
        one
        for one in space.members
        if not (one.local and one.namespace == namespace) and (host or one.identity != _HOST)
    ]
    # what exists is the better example, and what is no pod is not subject to a policy of its own
    targets.sort(key=lambda one: not one.pods)
    others.sort(key=lambda one: (not one.pods, bool(one.namespace)))
    counterexample = None
    for other, target in _pairs(views, others, targets):
        if found := views.passes(other, target):
            counterexample = _example(views, other, target, found)
            break
    return Finding(
        question=f"nothing outside namespace {namespace} can reach a pod in it",
        holds=counterexample is None,
        exact=space.exact,
        assumptions=(*space.assumptions, *(() if host else (HOST_ASSUMPTION,))),
        counterexample=counterexample,
    )


def _pairs(views: Views, sources: Sequence[Member], targets: Sequence[Member]) -> Iterator[tuple[Member, Member]]:
    """Yield the pairs whose ingress lets something pass; targets with the same policy are asked once."""
    alike: dict[int, list[Member]] = {}
    for one in targets:
        alike.setdefault(id(views.image(one, Direction.INGRESS)), []).append(one)
    for members in alike.values():
        for source in sources:
            if views.open(members[0], Direction.INGRESS, source):
                yield from ((source, target) for target in members)


def _in_namespace(name: str) -> Selector:
    return Selector(requirements=(Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=(name,)),))


# ---- equivalence --------------------------------------------------------------------------------------------


def equivalent(
    world: World, first: Sequence[PolicyObject], second: Sequence[PolicyObject], *, existing: bool = False
) -> Finding:
    """Return whether two sets of policies let the same traffic pass. ``world``: with the networks of both."""
    space = build_space(world, [*first, *second], [], existing=existing)
    views = Views(space, first), Views(space, second)
    counterexample = next(_differences(space, views), None)
    return Finding(
        question="both sets of policies let the same traffic pass",
        holds=counterexample is None,
        exact=space.exact,
        assumptions=(*space.assumptions, "L7 rules are the same if they are written the same"),
        counterexample=counterexample,
    )


def _differences(space: Space, views: tuple[Views, Views]) -> Iterator[dict[str, Any]]:
    local = sorted((one for one in space.members if one.local), key=lambda one: not one.pods)
    peers = sorted(space.members, key=lambda one: (not one.pods, bool(one.namespace)))
    for direction in (Direction.INGRESS, Direction.EGRESS):
        alike: dict[tuple[int, int], list[Member]] = {}
        for one in local:
            first, second = (view.image(one, direction) for view in views)
            alike.setdefault((id(first), id(second)), []).append(one)
        for members in alike.values():
            if views[0].image(members[0], direction) == views[1].image(members[0], direction):
                continue
            known: dict[tuple[object, ...], tuple[int, ...]] = {}
            for peer in peers:
                different = _differing(views, members[0], peer, direction, known)
                for member, index in ((one, index) for one in members for index in different):
                    source, destination = (member, peer) if direction is Direction.EGRESS else (peer, member)
                    before, after = (_sides(one, source, destination, index) for one in views)
                    if _outcome(*before) != _outcome(*after):
                        piece = space.pieces[index]
                        yield {
                            **_flow(source, destination, piece, None),
                            "first": _side_document(*before),
                            "second": _side_document(*after),
                        }


def _differing(
    views: tuple[Views, Views],
    member: Member,
    peer: Member,
    direction: Direction,
    known: dict[tuple[object, ...], tuple[int, ...]],
) -> tuple[int, ...]:
    """Return the pieces where one end's answer is not the same in both sets."""
    images = [one.image(member, direction) for one in views]
    keys = [None if image is None else one.key(image, peer) for one, image in zip(views, images, strict=True)]
    key = (*keys, peer.identity == _HOST)
    if key not in known:
        rows = [None if image is None else one.rows(image, peer) for one, image in zip(views, images, strict=True)]
        known[key] = tuple(
            index
            for index in range(len(views[0].space.pieces))
            if _meaning(images[0] is None, rows[0], index) != _meaning(images[1] is None, rows[1], index)
        )
    return known[key]


def _meaning(everything: bool, rows: tuple[Row | None, ...] | None, index: int) -> Meaning:
    if everything or rows is None:
        return ("allowed",)
    row = rows[index]
    if row is None or row.verdict is RowVerdict.DENY:
        return ("denied",)
    return _of_ruleset(row.ruleset)


def _of_ruleset(ruleset: RuleSet | None) -> Meaning:
    """What of L7 matters: not who asked for it, nor under which name."""
    if ruleset is None:
        return ("allowed",)
    extras = (ruleset.server_names, ruleset.terminating, ruleset.originating, ruleset.listener)
    rules = frozenset(repr(rule) for rule, _ in ruleset.rules)
    anything = ruleset.allow_all or (ruleset.protocol is L7Protocol.HTTP and repr(HttpRule()) in rules)
    if anything and not any(extras):
        return ("allowed",)
    return (ruleset.protocol, frozenset() if anything else rules, anything, extras)


def _sides(views: Views, source: Member, destination: Member, index: int) -> tuple[Side | None, Side | None]:
    found: list[Side | None] = []
    for member, direction, peer in (
        (source, Direction.EGRESS, destination),
        (destination, Direction.INGRESS, source),
    ):
        if not member.local:
            found.append(None)
            continue
        image = views.image(member, direction)
        row = views.rows(image, peer)[index] if image is not None else None
        found.append(side_of(image, row))
    return found[0], found[1]


def _outcome(egress: Side | None, ingress: Side | None) -> Meaning:
    """What a client sees."""
    if final_of(egress, ingress) is Verdict.DENIED:
        return ("denied",)
    meanings = {_of_ruleset(side.ruleset) for side in (egress, ingress) if side is not None}
    return ("allowed", frozenset(meanings - {("allowed",)}))


# ---- examples -----------------------------------------------------------------------------------------------


def _example(
    views: Views, source: Member, destination: Member, found: int, point: tuple[int, int] | None = None
) -> dict[str, Any]:
    index = (found & -found).bit_length() - 1
    egress, ingress = _sides(views, source, destination, index)
    return {
        **_flow(source, destination, views.space.pieces[index], point),
        **_side_document(egress, ingress),
    }


def _flow(source: Member, destination: Member, piece: Piece, point: tuple[int, int] | None) -> dict[str, Any]:
    protocol, port = point or (piece.protocol, _port_in(piece))
    return {
        "src": source.text,
        "src_labels": sorted(source.labels),
        "src_exists": bool(source.pods or not source.namespace),
        "dst": destination.text,
        "dst_labels": sorted(destination.labels),
        "dst_exists": bool(destination.pods or not destination.namespace),
        "protocol": NAMES.get(protocol, str(protocol)),
        "port": port,
    }


def _port_in(piece: Piece) -> int:
    """A port or type that people know, if the piece has one."""
    known = {PROTOCOLS["ICMP"]: 8, PROTOCOLS["ICMPV6"]: 128}.get(piece.protocol, 80)
    return known if piece.low <= known <= piece.high else max(piece.low, min(1, piece.high))


def _side_document(egress: Side | None, ingress: Side | None) -> dict[str, Any]:
    def rules(side: Side | None) -> list[dict[str, Any]]:
        return [rule_document(one) for one in side.rules] if side else []

    return {
        "egress": verdict_of(egress),
        "ingress": verdict_of(ingress),
        "final": final_of(egress, ingress).value,
        "rules": {"egress": rules(egress), "ingress": rules(ingress)},
    }
