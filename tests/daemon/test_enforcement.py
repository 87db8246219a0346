"""The worker that writes policies: what it writes, and in which order, against a datapath that only takes notes."""

import asyncio
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.enforcement import Enforcement, Wanted
from ciliate.daemon.ipcache import IpTable, NodeAddresses, PodAddress
from ciliate.datapath.policy import PolicyReport
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import IdentityChange
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.parse import parse_cidr_group, parse_object
from tests.daemon.test_state import endpoint

COMMON = {"k8s:io.kubernetes.pod.namespace=default", "k8s:io.cilium.k8s.policy.cluster=default"}
SERVER, CLIENT = frozenset({"k8s:app=server", *COMMON}), frozenset({"k8s:app=client", *COMMON})


class Notes:
    """Takes the place of the datapath. ``fail``: the next write of that kind raises."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Any]] = []
        self.fail = ""
        self.known: set[IdentityId] = set()
        self.ipcache = SimpleNamespace(
            sync=lambda rows, prune: self._note("sync", dict(rows)),
            upsert=lambda rows: self._note("upsert", dict(rows)),
            delete=lambda prefixes: self._note("delete", list(prefixes)),
        )
        self.policy = SimpleNamespace(rulesets_of=lambda desired: {})
        self.listeners = SimpleNamespace(list=dict, sync=lambda ports: None, keep=lambda numbers: None)

    def _note(self, what: str, value: Any) -> None:
        if self.fail == what:
            self.fail = ""
            raise OSError(f"{what} refused")
        self.taken.append((what, value))

    def apply_policy(self, desired: Mapping[Any, Any], known: Any, *, complete: bool) -> PolicyReport:
        assert complete
        if isinstance(known, IdentityChange):
            self.known = (self.known - {*known.removed}) | {*known.added}
        else:
            self.known = set(known)
        self._note("policy", (dict(desired), set(self.known)))
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
    worker: "asyncio.Task[None]"

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
            folder,
            SimpleNamespace(),  # type: ignore[arg-type]
        )
        self.work.learn_identity(IdentityId(300), SERVER)

    def set(self, *policies: Any, **wanted: Any) -> int:
        self.work.want(Wanted(policies={one.key: one for one in policies}, **wanted))
        return self.work.request()

    async def enforced(self, number: int) -> Any:
        """Return the outcome of a pass; fail with the worker's own error if that has ended."""
        waiting = asyncio.ensure_future(self.work.enforced(number))
        await asyncio.wait({waiting, self.worker}, return_when=asyncio.FIRST_COMPLETED)
        if self.worker.done():
            self.worker.result()
        return await waiting

    @property
    def kinds(self) -> list[str]:
        return [what for what, _ in self.datapath.taken]


@pytest.fixture
async def bench(tmp_path: Path) -> Any:
    one = Bench(tmp_path)
    one.worker = asyncio.ensure_future(one.work.run())
    yield one
    one.worker.cancel()


async def test_nothing_is_written_before_every_source_has_reported(bench: Bench) -> None:
    """Else a restart would open what a policy closes that was not read yet."""
    early = bench.work.request()
    waiting = asyncio.create_task(bench.enforced(early))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not bench.datapath.taken
    number = bench.set(policy({"fromEndpoints": [{"matchLabels": {"app": "client"}}]}))
    bench.work.begin()
    await bench.enforced(number)
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
    await bench.enforced(number)
    bench.datapath.taken.clear()
    bench.work.learn_identity(IdentityId(301), CLIENT)
    bench.table.set_pod("10.1.0.9", PodAddress(identity=IdentityId(301), host="192.0.2.2"))
    await bench.enforced(bench.work.request())
    assert bench.kinds[:3] == ["policy", "upsert", "delete"]
    desired, known = bench.datapath.taken[0][1]
    assert 301 in desired[1][1].members
    assert 301 in known


async def test_a_cidr_leaves_the_ipcache_before_its_identity_goes(bench: Bench) -> None:
    number = bench.set(policy({"fromCIDR": ["192.0.2.0/24"]}))
    bench.work.begin()
    await bench.enforced(number)
    (identity,) = (row.identity for row in bench.datapath.taken[0][1].values())
    bench.datapath.taken.clear()
    await bench.enforced(bench.set())
    what, gone = next(one for one in bench.datapath.taken if one[0] == "delete" and one[1])
    assert [str(one) for one in gone] == ["192.0.2.0/24"]
    with_it = [known for what, value in bench.datapath.taken if what == "policy" for known in [value[1]]]
    assert identity in with_it[0] and identity not in with_it[-1]
    assert bench.kinds.index("policy") < bench.datapath.taken.index((what, gone)) < len(bench.kinds) - 1


