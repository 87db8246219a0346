"""Policies of the tests: port 53 and echoes are allowed, TCP port 80 goes to the proxy, all else is denied."""

from typing import Final

from ciliate.identity.numbers import IdentityId, Scope
from ciliate.policy.image import ClassRows, Direction, PolicyImage, PortPrefix, Row, RowVerdict, RuleRef, RuleSet

EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
WEB: Final = RuleSet(rules=(), provenance="tests")


def _row(direction: Direction, protocol: int, port: int, verdict: RowVerdict = RowVerdict.ALLOW) -> Row:
    rule = RuleRef(kind="CiliumNetworkPolicy", namespace="t", name="p", section=direction.name.lower(), index=0)
    ruleset = WEB if verdict is RowVerdict.REDIRECT else None
    key = PortPrefix(protocol=protocol, port=port, bits=16 if protocol else 0)
    return Row(key=key, verdict=verdict, rules=(rule,), ruleset=ruleset)


def image(direction: Direction, rows: ClassRows, members: dict[int, ClassRows] | None = None) -> PolicyImage:
    """Return a policy with the same rows for every scope."""
    default = RuleRef(kind="CiliumNetworkPolicy", namespace="t", name="p", section="default", index=-1)
    return PolicyImage(
        direction=direction,
        defaults=dict.fromkeys(Scope, rows),
        unknown=dict.fromkeys(Scope, rows),
        members={IdentityId(i): r for i, r in (members or {}).items()},
        default_rules=(default,),
    )


def dns(direction: Direction) -> PolicyImage:
    """Port 53 of TCP and UDP, and echo requests; from or to everybody."""
    rows = (
        _row(direction, 1, 8),
        _row(direction, 6, 53),
        _row(direction, 17, 53),
        _row(direction, 58, 128),
    )
    return image(direction, rows)


def nothing(direction: Direction) -> PolicyImage:
    """Default deny, and nobody is allowed."""
    return image(direction, ())


def web(direction: Direction) -> PolicyImage:
    """TCP port 80 by way of the proxy."""
    return image(direction, (_row(direction, 6, 80, RowVerdict.REDIRECT),))


def plain_web(direction: Direction) -> PolicyImage:
    """TCP port 80 without a proxy."""
    return image(direction, (_row(direction, 6, 80),))


def not_identity(direction: Direction, *identities: int) -> PolicyImage:
    """Port 53 for all but these identities, which a rule denies."""
    denied = (_row(direction, 0, 0, RowVerdict.DENY),)
    return image(direction, dns(direction).defaults[Scope.WORLD], dict.fromkeys(identities, denied))
