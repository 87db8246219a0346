"""Tells processes that their UDP "connection" has lost its backend: their sockets are destroyed.

A connected UDP socket hears nothing when its backend is gone: its datagrams leave, no answer comes. Destroyed, the next
call on it fails with ECONNABORTED; connected again, it gets another backend. Only sockets that were *given* the backend
are meant, as ``socket_peers`` says by their cookies: who chose the address himself keeps it.

Formats: sock_diag(7), kernel UAPI linux/inet_diag.h.
"""

import errno
import os
import socket
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ciliate.datapath.maps import Table, addr_bytes
from ciliate.datapath.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, in_netns, u16, u32

Address = IPv4Address | IPv6Address
OWN_NETNS: Final = Path("/proc/self/ns/net")
"""The network namespace of the process itself, so the node's."""
_NETLINK_SOCK_DIAG: Final = 4
_BY_FAMILY: Final = 20
_DESTROY: Final = 21
_ESTABLISHED: Final = 1
_ID: Final = slice(4, 52)
"""Of struct inet_diag_msg: the struct inet_diag_sockid."""
_ANY_COOKIE: Final = b"\xff" * 8
_ORDER: Final[Literal["little", "big"]] = "little" if sys.byteorder == "little" else "big"
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTCONN})
"""The socket has ended meanwhile, or is no longer connected."""
_NO_NAMESPACE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.EINVAL})
"""The path is gone, or an empty file where one was mounted."""


class SocketsError(OSError):
    """The kernel does not show or destroy sockets; the message says what is missing."""


def destroy_udp(
    backends: Collection[tuple[Address, int]], namespaces: Iterable[Path], peers: Table, *, protocol: int = 17
) -> int:
    """Destroy the UDP sockets that were connected to one of these removed backends; return how many.

    ``namespaces``: of the node (``OWN_NETNS``) and of its pods; one that is gone is passed by. Blocks: about a
    millisecond a namespace, nothing where no socket has such a backend. Errors: OSError, after all namespaces were
    tried; SocketsError if the kernel cannot.
    """
    meant = sockets_of(backends, peers, protocol)
    if not meant:
        return 0
    count = 0
    failed: OSError | None = None
    for path in namespaces:
        try:
            count += in_netns(path, lambda: _destroy_here(meant))
        except OSError as error:
            if isinstance(error, SocketsError) or error.errno not in _NO_NAMESPACE:
                failed = error
    if failed is not None:
        raise failed
    return count


def sockets_of(
    backends: Collection[tuple[Address, int]], peers: Table, protocol: int = 17
) -> dict[int, set[tuple[bytes, int]]]:
    """Return cookie -> the (address octets, port) among ``backends`` that the socket was given. Walks the map."""
    wanted = {(addr_bytes(address), port) for address, port in backends}
    found: dict[int, set[tuple[bytes, int]]] = {}
    if not wanted:
        return found
    ports = sorted({port for _, port in wanted})
    for keys, _ in peers.chunks():
        some = keys[keys["protocol"] == protocol]
        for key in some[np.isin(some["port"], ports)]:
            end = key["addr"].tobytes(), int(key["port"])
            if end in wanted:
                found.setdefault(int(key["socket"]), set()).add(end)
    return found


def can_destroy() -> bool:
    """Return whether this kernel destroys sockets when asked (CONFIG_INET_DIAG_DESTROY, CONFIG_INET_UDP_DIAG)."""
    try:
        with _Diag() as diag:
            list(diag.udp(socket.AF_INET))  # without diagnosis of UDP this fails, while below it were ENOENT
            # A socket that cannot be: port 0.
            return diag.destroy(socket.AF_INET, bytes(40) + _ANY_COOKIE) in _GONE
    except OSError:
        return False


def _destroy_here(meant: Mapping[int, set[tuple[bytes, int]]]) -> int:
    count = 0
    with _Diag() as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            for sockid in list(diag.udp(family)):
                if _peer(family, sockid) not in meant.get(_cookie(sockid), ()):
                    continue
                code = diag.destroy(family, sockid)
                if code and code not in _GONE:
                    raise _error(code)
                count += not code
    return count


def _peer(family: int, sockid: bytes) -> tuple[bytes, int]:
    raw = sockid[20:36] if family == socket.AF_INET6 else addr_bytes(IPv4Address(sockid[20:24]))
    return raw, int.from_bytes(sockid[2:4], "big")


def _cookie(sockid: bytes) -> int:
    low, high = (int.from_bytes(sockid[at : at + 4], _ORDER) for at in (40, 44))
    return high << 32 | low


def _error(code: int) -> SocketsError:
    hint = " (CONFIG_INET_UDP_DIAG, CONFIG_INET_DIAG_DESTROY)" if code in (errno.EOPNOTSUPP, errno.ENOENT) else ""
    return SocketsError(code, f"connected UDP sockets cannot be told of a removed backend: {os.strerror(code)}{hint}")


class _Diag:
    """A sock_diag socket of the calling thread's network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self._sequence = 0

    def __enter__(self) -> "_Diag":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, kind: int, flags: int, family: int, sockid: bytes) -> None:
        self._sequence += 1
        # struct inet_diag_req_v2
        body = bytes([family, socket.IPPROTO_UDP, 0, 0]) + u32(1 << _ESTABLISHED) + sockid
        head = u32(16 + len(body)) + u16(kind) + u16(flags | NLM_F_REQUEST) + u32(self._sequence) + u32(0)
        self._socket.send(head + body)

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        while True:
            data = self._socket.recv(1 << 17)
            at = 0
            while at + 16 <= len(data):
                length = int.from_bytes(data[at : at + 4], _ORDER)
                if int.from_bytes(data[at + 8 : at + 12], _ORDER) == self._sequence:
                    yield int.from_bytes(data[at + 4 : at + 6], _ORDER), data[at + 16 : at + length]
                at += (length + 3) & ~3

    def udp(self, family: int) -> Iterator[bytes]:
        """Yield the struct inet_diag_sockid of each connected UDP socket of a family. Error: SocketsError."""
        self._send(_BY_FAMILY, NLM_F_DUMP, family, bytes(48))
        for kind, body in self._answers():
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                raise _error(-int.from_bytes(body[:4], _ORDER, signed=True))
            yield body[_ID]

    def destroy(self, family: int, sockid: bytes) -> int:
        """Destroy one socket; return 0 or the error's number."""
        self._send(_DESTROY, NLM_F_ACK, family, sockid)
        for kind, body in self._answers():
            if kind == NLMSG_ERROR:
                return -int.from_bytes(body[:4], _ORDER, signed=True)
        raise AssertionError("unreachable: the answers end only by returning")