def group(*cidrs: str) -> Any:
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumCIDRGroup",
        "metadata": {"name": "g"},
        "spec": {"externalCIDRs": list(cidrs)},
    }
    return parse_cidr_group(document)


async def test_a_cidr_of_a_group_has_an_identity_in_the_policy_before_its_ipcache_row(bench: Bench) -> None:
    by_group = policy({"fromCIDRSet": [{"cidrGroupRef": "g"}]})
    number = bench.set(by_group, groups={"g": group("192.0.2.0/24")})
    bench.work.begin()
    await bench.enforced(number)
    bench.datapath.taken.clear()
    number = bench.set(by_group, groups={"g": group("192.0.2.0/24", "198.51.100.0/24")})
    await bench.enforced(number)
    first, second = bench.datapath.taken[:2]
    assert (first[0], second[0]) == ("policy", "upsert")
    (identity,) = (row.identity for row in second[1].values())
    assert identity in first[1][0][1][1].members
    bench.datapath.taken.clear()
    await bench.enforced(bench.set(by_group, groups={}))
    gone = [str(one) for what, value in bench.datapath.taken if what == "delete" for one in value]
    assert sorted(gone) == ["192.0.2.0/24", "198.51.100.0/24"]


async def test_other_nodes_have_identities_while_a_policy_names_them(bench: Bench) -> None:
    address = ip_address("192.0.2.2")
    bench.table.set_nodes({"n2": NodeAddresses(name="n2", addresses=(address,), underlay=address, local=False)})
    nodes = {"n2": {"role": "edge"}}
    number = bench.set(nodes=nodes)
    bench.work.begin()
    await bench.enforced(number)
    assert [row.identity for row in bench.table.rows().values()] == [6]
    bench.datapath.taken.clear()
    by_node = policy({"fromNodes": [{"matchLabels": {"role": "edge"}}]})
    await bench.enforced(bench.set(by_node, nodes=nodes))
    ((prefix, row),) = next(value for what, value in bench.datapath.taken if what == "upsert").items()
    assert (str(prefix), row.identity) == ("192.0.2.2/32", (2 << 24) + 1)
    images = [value[0][1][1] for what, value in bench.datapath.taken if what == "policy"]
    assert row.identity in images[-1].members
    await bench.enforced(bench.set(nodes=nodes))
    assert [one.identity for one in bench.table.rows().values()] == [6]


def numbered(number: int, port: int) -> Any:
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"p{number}"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"toPorts": [{"ports": [{"port": str(port + number), "protocol": "TCP"}]}]}],
        },
    }
    return parse_object(document)


async def test_many_changes_are_enforced_by_the_share_and_a_new_pod_waits_for_one_only(bench: Bench) -> None:
    number = bench.set(*(numbered(one, 1000) for one in range(350)))
    bench.work.begin()
    await bench.enforced(number)
    assert bench.kinds == ["sync", "policy"], "the first pass is whole"
    bench.datapath.taken.clear()
    changed = bench.set(*(numbered(one, 2000) for one in range(350)))
    await bench.work.settled(changed)
    assert bench.kinds.count("policy") == 1
    assert not bench.work.done(changed)
    await bench.enforced(changed)
    images = [value[0][1][1] for what, value in bench.datapath.taken if what == "policy"]
    ports = [{row.key.port for rows in image.defaults.values() for row in rows} for image in images]
    moved = [sum(port >= 2000 for port in one) for one in ports]
    assert moved == list(range(25, 351, 25))
    assert all(len(one) == 350 for one in ports), "each state has every policy, old or new"


async def test_a_failed_pass_is_repeated_and_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    number = bench.set()
    bench.work.begin()
    await bench.enforced(number)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _, what, *rest: loop.call_soon(what, *rest))
    bench.datapath.fail = "upsert"
    bench.table.set_pod("10.1.0.9", PodAddress(identity=IdentityId(300), host="192.0.2.2"))
    passes = await bench.work.passed(0)
    outcome = await bench.enforced(bench.work.request())
    assert outcome.problems == ["the datapath refused a change: upsert refused"]
    await bench.work.passed(passes + 1)
    assert not bench.work.last.problems
    assert any(what == "upsert" and value for what, value in bench.datapath.taken)
