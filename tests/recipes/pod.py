"""What the pods of the recipes run: ``server [ADDRESS ...]`` answers, ``prober`` tries what standard input tells it.

A line for the prober is a JSON list of ``{"address", "protocol", "port", "seconds"}``; its answer is a JSON list of
whether there was an answer within that time.
"""

import contextlib
import json
import selectors
import socket
import struct
import sys
import threading
import time

TCP_PORTS, UDP_PORT = (8080, 9090), 5353


def serve(addresses: list[str]) -> None:
    """Answer on all ports, both families. A host with several addresses names them: UDP then answers from each."""
    datagrams = [_udp(address) for address in addresses]
    listeners = [
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        for port in TCP_PORTS
    ]
    selector = selectors.DefaultSelector()
    for one in (*datagrams, *listeners):
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            one = key.fileobj
            assert isinstance(one, socket.socket)
            if one in datagrams:
                data, peer = one.recvfrom(64)
                one.sendto(data, peer)
            else:
                connection, _ = one.accept()
                threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _udp(address: str) -> socket.socket:
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    if address == "::":
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    one.bind((address, UDP_PORT))
    return one


def _answer(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            connection.sendall(connection.recv(64))


class Attempt:
    """One flow that is being tried; what may get lost is sent again."""

    def __init__(self, number: int, address: str, protocol: str, port: int, seconds: float) -> None:
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.token = struct.pack("!HH", __import__("os").getpid() & 0xFFFF, number)
        self.to, self.protocol = (address, port), protocol
        self.until, self.again = time.monotonic() + seconds, 0.0
        self.answered = False
        kind, number = {
            "tcp": (socket.SOCK_STREAM, 0),
            "udp": (socket.SOCK_DGRAM, 0),
            "icmp": (socket.SOCK_RAW, 58 if self.family == socket.AF_INET6 else 1),
        }[protocol]
        self.socket = socket.socket(self.family, kind | socket.SOCK_NONBLOCK, number)
        self.socket.connect_ex(self.to)

    def send(self, now: float) -> None:
        """Send, or send again."""
        if now < self.again or self.answered:
            return
        try:
            self.socket.send(self._echo() if self.protocol == "icmp" else self.token)
            self.again = self.until if self.protocol == "tcp" else now + 0.2
        except BlockingIOError:
            pass  # the handshake goes on
        except OSError:
            self.again = self.until  # refused: a TCP reset, an ICMP error

    def _echo(self) -> bytes:
        if self.family == socket.AF_INET6:
            return struct.pack("!BBH", 128, 0, 0) + self.token  # the kernel fills in the checksum, RFC 3542, 3.1
        head, number = struct.unpack("!HH", self.token)
        total = 0x0800 + head + number
        total = (total & 0xFFFF) + (total >> 16)
        return struct.pack("!BBH", 8, 0, ~total & 0xFFFF) + self.token

    def receive(self) -> None:
        """Look whether the answer has come."""
        try:
            data = self.socket.recv(256)
        except OSError:
            return
        if self.protocol == "icmp":
            if self.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            self.answered |= data[:1] in (b"\x00", b"\x81") and data[4:8] == self.token
        else:
            self.answered |= data == self.token


def probe(wanted: list[dict[str, object]]) -> list[bool]:
    """Try all at once; return which were answered."""
    attempts = [Attempt(number, **one) for number, one in enumerate(wanted)]  # type: ignore[arg-type]
    selector = selectors.DefaultSelector()
    for one in attempts:
        selector.register(one.socket, selectors.EVENT_READ, one)
    while any(not one.answered and one.until > time.monotonic() for one in attempts):
        for one in attempts:
            one.send(time.monotonic())
        for key, _ in selector.select(0.02):
            key.data.receive()
    for one in attempts:
        one.socket.close()
    return [one.answered for one in attempts]


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(sys.argv[2:] or ["::"])
    for line in sys.stdin:
        print(json.dumps(probe(json.loads(line))), flush=True)
