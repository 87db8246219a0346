"""The worker that keeps services programmed: what it writes and when, and what it shows of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.daemon.api import Unknown
from ciliate.daemon.endpoints import EndpointTable, LocalEndpoint
from ciliate.daemon.healthcheck import HealthChecks
from ciliate.daemon.objects import ClusterObjects
from ciliate.daemon.service_documents import ServicesView
from ciliate.daemon.services import Services
from ciliate.daemon.turns import TURN
from ciliate.k8s.manifests import ScanResult, object_key
from ciliate.loadbalancer.model import Backend, Changes, Frontend, LocalNode, Owner, Scope
from ciliate.loadbalancer.table import LoadBalancer

WEB = Owner("Service", "default", "web")


@dataclass
class Done:
    problems: Mapping[Owner, str] = field(default_factory=dict)
    gone: Collection[Backend] = ()


class Maps:
    """Stands for the datapath: remembers, and refuses on request."""

    def __init__(self) -> None:
        self.rows: dict[Owner, tuple[Frontend, ...]] = {}
        self.calls: list[tuple[set[Owner], bool]] = []
        self.fail = 0
        self.error: Exception = OSError(12, "no memory")
        self.answer = Done()
        self.collected = asyncio.Event()
        self.waiting = False
        self._loop = asyncio.get_running_loop()

    def apply(self, changes: Changes, *, complete: bool = False) -> Done:
        if self.fail:
            self.fail -= 1
            raise self.error
        self.calls.append((set(changes), complete))
        if complete:
            self.rows = {}
        self.rows |= changes
        self.rows = {owner: frontends for owner, frontends in self.rows.items() if frontends}
        self.waiting = False
        return self.answer

    def collect(self) -> int:
        self._loop.call_soon_threadsafe(self.collected.set)
        return 0


class World:
    """Manifests go in; the worker runs on what they say."""

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self.cluster = ClusterObjects(folder / "policies")
        self.endpoints = EndpointTable(folder / "endpoints.json")
        self.maps = Maps()
        self.told: list[Collection[Backend]] = []
        self.services = Services(LocalNode(name="n1"), self.maps, HealthChecks(), self.told.append, enabled=enabled)

    def learn(self, *documents: dict[str, Any]) -> None:
        for one in documents:
            read = self.cluster.read(object_key(one), one)
            assert read is not None
            self.cluster.learn(read)
        self.services.learn(self.cluster, self.endpoints, [object_key(one) for one in documents])

    def forget(self, document: dict[str, Any]) -> None:
        key = object_key(document)
        self.cluster.forget(key)
        self.services.learn(self.cluster, self.endpoints, [key])

    def view(self) -> ServicesView:
        agent: Any = SimpleNamespace(services=self.services, cluster=self.cluster, table=SimpleNamespace(pods={}))
        return ServicesView.of(agent)


@asynccontextmanager
async def running(folder: Path, *, enabled: bool = True) -> AsyncIterator[World]:
    world = World(folder, enabled=enabled)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(world.services.run())
        try:
            yield world
        finally:
            task.cancel()


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    spec = {"clusterIP": "10.96.0.10", "selector": {"app": name}, "ports": [{"port": 80}]} | spec
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoints(*addresses: str, owner: str = "web") -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{owner}-1", "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": [one]} for one in addresses],
    }


def pod(node: str = "n1", **more: Any) -> dict[str, Any]:
    ports = [{"containerPort": 8080, "hostPort": 80}]
    spec = {"nodeName": node, "containers": [{"ports": ports}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-1"}, "spec": spec} | more


def asked(world: World, owner: Owner, port: int = 80) -> list[str]:
    """The backends of an owner's frontend for clients in the cluster."""
    (one,) = (f for f in world.maps.rows[owner] if f.at.scope is Scope.CLUSTER and f.at.port == port)
    return [f"{backend.address}:{backend.port}" for backend in one.backends]


