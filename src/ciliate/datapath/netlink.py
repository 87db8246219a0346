"""A small rtnetlink client: links, addresses, routes and rules, many requests in one system call.

Why not pyroute2: it costs 13 MB of the agent's memory and 0.3 s of its start, enters namespaces by forking a
process, and a pod is wired in the time that it takes to encode three of its messages. What is needed here are nine
message types. Formats: rtnetlink(7), kernel UAPI linux/rtnetlink.h and linux/if_link.h. Everything is blocking;
``in_netns`` runs it in a thread that has entered a network namespace.
"""

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

from ciliate.datapath._libbpf import lib

T = TypeVar("T")
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface
_ORDER: Final[Literal["little", "big"]] = "little" if sys.byteorder == "little" else "big"

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFF_UP, IFF_NOARP = 0x1, 0x80
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_HOST = 0, 253, 254
RTN_UNICAST, RTN_LOCAL = 1, 2
RTNH_F_ONLINK = 4
RT_TABLE_MAIN = 254
RTPROT_CILIATE: Final = 187
"""Marks the routes and rules that are ours (unassigned in /etc/iproute2/rt_protos)."""
ADDR_GEN_NONE: Final = 1
_NESTED: Final = 0x8000


class Message(IntEnum):
    """RTM_* of the kernel UAPI."""

    NEWLINK = 16
    DELLINK = 17
    GETLINK = 18
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWRULE = 32
    DELRULE = 33
    GETRULE = 34


