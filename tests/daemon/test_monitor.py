"""Events of services: numbers become names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ciliate.daemon.endpoints import EndpointTable, LocalEndpoint
from ciliate.daemon.ipcache import IpTable, PodAddress
from ciliate.daemon.monitor import Decoder
from ciliate.datapath.btf import Btf
from ciliate.datapath.build import OBJECT
from ciliate.datapath.maps import addr_bytes
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import IdentityIndex

NODE_NETNS = 1
POD_NETNS = 4711


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    endpoints, table = EndpointTable(tmp_path / "endpoints.json"), IpTable()
    endpoints.add(
        LocalEndpoint(
            id=7,
            container_id="c",
            interface="eth0",
            netns="/n",
            namespace="default",
            name="client",
            device="d",
            addresses=["10.1.0.5", "fd00::5"],
            identity=300,
            netns_cookie=POD_NETNS,
        )
    )
    for address in ("10.1.0.8", "fd00::8"):
        table.set_pod(address, PodAddress(identity=IdentityId(301), host="172.30.0.1", pod="default/web-1"))
    return Decoder(
        node="n1",
        reasons={158: "NO_SERVICE"},
        explain=lambda _: (),
        ruleset=lambda _: (),
        policies={},
        endpoints=endpoints,
        table=table,
        identities=IdentityIndex(),
        service={3: "default/web"}.get,  # type: ignore[arg-type]
        own_netns=NODE_NETNS,
    )


def event(**values: Any) -> Any:
    record = np.zeros(1, Btf.from_elf(OBJECT).struct("event"))
    for name, value in values.items():
        record[name] = np.void(addr_bytes(value)) if name in ("saddr", "daddr", "frontend") else value
    return record


def socket_event(to: str, frontend: str, netns: int = POD_NETNS, **more: Any) -> Any:
    given = {"type": 4, "verdict": 1, "protocol": 6, "daddr": to, "dport": 8080, "frontend": frontend}
    return event(**given, frontend_port=80, service=3, packets=99, bytes=netns, **more)


@pytest.mark.parametrize(
    ("to", "frontend", "own"), [("10.1.0.8", "10.96.0.10", "10.1.0.5"), ("fd00::8", "fd00:96::a", "fd00::5")]
)
def test_a_pods_socket_shows_client_service_and_backend(decoder: Decoder, to: str, frontend: str, own: str) -> None:
    (document,) = decoder.documents(socket_event(to, frontend))
    assert (document["type"], document["verdict"], document["protocol"]) == ("socket", "TRANSLATED", "TCP")
    assert document["service"] == {"name": "default/web", "address": frontend, "port": 80}
    source, destination = document["source"], document["destination"]
    assert (source["pod"], source["address"], source["identity"]) == ("default/client", own, 300)
    assert (destination["pod"], destination["port"], destination["identity"]) == ("default/web-1", 8080, 301)
    assert (document["packets"], document["bytes"]) == (0, 0)


def test_a_socket_of_the_node_is_the_hosts(decoder: Decoder) -> None:
    (document,) = decoder.documents(socket_event("10.1.0.8", "10.96.0.10", netns=NODE_NETNS))
    assert (document["source"]["pod"], document["source"]["identity"]) == ("", 1)


def test_a_service_without_a_backend_is_a_drop_with_its_reason(decoder: Decoder) -> None:
    record = socket_event("10.96.0.10", "10.96.0.10", reason=158)
    record["verdict"] = 0
    (document,) = decoder.documents(record)
    assert (document["verdict"], document["reason"]) == ("DROPPED", "NO_SERVICE")


def test_a_packet_names_the_service_that_it_was_for(decoder: Decoder) -> None:
    given = {"type": 1, "verdict": 1, "protocol": 17, "saddr": "10.1.0.5", "daddr": "10.1.0.8"}
    (document,) = decoder.documents(event(**given, frontend="10.96.0.10", frontend_port=53, service=3))
    assert document["service"] == {"name": "default/web", "address": "10.96.0.10", "port": 53}
    (plain,) = decoder.documents(event(**given))
    assert plain["service"] is None
