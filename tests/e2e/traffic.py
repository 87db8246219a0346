"""Servers and clients that run in pods: ``server PORT``, ``steady|attempts|attempt ADDRESS PORT``."""

import json
import signal
import socket
import struct
import sys
import threading
import time

TOTAL_RETRANS = 100
"""Offset of tcpi_total_retrans in struct tcp_info, include/uapi/linux/tcp.h."""


def retransmitted(connection: socket.socket) -> int:
    """Segments that this end has sent again."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, TOTAL_RETRANS)[0])


def serve(port: int) -> None:
    """Echo; the number of retransmitted segments of this end follows each octet."""
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1):
                connection.sendall(struct.pack("=I", retransmitted(connection)))

    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def steady(address: str, port: int) -> None:
    """Ask over one connection until SIGTERM; print a line a hundred answers, and the outcome at the end."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    connection = socket.create_connection((address, port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answers, slowest, theirs, error = 0, 0.0, 0, ""
    print(json.dumps({"answers": 0}), flush=True)
    while not ended.is_set():
        began = time.monotonic()
        try:
            connection.sendall(b"?")
            theirs = struct.unpack("=I", connection.recv(4, socket.MSG_WAITALL))[0]
        except (OSError, struct.error) as problem:
            error = repr(problem)
            break
        slowest = max(slowest, time.monotonic() - began)
        answers += 1
        if answers % 100 == 0:
            print(json.dumps({"answers": answers}), flush=True)
        time.sleep(0.0005)
    outcome = {"answers": answers, "slowest": slowest, "retransmitted": retransmitted(connection) + theirs}
    print(json.dumps(outcome | {"error": error, "ended": True}), flush=True)


def attempts(address: str, port: int) -> None:
    """Try to connect all the time, ten at once, each for 20 ms; count (as ``connected``) those that could."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    tried = connected = 0
    print(json.dumps({"answers": 0}), flush=True)
    while not ended.is_set():
        sockets = [socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(10)]
        for one in sockets:
            one.connect_ex((address, port))
        time.sleep(0.02)
        for one in sockets:
            try:
                one.getpeername()
                connected += 1
            except OSError:
                pass
            one.close()
        tried += len(sockets)
        if tried % 50 == 0:
            print(json.dumps({"answers": tried}), flush=True)
    print(json.dumps({"answers": tried, "connected": connected, "ended": True}), flush=True)


def attempt(address: str, port: int) -> None:
    """Exit code 0: a connection could be made and was answered within two seconds."""
    try:
        with socket.create_connection((address, port), 2) as connection:
            connection.settimeout(2)
            connection.sendall(b"?")
            sys.exit(0 if len(connection.recv(4)) == 4 else 1)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server", port]:
            serve(int(port))
        case ["steady", address, port]:
            steady(address, int(port))
        case ["attempts", address, port]:
            attempts(address, int(port))
        case ["attempt", address, port]:
            attempt(address, int(port))
        case _:
            sys.exit(__doc__)
