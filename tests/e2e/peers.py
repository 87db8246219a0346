"""What talks to Services in tests, and what serves them: ``server NAME PORT [SECONDS]``, ``talk``.

A server says who it is and whom it sees, over TCP and UDP alike. ``talk`` reads a request a line from standard input,
as JSON, and prints an answer a line: one process asks many times, from one place.
"""

import errno
import json
import signal
import socket
import sys
import threading
import time
from typing import Any

TIMEOUT = 2.0


def serve(name: str, port: int, linger: float) -> None:
    """Answer until SIGTERM, and ``linger`` seconds longer."""
    if linger:
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(linger, lambda: signal.raise_signal(9)).start())
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("::", port))

    def who(peer: Any) -> bytes:
        return json.dumps({"name": name, "client": peer[0].removeprefix("::ffff:"), "port": peer[1]}).encode() + b"\n"

    def answer_datagrams() -> None:
        while True:
            _, peer = datagrams.recvfrom(65536)
            datagrams.sendto(who(peer), peer)

    def answer(connection: socket.socket, peer: Any) -> None:
        with connection:
            while connection.recv(1):
                connection.sendall(who(peer))

    threading.Thread(target=answer_datagrams, daemon=True).start()
    while True:
        connection, peer = listener.accept()
        threading.Thread(target=answer, args=(connection, peer), daemon=True).start()


def dial(request: dict[str, Any], kind: socket.SocketKind) -> socket.socket:
    address, port = request["to"]
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    one.settimeout(request.get("timeout", TIMEOUT))
    one.connect((address, port))
    return one


def ask(one: socket.socket) -> dict[str, Any]:
    """Return what the other end says; over TCP the answer to one octet is one line."""
    one.sendall(b"?")
    text = b""
    while not text.endswith(b"\n"):
        piece = one.recv(4096)
        if not piece:
            raise ConnectionError("closed")
        text += piece
    return {**json.loads(text), "peer": one.getpeername()[0], "peer_port": one.getpeername()[1]}


def unconnected(request: dict[str, Any]) -> dict[str, Any]:
    """Ask over UDP with sendto and recvfrom."""
    address, port = request["to"]
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(request.get("timeout", TIMEOUT))
        one.sendto(b"?", (address, port))
        text, peer = one.recvfrom(4096)
        return {**json.loads(text), "peer": peer[0], "peer_port": peer[1]}


KEPT: dict[str, socket.socket] = {}


def once(request: dict[str, Any]) -> dict[str, Any]:
    kind = socket.SOCK_STREAM if request["op"] in ("tcp", "open") else socket.SOCK_DGRAM
    match request["op"]:
        case "tcp" | "udp":
            with dial(request, kind) as one:
                return ask(one)
        case "sendto":
            return unconnected(request)
        case "open" | "open-udp":
            KEPT[request["id"]] = dial(request, kind)
            return ask(KEPT[request["id"]])
        case "say":
            return ask(KEPT[request["id"]])
        case "close":
            KEPT.pop(request["id"]).close()
            return {}
    raise ValueError(request["op"])


def tried(request: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        answer = once(request)
    except TimeoutError:
        answer = {"error": "timeout"}
    except OSError as error:
        answer = {"error": errno.errorcode.get(error.errno or 0, str(error))}
    return {**answer, "seconds": time.monotonic() - began}


def talk() -> None:
    """Answer requests, each ``times`` times."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps([tried(request) for _ in range(request.get("times", 1))]), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server", name, port, *rest]:
            serve(name, int(port), float(rest[0]) if rest else 0)
        case ["talk"]:
            talk()
        case _:
            sys.exit(__doc__)
