"""Runs inside pods: ``python forge.py send FRAME...`` writes frames as they are; ``watch MARK`` tells what arrives."""

import re
import socket
import sys

ALL_PROTOCOLS = 3


def wire() -> socket.socket:
    """Return a raw socket on the pod's interface."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    raw.bind(("eth0", 0))
    return raw


def send(frames: list[str]) -> None:
    """Write frames, given in hexadecimal."""
    with wire() as raw:
        for frame in frames:
            raw.send(bytes.fromhex(frame))


def watch(mark: str) -> None:
    """Print the number behind the mark of every frame that arrives with one, until killed."""
    with wire() as raw:
        print("ready", flush=True)
        while True:
            data, (_, _, kind, *_) = raw.recvfrom(65536)
            found = re.search(mark.encode() + rb"-(\d+);", data)
            if found and kind != socket.PACKET_OUTGOING:
                print(found[1].decode(), flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["send", *frames]:
            send(frames)
        case ["watch", mark]:
            watch(mark)
        case _:
            sys.exit(__doc__)