class NetlinkError(OSError):
    """The kernel refused a request; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One message: ``body`` starts with the family's fixed header. ``tolerate``: errors that mean "already so"."""

    type: Message
    flags: int
    body: bytes
    what: str
    tolerate: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """A network device as the kernel reports it. ``peer`` is the ifindex of a veth's other end (in its own
    namespace).
    """

    ifindex: int
    name: str
    mtu: int
    mac: bytes
    flags: int
    kind: str
    peer: int

    @property
    def up(self) -> bool:
        """Administratively up."""
        return bool(self.flags & IFF_UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteState:
    """A route as the kernel reports it."""

    family: int
    destination: Network
    table: int
    protocol: int
    oif: int
    gateway: Address | None
    source: Address | None
    mtu: int


# ---- encoding -----------------------------------------------------------------------------------------------


def u8(value: int) -> bytes:
    """One octet."""
    return value.to_bytes(1, _ORDER)


def u16(value: int) -> bytes:
    """Two octets, host order."""
    return value.to_bytes(2, _ORDER)


def u32(value: int) -> bytes:
    """Four octets, host order."""
    return value.to_bytes(4, _ORDER)


def attr(kind: int, payload: bytes) -> bytes:
    """A netlink attribute, padded to four octets."""
    length = 4 + len(payload)
    return u16(length) + u16(kind) + payload + bytes(-length % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """A nested attribute."""
    return attr(kind | _NESTED, b"".join(attributes))


def text(value: str) -> bytes:
    """A zero-terminated string."""
    return value.encode() + b"\0"


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, payload) of a run of attributes."""
    at = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 2], _ORDER)
        if length < 4:
            return
        yield int.from_bytes(data[at + 2 : at + 4], _ORDER) & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _number(data: bytes) -> int:
    return int.from_bytes(data, _ORDER)


def _ifinfo(ifindex: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return bytes(4) + u32(ifindex) + u32(flags) + u32(change)


def _family(address: Address | Network | Interface) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_LINK = 1, 3, 4, 18, 5
IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_INET6_ADDR_GEN_MODE = 26, 28, 8
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_COLLECT_METADATA = 7, 15, 25
IFLA_VXLAN_UDP_ZERO_CSUM6_RX: Final = 20


def veth_create(
    name: str, peer: str, *, mac: bytes, peer_mac: bytes, mtu: int, peer_netns: int | None = None
) -> Request:
    """A veth pair, both ends down: ``name`` here, ``peer`` in the namespace behind ``peer_netns`` (None: here too)."""
    inner = _ifinfo() + attr(IFLA_IFNAME, text(peer)) + attr(IFLA_ADDRESS, peer_mac) + attr(IFLA_MTU, u32(mtu))
    if peer_netns is not None:
        inner += attr(IFLA_NET_NS_FD, u32(peer_netns))
    body = (
        _ifinfo()
        + attr(IFLA_IFNAME, text(name))
        + attr(IFLA_ADDRESS, mac)
        + attr(IFLA_MTU, u32(mtu))
        + nest(IFLA_LINKINFO, attr(IFLA_INFO_KIND, text("veth")), nest(IFLA_INFO_DATA, attr(VETH_INFO_PEER, inner)))
    )
    return Request(
        type=Message.NEWLINK, flags=NLM_F_CREATE | NLM_F_EXCL, body=body, what=f"create veth pair {name}, {peer}"
    )


def vxlan_create(name: str, *, port: int, mac: bytes, mtu: int) -> Request:
    """A VXLAN device, down, whose tunnel is chosen for each packet (collect-metadata); ``port`` is its UDP port."""
    data = nest(
        IFLA_INFO_DATA,
        attr(IFLA_VXLAN_COLLECT_METADATA, u8(1)),
        attr(IFLA_VXLAN_LEARNING, u8(0)),
        attr(IFLA_VXLAN_PORT, port.to_bytes(2, "big")),
        attr(IFLA_VXLAN_UDP_ZERO_CSUM6_RX, u8(1)),
    )
    body = (
        _ifinfo()
        + attr(IFLA_IFNAME, text(name))
        + attr(IFLA_ADDRESS, mac)
        + attr(IFLA_MTU, u32(mtu))
        + nest(IFLA_LINKINFO, attr(IFLA_INFO_KIND, text("vxlan")), data)
    )
    return Request(type=Message.NEWLINK, flags=NLM_F_CREATE | NLM_F_EXCL, body=body, what=f"create VXLAN device {name}")


def link_quiet_up(name: str, *, noarp: bool = False) -> tuple[Request, Request]:
    """Bring a device up without an IPv6 address of its own making, so that it sends nothing by itself."""
    spec = nest(IFLA_AF_SPEC, nest(socket.AF_INET6, attr(IFLA_INET6_ADDR_GEN_MODE, u8(ADDR_GEN_NONE))))
    flags = IFF_UP | (IFF_NOARP if noarp else 0)
    quiet = Request(
        type=Message.NEWLINK,
        flags=0,
        body=_ifinfo() + attr(IFLA_IFNAME, text(name)) + spec,
        what=f"keep {name} without a link-local address",
        tolerate=frozenset({errno.EAFNOSUPPORT}),  # the kernel or this namespace has no IPv6
    )
    up = Request(
        type=Message.NEWLINK,
        flags=0,
        body=_ifinfo(0, flags, flags) + attr(IFLA_IFNAME, text(name)),
        what=f"bring {name} up",
    )
    return quiet, up


def link_set(ifindex: int, *, up: bool | None = None, mtu: int | None = None, noarp: bool | None = None) -> Request:
    """Change a device."""
    flags = (IFF_UP if up else 0) | (IFF_NOARP if noarp else 0)
    change = (IFF_UP if up is not None else 0) | (IFF_NOARP if noarp is not None else 0)
    body = _ifinfo(ifindex, flags, change) + (attr(IFLA_MTU, u32(mtu)) if mtu is not None else b"")
    return Request(type=Message.NEWLINK, flags=0, body=body, what=f"change device {ifindex}")


def link_delete(name: str) -> Request:
    """Delete a device (a veth pair: both ends); one that is not there is fine."""
    return Request(
        type=Message.DELLINK,
        flags=0,
        body=_ifinfo() + attr(IFLA_IFNAME, text(name)),
        what=f"delete device {name}",
        tolerate=frozenset({errno.ENODEV}),
    )


def address_add(ifindex: int, address: Interface) -> Request:
    """Add an address (replaced if there), without duplicate address detection."""
    flags = IFA_F_NODAD if address.version == 6 else 0
    body = bytes([_family(address), address.network.prefixlen, flags, 0]) + u32(ifindex)
    packed = address.ip.packed
    body += attr(2, packed) + attr(1, packed) + attr(8, u32(flags))
    return Request(
        type=Message.NEWADDR, flags=NLM_F_CREATE | NLM_F_REPLACE, body=body, what=f"add address {address} to {ifindex}"
    )


def _rtmsg(family: int, length: int, table: int, scope: int, kind: int, flags: int) -> bytes:
    small = table if table < 256 else 0
    return bytes([family, length, 0, 0, small, RTPROT_CILIATE, scope, kind]) + u32(flags)


def route_replace(
    destination: Network,
    ifindex: int,
    *,
    gateway: Address | None = None,
    source: Address | None = None,
    mtu: int = 0,
    table: int = RT_TABLE_MAIN,
    local: bool = False,
) -> Request:
    """Add a route or replace the one to the same destination. A gateway is taken to be on the link."""
    body = _route_body(destination, ifindex, gateway=gateway, table=table, local=local)
    if source is not None:
        body += attr(7, source.packed)
    if mtu:
        body += nest(8, attr(2, u32(mtu)))
    return Request(
        type=Message.NEWROUTE,
        flags=NLM_F_CREATE | NLM_F_REPLACE,
        body=body,
        what=f"route {destination} to device {ifindex}",
    )


def route_delete(destination: Network, ifindex: int, *, table: int = RT_TABLE_MAIN) -> Request:
    """Delete a route; one that is not there is fine."""
    return Request(
        type=Message.DELROUTE,
        flags=0,
        body=_route_body(destination, ifindex, gateway=None, table=table, local=False, delete=True),
        what=f"delete route {destination}",
        tolerate=frozenset({errno.ESRCH}),
    )


def _route_body(
    destination: Network, ifindex: int, *, gateway: Address | None, table: int, local: bool, delete: bool = False
) -> bytes:
    scope = RT_SCOPE_HOST if local else RT_SCOPE_LINK if gateway is None and destination.version == 4 else 0
    if delete:
        scope = 255
    kind = 0 if delete else RTN_LOCAL if local else RTN_UNICAST
    flags = RTNH_F_ONLINK if gateway is not None else 0
    body = _rtmsg(_family(destination), destination.prefixlen, table, scope, kind, flags)
    body += attr(1, destination.network_address.packed) + attr(4, u32(ifindex)) + attr(15, u32(table))
    if gateway is not None:
        body += attr(5, gateway.packed)
    return body


def rule_add(family: int, *, priority: int, mark: int, mask: int, table: int) -> Request:
    """A policy rule: packets with the mark look in ``table``. One that is there is fine."""
    body = bytes([family, 0, 0, 0, 0, 0, 0, 1]) + u32(0)
    body += attr(6, u32(priority)) + attr(10, u32(mark)) + attr(16, u32(mask)) + attr(15, u32(table))
    body += attr(21, u8(RTPROT_CILIATE))
    return Request(
        type=Message.NEWRULE,
        flags=NLM_F_CREATE | NLM_F_EXCL,
        body=body,
        what=f"rule {priority} for mark {mark:#x}",
        tolerate=frozenset({errno.EEXIST}),
    )


# ---- the socket ---------------------------------------------------------------------------------------------


class Netlink:
    """An rtnetlink socket of the calling thread's network namespace. Not for two threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.setsockopt(270, 12, 1)  # SOL_NETLINK, NETLINK_GET_STRICT_CHK: dumps honour their filters
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _encode(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return u32(16 + len(body)) + u16(kind) + u16(flags | NLM_F_REQUEST) + u32(self._sequence) + u32(0) + body

    def run(self, requests: Iterable[Request]) -> None:
        """Carry out requests in order, in one system call. All are tried. Error: NetlinkError of the first that
        failed.
        """
        pending: dict[int, Request] = {}
        message = bytearray()
        for request in requests:
            message += self._encode(request.type, request.flags | NLM_F_ACK, request.body)
            message += bytes(-len(message) % 4)
            pending[self._sequence] = request
        if not pending:
            return
        self._socket.send(message)
        failed: NetlinkError | None = None
        while pending:
            for kind, sequence, body in self._receive():
                request_done = pending.pop(sequence, None) if kind == NLMSG_ERROR else None
                code = -int.from_bytes(body[:4], _ORDER, signed=True) if request_done else 0
                if request_done and code and code not in request_done.tolerate and failed is None:
                    failed = NetlinkError(code, f"{request_done.what}: {os.strerror(code)}")
        if failed:
            raise failed

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        data = self._socket.recv(1 << 17)
        at = 0
        while at + 16 <= len(data):
            length = _number(data[at : at + 4])
            yield _number(data[at + 4 : at + 6]), _number(data[at + 8 : at + 12]), data[at + 16 : at + length]
            at += (length + 3) & ~3

    def _dump(self, kind: Message, header: bytes) -> Iterator[bytes]:
        self._socket.send(self._encode(kind, NLM_F_DUMP, header))
        wanted = self._sequence
        while True:
            for answer, sequence, body in self._receive():
                if sequence != wanted:
                    continue
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    code = -int.from_bytes(body[:4], _ORDER, signed=True)
                    raise NetlinkError(code, f"{kind.name}: {os.strerror(code)}")
                yield body

    def link(self, name: str) -> LinkState | None:
        """Return a device by name, None if there is none."""
        message = self._encode(Message.GETLINK, 0, _ifinfo() + attr(IFLA_IFNAME, text(name)))
        self._socket.send(message)
        while True:
            for kind, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_ERROR:
                    code = -int.from_bytes(body[:4], _ORDER, signed=True)
                    if code == errno.ENODEV:
                        return None
                    raise NetlinkError(code, f"device {name}: {os.strerror(code)}")
                return _link_state(body)

    def links(self) -> list[LinkState]:
        """Return all devices."""
        return [_link_state(body) for body in self._dump(Message.GETLINK, _ifinfo())]

    def addresses(self, ifindex: int) -> list[Interface]:
        """Return the addresses of a device."""
        found: list[Interface] = []
        for body in self._dump(Message.GETADDR, bytes(8)):
            if _number(body[4:8]) != ifindex:
                continue
            values = dict(attributes(body[8:]))
            raw = values.get(2) or values.get(1)
            if raw:
                kind = IPv4Interface if body[0] == socket.AF_INET else IPv6Interface
                found.append(kind((raw, body[1])))
        return found

    def routes(self, *, ours: bool = True) -> list[RouteState]:
        """Return unicast routes of both families; ``ours``: only those that Ciliate made."""
        return [
            _route_state(body)
            for family in (socket.AF_INET, socket.AF_INET6)
            for body in self._dump(Message.GETROUTE, bytes([family]) + bytes(11))
            if not ours or body[5] == RTPROT_CILIATE
        ]


def _link_state(body: bytes) -> LinkState:
    values = dict(attributes(body[16:]))
    info = dict(attributes(values.get(IFLA_LINKINFO, b"")))
    return LinkState(
        ifindex=_number(body[4:8]),
        name=values.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(),
        mtu=_number(values.get(IFLA_MTU, b"")),
        mac=values.get(IFLA_ADDRESS, b""),
        flags=_number(body[8:12]),
        kind=info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(),
        peer=_number(values.get(IFLA_LINK, b"")),
    )


def _route_state(body: bytes) -> RouteState:
    values = dict(attributes(body[12:]))
    four = body[0] == socket.AF_INET
    to_address: Callable[[bytes], Address] = IPv4Address if four else IPv6Address
    raw = values.get(1, bytes(4 if four else 16))
    metrics = dict(attributes(values.get(8, b"")))
    return RouteState(
        family=body[0],
        destination=IPv4Network((raw, body[1])) if four else IPv6Network((raw, body[1])),
        table=_number(values.get(15, b"")) or body[4],
        protocol=body[5],
        oif=_number(values.get(4, b"")),
        gateway=to_address(values[5]) if 5 in values else None,
        source=to_address(values[7]) if 7 in values else None,
        mtu=_number(metrics.get(2, b"")),
    )


# ---- namespaces and sysctls ---------------------------------------------------------------------------------


def in_netns(path: Path, work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own that has entered a network namespace; return its result. Errors: OSError."""
    return start_in_netns(path, work).result()


def start_in_netns(path: Path, work: Callable[[], T]) -> "Future[T]":
    """As ``in_netns``, without waiting. The thread ends with its work, so no other work ever runs in that namespace."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                code = lib.cil_setns_net(fd)
            finally:
                os.close(fd)
            if code < 0:
                raise OSError(-code, f"cannot enter network namespace {path}: {os.strerror(-code)}")
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="netns", daemon=True).start()
    return future


def write_sysctls(values: Mapping[str, str]) -> None:
    """Write network sysctls of the calling thread's namespace (``ipv4/conf/eth0/rp_filter``), those that differ.
    Error: OSError.

    Absent IPv6 ones are skipped: the kernel may have no IPv6.
    """
    for name, value in values.items():
        path = Path("/proc/sys/net") / name
        try:
            # /proc/sys follows the thread that opens it.
            if path.read_text().strip() != value:
                path.write_text(value)
        except FileNotFoundError:
            if not name.startswith("ipv6/"):
                raise


def read_sysctl(name: str) -> str:
    """Return a network sysctl of the calling thread's namespace."""
    return (Path("/proc/sys/net") / name).read_text().strip()
