"""Translated packets whose sum a device has made (CHECKSUM_COMPLETE): it stays right, or the kernel would drop them."""

import errno

import pytest
from scapy.packet import Packet

from tests.bpf.packets import fragments, udp, unreachable
from tests.bpf.rig import REDIRECT, Rig, pod_address
from tests.bpf.services import BACKEND, FRONT, NUMBER, Services, packet
from tests.bpf.test_nat import run_summed

both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", ["udp", "tcp"])
GATEWAY = {4: "169.254.0.1", 6: "fe80::c111"}


def passes(node: Rig, number: int, sent: Packet, want: bytes) -> None:
    """Run the pods' program on a summed packet; check the sum (the kernel does) and the octets, where they are told."""
    try:
        retval, data = run_summed(node, "from_pod", f"pod{number}", bytes(node.from_pod(number, sent)))
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("this kernel's BPF_PROG_TEST_RUN knows no CHECKSUM_COMPLETE (Linux 6.15)")
        raise
    assert retval == REDIRECT
    assert not want or data == want


@both
@kinds
def test_sum_stays_right_there_and_back(node: Rig, services: Services, family: int, kind: str) -> None:
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, BACKEND)], protocol=NUMBER[kind])
    seen = packet(kind, two, three, 4000, BACKEND)
    heard = packet(kind, front, two, 53, 4000, "SA")
    passes(node, 2, packet(kind, two, front, 4000, 53), node.to_pod(3, seen))
    passes(node, 3, packet(kind, three, two, BACKEND, 4000, "SA"), node.to_pod(2, heard))
    for octets in (0, 48 if family == 6 else 28):
        passes(node, 3, unreachable(three, seen, octets=octets), b"")
        passes(node, 2, unreachable(two, heard, octets=octets), b"")


@both
@kinds
def test_sum_stays_right_in_a_hairpin(node: Rig, services: Services, family: int, kind: str) -> None:
    two, front, gateway = pod_address(2, family), FRONT[family], GATEWAY[family]
    services.add(front, 53, [(two, BACKEND)], protocol=NUMBER[kind])
    seen, heard = packet(kind, gateway, two, 4000, BACKEND), packet(kind, front, two, 53, 4000, "SA")
    passes(node, 2, packet(kind, two, front, 4000, 53), node.to_pod(2, seen))
    passes(node, 2, packet(kind, two, gateway, BACKEND, 4000, "SA"), node.to_pod(2, heard))
    passes(node, 2, unreachable(two, seen), b"")
    passes(node, 2, unreachable(two, heard), b"")


@both
def test_sum_stays_right_in_fragments(node: Rig, services: Services, family: int) -> None:
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, BACKEND)])
    sent = fragments(udp(two, front, 4000, 53, bytes(range(100))), 78)
    want = fragments(udp(two, three, 4000, BACKEND, bytes(range(100))), 78)
    for there, here in zip(sent, want, strict=True):
        passes(node, 2, there, node.to_pod(3, here))


@both
def test_sum_stays_right_in_a_rejection_as_long_as_what_it_rejects(node: Rig, services: Services, family: int) -> None:
    """A change of the length makes the kernel forget the device's sum; this one it keeps."""
    two, front = pod_address(2, family), FRONT[family]
    services.address(front)
    passes(node, 2, udp(two, front, 4000, 53, bytes(96)), b"")
