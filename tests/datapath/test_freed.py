"""Addresses of removed pods reach the next purge, whenever housekeeping runs."""

from typing import Any

from ciliate.datapath.endpoints import EndpointId
from ciliate.datapath.node import Datapath


class Maps:
    """Stands for the reconcilers; housekeeping runs while an endpoint's rows are being removed."""

    def __init__(self, path: Any) -> None:
        self._path = path
        self.purged: list[set[str]] = []

    def remove(self, endpoint: EndpointId) -> tuple[str, ...]:
        self._path.housekeeping()
        return (f"10.0.0.{endpoint}",)

    def list(self) -> list[dict[str, Any]]:
        return []

    def collect(self) -> int:
        return 0

    def purge(self, addresses: set[str]) -> int:
        self.purged.append(addresses)
        return len(addresses)


def test_addresses_are_purged_when_housekeeping_runs_during_the_removal() -> None:
    path: Any = Datapath(config=None, features=None, links=None)  # type: ignore[arg-type]
    path.endpoints = path.policy = path.conntrack = maps = Maps(path)
    path.forget_endpoint(EndpointId(5))
    path.forget_endpoint(EndpointId(6))
    path.housekeeping()
    assert maps.purged == [set(), {"10.0.0.5"}, {"10.0.0.6"}]