async def test_nothing_is_written_before_every_source_has_reported(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.learn(service())
        await asyncio.sleep(0.05)
        assert world.maps.calls == []
        world.learn(endpoints("10.1.0.7"))
        world.services.begin()
        await world.services.programmed()
        assert world.maps.calls == [({WEB}, True)]
        assert asked(world, WEB) == ["10.1.0.7:8080"]


async def test_a_change_is_one_owner_and_not_complete(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.learn(service(), endpoints("10.1.0.7"), service("other", clusterIP="10.96.0.11"))
        world.services.begin()
        await world.services.programmed()
        world.learn(endpoints("10.1.0.8"))
        await world.services.programmed()
        assert world.maps.calls[-1] == ({WEB}, False)
        assert asked(world, WEB) == ["10.1.0.8:8080"]
        world.forget(service())
        await world.services.programmed()
        assert WEB not in world.maps.rows
        assert WEB not in world.services.frontends
        assert world.services.events == {"add": 2, "update": 1, "delete": 1}


async def test_with_kube_proxy_nothing_is_served_and_what_was_goes(tmp_path: Path) -> None:
    async with running(tmp_path, enabled=False) as world:
        world.learn(service(), endpoints("10.1.0.7"), pod())
        world.services.begin()
        await world.services.programmed(world.services.request())
        assert world.maps.calls == [(set(), True)]


async def test_a_host_port_has_the_address_that_the_pod_was_given_here(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.learn(pod())
        world.services.begin()
        await world.services.programmed()
        owner = Owner("Pod", "default", "web-1")
        assert owner not in world.maps.rows
        one = LocalEndpoint(
            id=1, container_id="c", interface="eth0", netns="/n", namespace="default", name="web-1", device="d",
            addresses=["10.1.0.7"],
        )  # fmt: skip
        world.endpoints.add(one)
        world.services.learn_pod(world.cluster, world.endpoints, "default", "web-1")
        await world.services.programmed()
        assert asked(world, owner) == ["10.1.0.7:8080"]
        world.learn(pod(status={"phase": "Succeeded"}))
        await world.services.programmed()
        assert owner not in world.maps.rows
        world.learn(pod())
        await world.services.programmed()
        assert asked(world, owner) == ["10.1.0.7:8080"]


async def test_pods_of_other_nodes_have_no_host_ports_here(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.learn(pod("n2", status={"podIP": "10.2.0.7"}))
        world.services.begin()
        await world.services.programmed(world.services.request())
        assert not world.maps.rows


async def test_a_refused_write_is_a_problem_until_it_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciliate.daemon.services._AGAIN", 0.05)
    async with running(tmp_path) as world:
        world.maps.fail = 1
        world.learn(service())
        world.services.begin()
        await world.services.programmed()
        assert world.services.problems() == ["the datapath refused a change of services: [Errno 12] no memory"]
        assert not world.maps.calls
        for _ in range(1000):
            if world.maps.calls:
                break
            await asyncio.sleep(0.01)
        await world.services.programmed(world.services.request())
        assert world.maps.calls[0][1]
        assert world.services.problems() == []


async def test_any_error_leaves_the_worker_at_work_and_loses_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciliate.daemon.services._AGAIN", 0.01)
    async with running(tmp_path) as world:
        world.learn(service("first", clusterIP="10.96.0.9"))
        world.services.begin()
        assert await world.services.programmed()
        world.maps.fail, world.maps.error = 1, ValueError("could not broadcast")
        world.learn(service(), endpoints("10.1.0.7"))
        assert not await world.services.programmed()
        assert world.services.failures() == [
            "the datapath refused a change of services: ValueError('could not broadcast')"
        ]
        assert WEB not in world.maps.rows
        await until(lambda: WEB in world.maps.rows)
        assert asked(world, WEB) == ["10.1.0.7:8080"]
        assert await world.services.programmed(world.services.request())
        assert world.services.failures() == []


async def test_changes_that_no_thread_took_are_taken_at_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciliate.daemon.services._AGAIN", 0.01)
    thread, refusals = asyncio.to_thread, ["can't start new thread"]

    async def start(work: Any, *arguments: Any) -> Any:
        if refusals:
            raise RuntimeError(refusals.pop())
        return await thread(work, *arguments)

    monkeypatch.setattr("ciliate.daemon.services.asyncio.to_thread", start)
    async with running(tmp_path) as world:
        world.learn(service(), endpoints("10.1.0.7"))
        world.services.begin()
        assert not await world.services.programmed()
        await until(lambda: WEB in world.maps.rows)
        assert asked(world, WEB) == ["10.1.0.7:8080"]


@pytest.mark.parametrize("method", ["set_slice", "_rule_on_service"])
async def test_an_object_that_the_load_balancer_fails_on_is_named_and_the_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    real = getattr(LoadBalancer, method)

    def fail(self: LoadBalancer, what: Any) -> None:
        if "bad" in str(what):
            raise ZeroDivisionError("a defect")
        real(self, what)

    async with running(tmp_path) as world:
        with monkeypatch.context() as patch:
            patch.setattr(LoadBalancer, method, fail)
            world.learn(service("bad", clusterIP="10.96.0.9"), endpoints("10.1.0.6", owner="bad"))
            world.learn(service(), endpoints("10.1.0.7"))
            world.services.begin()
            assert await world.services.programmed()
            name = "EndpointSlice default/bad-1" if method == "set_slice" else "Service default/bad"
            assert world.services.problems() == [
                f"{name}: the load balancer fails on it: ZeroDivisionError('a defect')"
            ]
            assert asked(world, WEB) == ["10.1.0.7:8080"]
        world.learn(endpoints("10.1.0.8", owner="bad"))
        await world.services.programmed()
        assert world.services.problems() == []
        assert asked(world, Owner("Service", "default", "bad")) == ["10.1.0.8:8080"]


async def test_a_sync_ends_and_names_what_was_not_written(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.maps.fail = 1000
        world.learn(service())
        world.services.begin()
        assert not await world.services.programmed()
        assert not await world.services.programmed(world.services.request())
        assert world.services.failures() == ["the datapath refused a change of services: [Errno 12] no memory"]


async def test_thousands_of_objects_are_taken_in_turns(tmp_path: Path) -> None:
    """No lag is measured: it is counted how many objects pass between two turns of another task."""
    cluster = ClusterObjects(tmp_path / "policies")
    objects = {}
    for number in range(1500):
        for one in (service(f"s{number}"), endpoints("10.1.0.7", owner=f"s{number}")):
            objects[object_key(one)] = one
    count, turns = 0, [0]

    def counted(call: Any) -> Any:
        def step(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return call(*arguments)

        return step

    async def other() -> None:
        while True:
            turns.append(count)
            await asyncio.sleep(0)

    world = World(tmp_path)
    cluster.learn, cluster.forget, cluster._refresh = map(  # type: ignore[method-assign]
        counted, (cluster.learn, cluster.forget, cluster._refresh)
    )
    world.services._change = counted(world.services._change)  # type: ignore[method-assign]
    task = asyncio.create_task(other())
    read = [one for key in objects if (one := cluster.read(key, objects[key])) is not None]
    await cluster.learn_all(ScanResult(objects=objects, changed=set(objects), removed=set(), problems={}), read)
    await world.services.learn_in_turns(cluster, world.endpoints, objects)
    await cluster.refresh_facts()
    await cluster.learn_all(ScanResult(objects={}, changed=set(), removed=set(objects), problems={}), [])
    task.cancel()
    assert len(cluster.service_facts()) == 0
    assert count == 3000 + 3000 + 1500 + 3000 + 1500
    assert max(b - a for a, b in pairwise(turns)) <= 2 * TURN


async def test_what_is_taken_in_turns_is_one_change(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.services.begin()
        await world.services.programmed(world.services.request())
        documents = [service(f"s{n}", clusterIP=f"10.96.{n // 250}.{n % 250}") for n in range(400)]
        documents += [endpoints("10.1.0.7", owner=f"s{n}") for n in range(400)]
        for one in documents:
            read = world.cluster.read(object_key(one), one)
            assert read is not None
            world.cluster.learn(read)
        world.services.request()
        await world.services.learn_in_turns(world.cluster, world.endpoints, map(object_key, documents))
        await world.services.programmed()
        assert [len(owners) for owners, _ in world.maps.calls if owners] == [400]


async def test_a_pod_that_has_given_its_address_back_has_no_host_port(tmp_path: Path) -> None:
    owner = Owner("Pod", "default", "web-1")
    async with running(tmp_path) as world:
        world.learn(pod(status={"phase": "Running", "podIP": "10.1.0.7", "podIPs": [{"ip": "10.1.0.7"}]}))
        world.services.begin()
        await world.services.programmed()
        assert owner not in world.maps.rows
        one = LocalEndpoint(
            id=1, container_id="c", interface="eth0", netns="/n", namespace="default", name="web-1", device="d",
            addresses=["10.1.0.7"],
        )  # fmt: skip
        world.endpoints.add(one)
        world.services.learn_pod(world.cluster, world.endpoints, "default", "web-1")
        await world.services.programmed()
        assert asked(world, owner) == ["10.1.0.7:8080"]
        world.endpoints.remove(one)
        world.services.learn_pod(world.cluster, world.endpoints, "default", "web-1")
        await world.services.programmed()
        assert owner not in world.maps.rows


async def test_a_pod_on_the_host_s_network_has_the_addresses_of_its_status(tmp_path: Path) -> None:
    world = World(tmp_path)
    raw = pod(status={"phase": "Running", "podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}]})
    raw["spec"]["hostNetwork"] = True
    world.learn(raw)
    found = world.services._pod(world.cluster, world.endpoints, ("default", "web-1"))
    assert found is not None
    assert [str(one) for one in found.addresses] == ["192.0.2.1"]


async def test_what_did_not_fit_is_named_and_tried_after_leftovers_are_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciliate.daemon.services._LEFTOVERS", 0.05)
    async with running(tmp_path) as world:
        world.maps.answer = Done(problems={WEB: "needs 1 more row of map frontends"})
        world.learn(service(), endpoints("10.1.0.7"))
        world.services.begin()
        await world.services.programmed()
        assert world.services.problems() == [f"{WEB}: needs 1 more row of map frontends"]
        assert world.view().named("web")["problems"] == ["needs 1 more row of map frontends"]
        before = len(world.maps.calls)
        world.maps.answer, world.maps.waiting = Done(), True
        await world.maps.collected.wait()
        for _ in range(1000):
            if len(world.maps.calls) > before:
                break
            await asyncio.sleep(0.01)
        await world.services.programmed(world.services.request())
        assert world.services.problems() == []


async def test_sockets_are_told_of_backends_that_are_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        world.services.begin()
        await world.services.programmed(world.services.request())
        assert not world.told
        gone = asked_backend("10.1.0.7")
        world.maps.answer = Done(gone=(gone,))
        await world.services.programmed(world.services.request())
        assert world.told == [(gone,)]


async def test_sockets_that_could_not_be_told_are_told_later_but_not_of_what_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciliate.daemon.services._AGAIN", 3600.0)
    async with running(tmp_path) as world:
        refuse = True

        def notify(gone: Collection[Backend]) -> None:
            if refuse:
                raise OSError(1, "not permitted")
            world.told.append(gone)

        world.services._notify = notify
        dead, back = asked_backend("10.1.0.7"), asked_backend("10.1.0.8")
        world.maps.answer = Done(gone=(dead, back))
        world.services.begin()
        assert await world.services.programmed(world.services.request())
        world.maps.answer = Done()
        assert await world.services.programmed(world.services.request())
        problem = "sockets of removed backends cannot be told: [Errno 1] not permitted"
        assert world.services.problems() == [problem]
        assert world.services.failures() == []
        refuse = False
        slices = endpoints("10.1.0.8") | {"ports": [{"port": 53, "protocol": "UDP"}]}
        world.learn(service(ports=[{"port": 53, "protocol": "UDP"}]), slices)
        await world.services.programmed()
        assert world.told == [(dead,)]
        assert world.services.problems() == []


async def test_sockets_are_told_again_without_another_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciliate.daemon.services._AGAIN", 0.01)
    async with running(tmp_path) as world:
        calls = 0

        def notify(gone: Collection[Backend]) -> None:
            nonlocal calls
            calls += 1
            world.maps.answer = Done()
            if calls < 3:
                raise OSError(1, "not permitted")

        world.services._notify = notify
        world.maps.answer = Done(gone=(asked_backend("10.1.0.7"),))
        world.services.begin()
        await world.services.programmed(world.services.request())
        await until(lambda: calls == 3 and not world.services.problems())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        for _ in range(1000):
            if true():
                return
            await asyncio.sleep(0.01)
    raise AssertionError("it has not become true")


def asked_backend(address: str) -> Backend:
    from ipaddress import ip_address

    return Backend(address=ip_address(address), port=53, protocol=17)


async def test_documents_show_frontends_backends_and_what_is_wrong(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        dns = {"type": "NodePort", "ports": [{"port": 53, "protocol": "UDP", "nodePort": 30053}]}
        world.learn(service(), endpoints("10.1.0.7", "10.1.0.8"), service("dns", clusterIP="10.96.0.11", **dns))
        world.learn(service("gone", clusterIP="None"), service("bad") | {"spec": {"type": "Magic"}})
        world.services.begin()
        await world.services.programmed()
        documents = {one["name"]: one for one in world.view().documents()}
    assert list(documents) == ["bad", "dns", "gone", "web"]
    web = documents["web"]
    assert (web["type"], web["algorithm"], web["problems"]) == ("ClusterIP", "random", [])
    assert [(one["address"], one["state"], one["local"]) for one in web["backends"]] == [
        ("10.1.0.7", "active", False),
        ("10.1.0.8", "active", False),
    ]
    served = [one for one in web["frontends"] if one["port"] and one["scope"] == "cluster"]
    assert [(one["address"], one["protocol"], one["backends"]) for one in served] == [
        ("10.96.0.10", "TCP", ["10.1.0.7:8080", "10.1.0.8:8080"])
    ]
    ports = {(one["kind"], one["port"], one["without_backends"]) for one in documents["dns"]["frontends"]}
    assert ("NodePort", 30053, "reject") in ports
    assert documents["gone"]["headless"]
    assert "spec.type: 'Magic'" in documents["bad"]["problems"][0]


async def test_a_document_says_whether_its_ranges_may_ask_or_may_not(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        spec = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"]}
        status = {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1"}]}}}
        other = {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}]}}}
        denying = service("no", clusterIP="10.96.0.11", **spec) | other
        denying["metadata"]["annotations"] = {"service.cilium.io/src-ranges-policy": "deny"}
        world.learn(service(**spec) | status, denying)
        world.services.begin()
        await world.services.programmed()
        view = world.view()
    assert (view.named("web")["source_deny"], view.named("no")["source_deny"]) == (False, True)


async def test_a_name_without_namespace_means_default_first(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        shop = service(clusterIP="10.96.0.12")
        shop["metadata"] = {"name": "web", "namespace": "shop"}
        world.learn(service(), shop)
        world.services.begin()
        await world.services.programmed()
        view = world.view()
    assert view.named("web")["namespace"] == "default"
    assert view.named("web")["others"] == ["Service shop/web"]
    assert view.named("shop/web")["frontends"][0]["address"] == "10.96.0.12"
    with pytest.raises(Unknown, match="service nope: this node knows none"):
        view.named("nope")
