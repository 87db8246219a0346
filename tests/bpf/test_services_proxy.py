"""Services whose backend's policy asks the proxy: that sees the backend, the client sees the frontend."""

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Raw

from tests.bpf.packets import tcp
from tests.bpf.policies import INGRESS, web
from tests.bpf.rig import Rig, pod_address
from tests.bpf.services import FRONT, Services, flags, send
from tests.bpf.services import TCP as TCP_NUMBER
from tests.bpf.test_rows_proxy import answer_to, proxy, segment

both = pytest.mark.parametrize("family", [4, 6])


@both
def test_proxy_sees_the_backend_and_the_client_the_frontend(node: Rig, services: Services, family: int) -> None:
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 8080, [(three, 80)], protocol=TCP_NUMBER)
    with proxy(node, family, web(INGRESS)) as there:
        send(node, 2, tcp(two, front, 4000, 8080, seq=100))
        second = segment(node.pods[2].wire.receive())
        assert (second.src, second.sport, str(second[TCP].flags)) == (front, 8080, "SA")
        send(node, 2, answer_to(second, "A"))
        with there.accept() as connection:
            assert connection.getpeername()[:2] == (two, 4000)
            assert connection.getsockname()[:2] == (three, 80)
            send(node, 2, answer_to(second, "PA") / Raw(b"question"))
            assert connection.recv(100) == b"question"
            node.pods[2].wire.receive()
            connection.sendall(b"answer")
            got = segment(node.pods[2].wire.receive())
            assert (got.src, got.sport, bytes(got[TCP].payload)) == (front, 8080, b"answer")
            assert flags(node) == [{"SERVICE", "PROXIED", "SEEN_REPLY"}]
            change = node.changed("NONE EGRESS", "NONE EGRESS", "NONE EGRESS")
            assert {name.split()[0] for name in change.counters} == {"NONE"}
            (event,) = change.events
            assert (event["verdict"], event["frontend_port"], event["dport"]) == ("REDIRECTED", 8080, 80)
