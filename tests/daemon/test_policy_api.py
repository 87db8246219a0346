"""Questions to an agent about policies: answered from a copy of its state, while its loop goes on."""

import asyncio
import json
import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from ciliate.daemon.ipcache import IpTable, NodeAddresses, PodAddress
from ciliate.daemon.objects import ClusterObjects
from ciliate.daemon.policy_api import Snapshot, policy_routes
from ciliate.identity.labels import cidr_labels, pod_labels, reserved_labels
from ciliate.identity.numbers import IdentityId
from ciliate.k8s.objects import Pod, namespace_of
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import CidrGroup

POLICY = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "api", "namespace": "shop"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "api"}},
        "ingress": [{"fromCIDR": ["198.51.100.0/24"], "toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]}],
    },
}
SPACE = namespace_of("shop", {"team": "a"})


def pod(name: str, app: str) -> Pod:
    return Pod(namespace="shop", name=name, labels={"app": app}, node_name="n1")


def labels(one: Pod) -> frozenset[str]:
    return pod_labels(
        namespace=one.namespace,
        labels=one.labels,
        namespace_labels=SPACE.labels,
        service_account="",
        cluster="default",
    )


def fake_agent(pods: list[Pod], policies: list[dict[str, Any]]) -> Any:
    engine, table, cluster = PolicyEngine(), IpTable(), ClusterObjects(Path(tempfile.mkdtemp()))
    for number, known in reserved_labels().items():
        engine.identities.add(number, known)
    network = ip_network("198.51.100.0/24")
    engine.identities.add(IdentityId((1 << 24) + 7), cidr_labels(network), network)
    for index, one in enumerate(pods):
        cluster.pods[one.namespace, one.name] = one
        engine.identities.add(IdentityId(700 + index), labels(one))
        address = PodAddress(identity=IdentityId(700 + index), host="192.0.2.1", pod=f"{one.namespace}/{one.name}")
        table.set_pod(f"10.1.{index >> 8}.{index & 255}", address)
    for policy in policies:
        parsed = parse_object(policy)
        cluster.policies[parsed.key], cluster.documents[parsed.key] = parsed, policy
        engine.set_object(parsed)
    cluster.namespaces["", "shop"] = SPACE
    nodes = {}
    for name, address, local in (("n1", "192.0.2.1", True), ("n2", "192.0.2.2", False)):
        nodes[name] = NodeAddresses(
            name=name, addresses=(ip_address(address),), underlay=ip_address(address), local=local
        )
    table.set_nodes(nodes)
    config = SimpleNamespace(cluster_name="default", cluster_id=0, ipv4=True, ipv6=True)
    return SimpleNamespace(engine=engine, table=table, cluster=cluster, config=config)


@pytest.fixture
def agent() -> Any:
    return fake_agent([pod("web", "web"), pod("api", "api")], [POLICY])


def client(agent: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=Starlette(routes=policy_routes(agent)))
    return httpx.AsyncClient(transport=transport, base_url="http://agent")


async def ask(agent: Any, **question: Any) -> Any:
    async with client(agent) as http:
        answer = await http.post("/v1/policy/trace", content=json.dumps(question))
    return answer.status_code, answer.json()


async def test_a_trace_has_the_numbers_that_the_datapath_has(agent: Any) -> None:
    status, found = await ask(agent, src="198.51.100.9", dst="shop/api", port=80)
    assert (status, found["final"], found["source"]["identity"]) == (200, "allowed", (1 << 24) + 7)
    assert found["destination"]["identity"] == 701
    status, found = await ask(agent, src="10.1.0.0", dst="10.1.0.1", port=80)
    assert (found["final"], found["source"]["pod"], found["destination"]["pod"]) == ("denied", "shop/web", "shop/api")


async def test_groups_and_services_of_the_agent_count() -> None:
    rule = {"fromCIDRSet": [{"cidrGroupRef": "offices"}]}
    policy = {**POLICY, "spec": {"endpointSelector": {"matchLabels": {"app": "api"}}, "ingress": [rule]}}
    agent = fake_agent([pod("api", "api")], [policy])
    assert (await ask(agent, src="198.51.100.9", dst="shop/api", port=80))[1]["final"] == "denied"
    agent.engine.set_cidr_group(
        CidrGroup(name="offices", labels=frozenset(), networks=(ip_network("198.51.100.0/24"),))
    )
    assert (await ask(agent, src="198.51.100.9", dst="shop/api", port=80))[1]["final"] == "allowed"


async def test_this_node_is_the_host_of_its_pods(agent: Any) -> None:
    assert (await ask(agent, src="192.0.2.1", dst="shop/api", port=81))[1]["final"] == "allowed"
    assert (await ask(agent, src="192.0.2.2", dst="shop/api", port=81))[1]["final"] == "denied"


@pytest.mark.parametrize(
    ("question", "problem"),
    [({"src": "shop/webb"}, "did you mean shop/web?"), ({"src": "shop/web", "prt": 1}, "unknown field 'prt'")],
)
async def test_a_wrong_question_is_answered_with_what_is_wrong(
    agent: Any, question: dict[str, Any], problem: str
) -> None:
    status, found = await ask(agent, **({"dst": "shop/api", "port": 80} | question))
    assert status == 400
    assert problem in found["error"]
    async with client(agent) as http:
        assert (await http.post("/v1/policy/trace", content=b"nonsense")).status_code == 400


async def test_selectors_and_objects(agent: Any) -> None:
    async with client(agent) as http:
        rows = (await http.get("/v1/policy/selectors")).json()
        assert [(row["role"], row["identities"]) for row in rows] == [("subject", [701]), ("peer", [(1 << 24) + 7])]
        (only,) = (await http.get("/v1/policy/objects")).json()
        assert only["document"] == POLICY


async def test_the_loop_goes_on_while_a_long_question_is_answered() -> None:
    policies = [
        {**POLICY, "metadata": {"name": f"p{n}", "namespace": "shop"}} for n in range(300)
    ]  # each asked twice, with 4000 pods around
    agent = fake_agent([pod(f"p{n}", f"a{n}") for n in range(4000)] + [pod("api", "api")], policies)
    turns = 0

    async def watch() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.005)
            turns += 1

    async with client(agent) as http:
        watcher = asyncio.get_running_loop().create_task(watch())
        answer = await http.get("/v1/policy/selectors")
        watcher.cancel()
    assert len(answer.json()) == 600
    # an answer computed in the loop would leave it a turn or two; how long each takes is the machine's affair
    assert turns > 4


def test_a_snapshot_is_not_changed_by_what_comes_after(agent: Any) -> None:
    snapshot = Snapshot.of(agent)
    agent.cluster.pods.clear()
    agent.engine.remove_object(("CiliumNetworkPolicy", "shop", "api"))
    world = snapshot.world()
    assert set(world.pods) == {"shop/web", "shop/api"}
    assert len(world.objects) == 1
