"""``toPorts`` and ``icmps`` of cilium.io, and a NetworkPolicy's ``ports``."""

from collections.abc import Iterator, Mapping
from typing import Final

from ciliate.policy.document import At, shown
from ciliate.policy.l7 import L7, L7Protocol
from ciliate.policy.parse_common import LAST_PORT, Place, is_port_name, port_range
from ciliate.policy.parse_l7 import l7
from ciliate.policy.rules import ANY_PROTOCOLS, PORTLESS, PROTOCOLS, PortSpec

TCP: Final = 6
_DNS_PROTOCOLS: Final = (6, 17)
_IPV4: Final = {
    "EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8, "RouterAdvertisement": 9,
    "RouterSelection": 10, "TimeExceeded": 11, "ParameterProblem": 12, "Timestamp": 13, "TimestampReply": 14,
    "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEchoReply": 43,
}  # fmt: skip
_IPV6: Final = {
    "DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4, "EchoRequest": 128,
    "EchoReply": 129, "MulticastListenerQuery": 130, "MulticastListenerReport": 131, "MulticastListenerDone": 132,
    "RouterSolicitation": 133, "RouterAdvertisement": 134, "NeighborSolicitation": 135, "NeighborAdvertisement": 136,
    "RedirectMessage": 137, "RouterRenumbering": 138, "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140, "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142, "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145, "MobilePrefixSolicitation": 146, "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157, "DuplicateAddressConfirmationCodeSuffix": 158, "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}  # fmt: skip
ICMP_TYPES: Final[Mapping[str, Mapping[str, int]]] = {"IPv4": _IPV4, "IPv6": _IPV6}
ICMP_PROTOCOLS: Final = {"IPv4": 1, "IPv6": 58}


def ports_of(at: At, place: Place) -> tuple[PortSpec, ...] | None:
    """Return what a rule of cilium.io says about ports, in ``toPorts`` or in ``icmps``; None: everything.

    Both lists are the same empty as absent; an entry without ports in it is about nothing.
    """
    ports, types = at.child("toPorts"), at.child("icmps")
    if ports.value and types.value:
        types.fail("cannot be combined with toPorts: write two rules")
    for one in (ports, types):
        if one.value == []:
            one.warn("is empty: every port and protocol is meant")
    if ports.value:
        return tuple(spec for one in ports.items() for spec in _block(one, place))
    if types.value:
        return tuple(_icmp(field) for one in types.items() for field in one.child("fields").items())
    return None


def _block(at: At, place: Place) -> Iterator[PortSpec]:
    inside = None if place.deny else l7(at, place)
    listed = list(at.child("ports").items())
    if not listed:
        if inside is not None:
            at.child("ports").fail("must be set: what is inside connections is judged by port")
        at.child("ports").warn("is empty: this entry is about nothing")
    for port in listed:
        yield from _port(port, inside)


# ---- ports --------------------------------------------------------------------------------------------------


def _port(at: At, inside: L7 | None) -> Iterator[PortSpec]:
    protocols, text = _protocols(at, inside), at.text("port")
    if protocols[0] in PORTLESS:
        if text.strip("0") or len(text) > 1:
            at.child("port").fail(f"{at.text('protocol').upper()} has no ports: leave it out")
        if at.child("endPort").value:
            at.child("endPort").fail(f"{at.text('protocol').upper()} has no ports: leave it out")
        yield PortSpec(protocol=protocols[0])
        return
    if not text:
        at.child("port").fail("must be set (a number or a name, as a string)")
    if is_port_name(text.lower()):
        if at.child("endPort").value:
            at.child("endPort").fail("a named port has no range")
        for protocol in protocols:
            yield PortSpec(protocol=protocol, name=text.lower(), l7=inside)
        return
    yield from _numbers(at, text, protocols, inside)


def _numbers(at: At, text: str, protocols: tuple[int, ...], inside: L7 | None) -> Iterator[PortSpec]:
    low, high = port_range(at, _number(at.child("port"), text))
    judged = inside is not None and inside.protocol not in (L7Protocol.TLS, L7Protocol.CUSTOM)
    if low == 0:
        if judged:
            at.child("port").fail('"0" is not allowed with L7 rules')
        if protocols == ANY_PROTOCOLS and inside is None:
            yield PortSpec(protocol=0)
            return
        low, high = 0, LAST_PORT
    if inside is not None and inside.protocol is L7Protocol.DNS and high > low:
        at.child("endPort").fail("DNS rules have no port ranges")
    for protocol in protocols:
        yield PortSpec(protocol=protocol, low=low, high=high, l7=inside)


def _number(at: At, text: str) -> int:
    """Return the number that Go's strconv reads with base 0: underscores part digits, a leading 0 makes it octal."""
    digits = text.replace("_", "")
    if not digits.isdecimal() or not digits.isascii() or len(digits) > 15 or "__" in text or text.endswith("_"):
        at.fail(f"{shown(text)} is neither a port number nor a port name")
    if len(digits) > 1 and digits.startswith("0"):
        if set(digits) & set("89"):
            at.fail(f"{shown(text)} is not a port number: a leading 0 makes it octal")
        at.warn(f"a leading 0 makes it octal: port {int(digits, 8)}")
        return int(digits, 8)
    if text.startswith("_"):
        at.fail(f"{shown(text)} is neither a port number nor a port name")
    return int(digits)


def _protocols(at: At, inside: L7 | None) -> tuple[int, ...]:
    """Return the protocols that a port is about, checked against what can be judged inside of them."""
    child, name = at.child("protocol"), at.text("protocol").upper()
    given = ANY_PROTOCOLS if name in ("", "ANY") else (PROTOCOLS[name],)
    if inside is None:
        return given
    if inside.protocol is L7Protocol.DNS:
        if given == ANY_PROTOCOLS:
            return _DNS_PROTOCOLS
        if given[0] not in _DNS_PROTOCOLS:
            child.fail(f"DNS rules need protocol UDP, TCP or ANY, not {name}")
        return given
    if inside.protocol in (L7Protocol.TLS, L7Protocol.CUSTOM) and given == ANY_PROTOCOLS:
        child.warn("TLS and listeners are about TCP: the other protocols are not allowed by this entry")
        return (TCP,)
    if given != (TCP,):
        what = {L7Protocol.HTTP: "HTTP rules", L7Protocol.KAFKA: "Kafka rules"}.get(
            inside.protocol, "TLS and listeners"
        )
        child.fail(f"{what} need protocol TCP")
    return given


# ---- ICMP ---------------------------------------------------------------------------------------------------


def _icmp(at: At) -> PortSpec:
    family = at.text("family") or "IPv4"
    names, field = ICMP_TYPES[family], at.child("type")
    number = field.value
    if isinstance(number, str):
        number = int(number) if number.isdecimal() and number.isascii() and len(number) <= 3 else names.get(number)
    if number is None or not 0 <= number <= 255:
        field.fail(f"{shown(field.value)} is neither in 0..255 nor the name of a type of {family} ({', '.join(names)})")
    return PortSpec(protocol=ICMP_PROTOCOLS[family], low=number, high=number)


# ---- NetworkPolicy ------------------------------------------------------------------------------------------


def network_policy_ports(at: At) -> tuple[PortSpec, ...] | None:
    """Return a NetworkPolicy rule's ``ports``; None: absent or empty, all ports."""
    return tuple(_network_policy_port(one) for one in at.items()) or None


def _network_policy_port(at: At) -> PortSpec:
    protocol = PROTOCOLS[at.text("protocol") or "TCP"]
    port, end = at.child("port"), at.child("endPort")
    if port.absent:
        if not end.absent:
            end.fail("needs port")
        return PortSpec(protocol=protocol)
    if isinstance(port.value, str):
        if not is_port_name(port.value):
            port.fail(f"{shown(port.value)} is not a port name; a number has no quotes")
        if not end.absent:
            end.fail("a named port has no range")
        return PortSpec(protocol=protocol, name=port.value)
    if not 1 <= port.value <= LAST_PORT:
        port.fail(f"{shown(port.value)} is not in 1..{LAST_PORT}")
    low, high = port_range(at, port.value)
    return PortSpec(protocol=protocol, low=low, high=high)
