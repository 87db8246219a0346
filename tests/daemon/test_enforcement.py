"""The worker that writes policies: what it writes, and in which order, against a datapath that only takes notes."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.daemon.cidrs import CidrIdentities
from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.enforcement import Enforcement
from ciliate.daemon.ipcache import IpTable, PodAddress
from ciliate.datapath.policy import PolicyReport
from ciliate.identity.numbers import IdentityId
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.parse import parse_object
from tests.daemon.test_state import endpoint

COMMON = {"k8s:io.kubernetes.pod.namespace=default", "k8s:io.cilium.k8s.policy.cluster=default"}
SERVER, CLIENT = frozenset({"k8s:app=server", *COMMON}), frozenset({"k8s:app=client", *COMMON})


class Notes:
    """Takes the place of the datapath. ``fail``: the next write of that kind raises."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Any]] = []
        self.fail = ""
        self.ipcache = SimpleNamespace(
            sync=lambda rows, prune: self._note("sync", dict(rows)),
            upsert=lambda rows: self._note("upsert", dict(rows)),
            delete=lambda prefixes: self._note("delete", list(prefixes)),
        )
        self.policy = SimpleNamespace(rulesets_of=lambda desired: {})
        self.listeners = SimpleNamespace(list=dict, sync=lambda ports, prune: None)

    def _note(self, what: str, value: Any) -> None:
        if self.fail == what:
            self.fail = ""
            raise OSError(f"{what} refused")
        self.taken.append((what, value))

    def apply_policy(self, desired: Mapping[Any, Any], known: Any, *, complete: bool) -> PolicyReport:
        assert complete
        self._note("policy", (dict(desired), set(known)))
        return PolicyReport(epoch=1, rows_written=0, alarms=(), identities_over=0)


def policy(*peers: dict[str, Any]) -> Any:
    return parse_object(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": "p"},
            "spec": {"endpointSelector": {"matchLabels": {"app": "server"}}, "ingress": list(peers)},
        }
    )


class Bench:
    def __init__(self, folder: Path) -> None:
        self.datapath, self.table = Notes(), IpTable()
        endpoints = EndpointTable(folder / "endpoints.json")
        one = endpoint(1, "c")
        one.identity, one.labels = 300, sorted(SERVER)
        endpoints.add(one)
        self.work = Enforcement(
            self.datapath,  # type: ignore[arg-type]
            PolicyEngine(),
            endpoints,
            self.table,
            CidrIdentities(folder / "cidrs.json"),
            SimpleNamespace(),  # type: ignore[arg-type]
        )
        self.work.learn_identity(IdentityId(300), SERVER)

    def set(self, *policies: Any) -> int:
        self.work.set_policies({one.key: one for one in policies})
        return self.work.request()

    @property
    def kinds(self) -> list[str]:
        return [what for what, _ in self.datapath.taken]


@pytest.fixture
async def bench(tmp_path: Path) -> Any:
    one = Bench(tmp_path)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(one.work.run())
        yield one
        task.cancel()


async def test_nothing_is_written_before_every_source_has_reported(bench: Bench) -> None:
    """Else a restart would open what a policy closes that was not read yet."""
    early = bench.work.request()
    waiting = asyncio.create_task(bench.work.enforced(early))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not bench.datapath.taken
    number = bench.set(policy({"fromEndpoints": [{"matchLabels": {"app": "client"}}]}))
    bench.work.begin()
    await bench.work.enforced(number)
    await waiting
    assert bench.kinds == ["sync", "policy"]
    (desired, known) = bench.datapath.taken[1][1]
    egress, ingress = desired[1]
    assert egress is None
    assert ingress is not None and ingress.default_rules
    assert 300 in known


async def test_a_new_identity_is_in_the_policies_before_its_address_is_in_the_ipcache(bench: Bench) -> None:
    number = bench.set(policy({"fromEndpoints": [{"matchLabels": {"app": "client"}}]}))
    bench.work.begin()
    await bench.work.enforced(number)
    bench.datapath.taken.clear()
    bench.work.learn_identity(IdentityId(301), CLIENT)
    bench.table.set_pod("10.1.0.9", PodAddress(identity=IdentityId(301), host="192.0.2.2"))
    await bench.work.enforced(bench.work.request())
    assert bench.kinds[:3] == ["policy", "upsert", "delete"]
    desired, known = bench.datapath.taken[0][1]
    assert 301 in desired[1][1].members
    assert 301 in known


async def test_a_cidr_leaves_the_ipcache_before_its_identity_goes(bench: Bench) -> None:
    number = bench.set(policy({"fromCIDR": ["192.0.2.0/24"]}))
    bench.work.begin()
    await bench.work.enforced(number)
    (identity,) = (row.identity for row in bench.datapath.taken[0][1].values())
    bench.datapath.taken.clear()
    await bench.work.enforced(bench.set())
    what, gone = next(one for one in bench.datapath.taken if one[0] == "delete" and one[1])
    assert [str(one) for one in gone] == ["192.0.2.0/24"]
    with_it = [known for what, value in bench.datapath.taken if what == "policy" for known in [value[1]]]
    assert identity in with_it[0] and identity not in with_it[-1]
    assert bench.kinds.index("policy") < bench.datapath.taken.index((what, gone)) < len(bench.kinds) - 1


async def test_a_failed_pass_is_repeated_and_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    number = bench.set()
    bench.work.begin()
    await bench.work.enforced(number)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _, what, *rest: loop.call_soon(what, *rest))
    bench.datapath.fail = "upsert"
    bench.table.set_pod("10.1.0.9", PodAddress(identity=IdentityId(300), host="192.0.2.2"))
    passes = await bench.work.passed(0)
    outcome = await bench.work.enforced(bench.work.request())
    assert outcome.problems == ["the datapath refused a change: upsert refused"]
    await bench.work.passed(passes + 1)
    assert not bench.work.last.problems
    assert any(what == "upsert" and value for what, value in bench.datapath.taken)
