"""From changes of policies and identities to the maps: every state in between is the old verdict or the new one."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.datapath.btf import Btf
from ciliate.datapath.build import OBJECT
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.model import Answer, PolicyModel
from ciliate.datapath.policy import Desired
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, scope_of
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import PolicyImage, RowVerdict
from tests.datapath.memory import Kernel
from tests.policy.test_engine_changes import STEPS, SUBJECTS, do

PEERS = [IdentityId(n) for n in (1, 2, 6, 300, 301, 302, (1 << 16) | 300, (1 << 24) + 1, (1 << 24) + 2, (2 << 24) + 1)]
POINTS = [(6, 80), (6, 81), (6, 443), (17, 53), (1, 8)]
Verdicts = dict[tuple[int, int, IdentityId, int, int], str]


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.from_elf(OBJECT)


def said(image: PolicyImage | None, identity: IdentityId, known: bool, protocol: int, port: int) -> str:
    if image is None:
        return "ALLOW"
    row = image.lookup(identity, scope_of(identity), protocol, port, known=known or identity < ALLOCATED_MIN)
    return "DENY" if row is None else row.verdict.name


def wanted(desired: Desired, known: set[IdentityId]) -> Verdicts:
    return {
        (endpoint, direction, identity, protocol, port): said(image, identity, identity in known, protocol, port)
        for endpoint, pair in desired.items()
        for direction, image in enumerate(pair)
        for identity in PEERS
        for protocol, port in POINTS
    }


def actual(kernel: Kernel) -> Verdicts:
    model = PolicyModel(kernel.tables)
    seen: dict[tuple[int, int, int, int], Answer] = {}
    found = {}
    for row in kernel.tables["endpoints"].dump()[1]:
        for direction in (0, 1):
            for identity in PEERS:
                for protocol, port in POINTS:
                    key = (int(row["policy"][direction]), int(identity), protocol, port)
                    if key not in seen:
                        seen[key] = model.lookup(*key)
                    found[int(row["id"]), direction, identity, protocol, port] = RowVerdict(seen[key].verdict).name
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=1, max_size=12), every=st.integers(1, 3))
def test_every_state_between_two_resolutions_is_old_or_new(
    btf: Btf, steps: list[tuple[str, Any, Any]], every: int
) -> None:
    engine, kernel = PolicyEngine(), Kernel(btf)
    for number in range(1, len(SUBJECTS) + 1):
        kernel.endpoints.upsert(
            EndpointRow(id=EndpointId(number), identity=900, ifindex=number, mac=bytes(6), gw_mac=bytes(6), mtu=1500)
        )
    desired: Desired = {EndpointId(n + 1): engine.resolve(*one) for n, one in enumerate(SUBJECTS)}
    kernel.policy.apply(desired, list(engine.identities.rows), complete=True)
    version = engine.identities.version
    for start in range(0, len(steps), every):
        for step in steps[start : start + every]:
            do(engine, *step)
        old_known = set(kernel.tables["identities"].dump()[0].tolist())
        known = set(engine.identities.rows)
        fresh: Desired = {EndpointId(n + 1): engine.resolve(*one) for n, one in enumerate(SUBJECTS)}
        # Old or new policy, and an identity that is known already, or not yet, or no more.
        allowed = [wanted(policies, who) for policies in (desired, fresh) for who in (old_known, known)]

        def look(allowed: list[Verdicts] = allowed) -> None:
            for key, verdict in actual(kernel).items():
                assert verdict in {one[key] for one in allowed}, key

        kernel.observe(look)
        change = engine.identities.changes(version)
        assert change is not None
        kernel.policy.apply(fresh, change, complete=True)
        kernel.policy.collect()
        kernel.observe(lambda: None)
        desired, version = fresh, engine.identities.version
        assert actual(kernel) == wanted(desired, known)
    used = {name: rows for name, (rows, _) in kernel.policy.usage().items() if rows}
    assert used == {name: rows for name, rows in kernel.sizes().items() if name in used}
