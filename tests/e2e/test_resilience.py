"""The agent is not in the way of packets: killed, stopped, replaced, it costs no connection and opens no gap."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.lab import STRAYS, WORLD, Lab, pod, policy, wait_for

pytestmark = [pytest.mark.root, pytest.mark.lab]
CLIENTS_ONLY = policy("api", "api", ingress=[{"fromEndpoints": [{"matchLabels": {"app": "client"}}]}])
IN_USE = ("endpoints", "local_addrs", "ipcache", "identities", "policies", "policy_classes", "policy_rows", "listeners")


def without_strays(drops: dict[str, int]) -> dict[str, int]:
    """Leave out what other flows than the test's may add, and denials."""
    return {reason: n for reason, n in drops.items() if not reason.startswith("POLICY_DEN") and reason != STRAYS}


@pytest.mark.parametrize("version", [4, 6])
def test_killed_and_restarted_under_load(lab: Lab, version: int) -> None:
    lab.apply(CLIENTS_ONLY)
    api = lab.address("api", version)
    before = {node: without_strays(lab.drops(node)) for node in ("n1", "n2")}
    with lab.steady("near", api) as same, lab.steady("far", api) as across, lab.steady("far", WORLD[version]) as out:
        flows = (same, across, out)
        for flow in flows:
            flow.more()
        lab.run("agent", "stop", "--signal", "KILL")
        for flow in flows:
            flow.more()
        assert lab.reaches("far", api), "a new connection while no agent runs"
        assert lab.reaches("near", api)
        assert not lab.reaches("bad", api), "a denial while no agent runs"
        lab.run("agent", "start")
        for flow in flows:
            flow.more()
        lab.run("agent", "restart", "--signal", "KILL")
        for flow in flows:
            flow.more()
        outcomes = [flow.end() for flow in flows]
    assert [one["error"] for one in outcomes] == ["", "", ""]
    assert [one["retransmitted"] for one in outcomes] == [0, 0, 0]
    assert {node: without_strays(lab.drops(node)) for node in ("n1", "n2")} == before
    assert lab.reaches("far", api) and not lab.reaches("bad", api)


def test_a_denial_holds_at_every_moment_of_a_restart(lab: Lab) -> None:
    """A starting agent knows policies before identities, or the other way round: neither may open anything."""
    deny = policy(
        "api",
        "api",
        ingress=[{"fromEntities": ["cluster"]}],
        ingressDeny=[{"fromEndpoints": [{"matchLabels": {"app": "bad"}}]}],
    )
    lab.apply(deny)
    api = lab.address("api")
    with lab.attempts("bad", api) as attempts:
        attempts.more()
        for signal in ("TERM", "KILL", "KILL"):
            lab.run("agent", "restart", "--signal", signal)
            attempts.more()
        outcome = attempts.end()
    assert outcome["connected"] == 0, outcome
    assert outcome["answers"] > 100
    assert lab.reaches("far", api)


def test_a_policy_ends_established_connections_within_a_second(lab: Lab) -> None:
    api = lab.address("api")
    with lab.steady("bad", api) as bad, lab.steady("far", api) as good:
        bad.more()
        with ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(_stands_still, bad)
            applied = time.monotonic()
            lab.apply(CLIENTS_ONLY)
            assert stopped.result(30) - applied < 2.0  # the command itself takes most of it
        good.more()
        lab.delete(CLIENTS_ONLY)
        assert good.end()["error"] == ""


def _stands_still(flow: "object") -> float:
    """Return when the last answer came, once there have been none for two seconds."""
    last = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        while True:
            waiting = pool.submit(flow.line)  # type: ignore[attr-defined]
            try:
                waiting.result(2)
            except TimeoutError:
                flow._process.kill()  # type: ignore[attr-defined]
                return last
            last = time.monotonic()


def test_a_new_identity_that_a_rule_denies_is_denied_by_a_stopped_agent(lab: Lab) -> None:
    """The server's node never hears of the identity; its number in the tunnel header is unknown, not harmless."""
    deny = policy(
        "api",
        "api",
        ingress=[{"fromEntities": ["cluster"]}],
        ingressDeny=[{"fromEndpoints": [{"matchLabels": {"app": "evil"}}]}],
    )
    lab.apply(deny)
    api = lab.address("api")
    assert lab.reaches("far", api)
    lab.run("agent", "stop", "n2")
    evil = pod("evil", "n1", "evil")
    try:
        lab.run("apply", "-f", lab.file(evil), check=False)
        wait_for(lambda: "evil" in lab.pods(), "the pod is there")
        assert lab.reaches("evil", WORLD[4]), "its network works"
        assert not lab.reaches("evil", api)
        assert lab.reaches("far", api)
    finally:
        lab.run("agent", "start")
    assert not lab.reaches("evil", api)
    lab.delete(evil)


def test_pods_leave_nothing_behind(lab: Lab) -> None:
    lab.apply(CLIENTS_ONLY)
    quiet = {node: {name: rows for name, rows in lab.tables(node).items() if name in IN_USE} for node in ("n1", "n2")}
    store = lab.api("n1", "/v1/identities")
    many = [pod(f"p{index}", f"n{1 + index % 2}", f"app-{index % 7}") for index in range(60)]
    for _ in range(2):
        lab.apply(*many)
        assert not lab.reaches("p0", lab.address("api"))
        assert lab.reaches("p1", lab.address("p0"), 1) is False  # a closed port: it answers with a reset
        freed = {lab.address(f"p{index}") for index in range(4)}
        lab.delete(*many)
        for node, rows in quiet.items():
            wait_for(
                lambda n=node, r=rows: {k: v for k, v in lab.tables(n).items() if k in IN_USE} == r, f"{node} as it was"
            )
            named = {one[end] for one in lab.api(node, "/v1/bpf/ct") for end in ("source", "destination")}
            named |= {one[end] for one in lab.api(node, "/v1/bpf/nat") for end in ("inner", "to")}
            assert not named & freed
    assert [one["id"] for one in lab.api("n1", "/v1/identities")] == [one["id"] for one in store]
