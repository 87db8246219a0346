"""Policies reach the maps whole: every state in between gives the old verdict or the new one."""

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.datapath.btf import Btf
from ciliate.datapath.endpoints import PENDING_POLICY, EndpointId, EndpointRow
from ciliate.datapath.model import Answer, PolicyModel
from ciliate.datapath.policy import DENY_POLICY, Desired
from ciliate.datapath.rule_ids import RuleIds
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Scope, scope_of
from ciliate.identity.selectors import IdentityChange
from ciliate.policy.image import (
    ClassRows,
    Direction,
    PolicyImage,
    PortPrefix,
    Row,
    RowVerdict,
    RuleRef,
    RuleSet,
)
from ciliate.policy.l7 import HttpRule

from .memory import Kernel

IDENTITIES = [IdentityId(n) for n in (1, 2, 6, 300, 301, 302, (1 << 16) | 300, (1 << 24) | 1, (2 << 24) | 1)]
PROBES = [(6, 80), (6, 81), (6, 443), (17, 53), (1, 8), (132, 9)]


def ref(name: str, section: str = "ingress", index: int = 0) -> RuleRef:
    return RuleRef(kind="CiliumNetworkPolicy", namespace="default", name=name, section=section, index=index)


def row(
    protocol: int, port: int, bits: int, verdict: RowVerdict, name: str = "p", ruleset: RuleSet | None = None
) -> Row:
    return Row(
        key=PortPrefix(protocol=protocol, port=port, bits=bits), verdict=verdict, rules=(ref(name),), ruleset=ruleset
    )


def naive_rows(rows: ClassRows, protocol: int, port: int) -> Row | None:
    """Longest prefix by looking at every row."""
    best: tuple[int, Row] | None = None
    for one in rows:
        key = one.key
        if key.protocol and key.protocol != protocol:
            continue
        if key.bits and key.port >> (16 - key.bits) != port >> (16 - key.bits):
            continue
        rank = 0 if not key.protocol else 1 + key.bits
        if best is None or rank > best[0]:
            best = (rank, one)
    return best[1] if best else None


def naive(
    image: PolicyImage | None, identity: IdentityId, known: bool, protocol: int, port: int
) -> tuple[RowVerdict, tuple[RuleRef, ...]]:
    """The verdict and the rules behind it, from the image itself."""
    if image is None:
        return RowVerdict.ALLOW, ()
    scope = scope_of(identity)
    table = image.defaults if known or identity < ALLOCATED_MIN else image.unknown
    hit = naive_rows(image.members.get(identity, ()), protocol, port) or naive_rows(
        table.get(scope, ()), protocol, port
    )
    return (hit.verdict, hit.rules) if hit else (RowVerdict.DENY, image.default_rules)


# ---- generated images ---------------------------------------------------------------------------------------

_ruleset = RuleSet(rules=((HttpRule(method="GET"), ref("l7")),), provenance="default/l7:80")
_keys = st.sampled_from(
    [(0, 0, 0), (6, 0, 0), (17, 0, 0), (6, 80, 16), (6, 80, 15), (6, 443, 16), (17, 53, 16), (1, 8, 16), (6, 0, 4)]
)


@st.composite
def class_rows(draw: st.DrawFn) -> ClassRows:
    keys = draw(st.lists(_keys, unique=True, max_size=3))
    rows = []
    for key in sorted(keys):
        verdict = draw(st.sampled_from(RowVerdict))
        name = draw(st.sampled_from(["a", "b"]))
        ruleset = _ruleset if verdict is RowVerdict.REDIRECT else None
        rows.append(row(*key, verdict, name, ruleset))
    return tuple(rows)


@st.composite
def images(draw: st.DrawFn) -> PolicyImage | None:
    if draw(st.integers(0, 5)) == 0:
        return None
    return PolicyImage(
        direction=Direction.INGRESS,
        defaults=draw(st.dictionaries(st.sampled_from(Scope), class_rows(), max_size=3)),
        unknown=draw(st.dictionaries(st.sampled_from(Scope), class_rows(), max_size=2)),
        members=draw(st.dictionaries(st.sampled_from(IDENTITIES), class_rows(), max_size=4)),
        default_rules=(ref(draw(st.sampled_from(["x", "y"])), "default", -1),),
    )


_states = st.tuples(
    st.lists(st.tuples(images(), images()), min_size=3, max_size=3),
    st.sets(st.sampled_from([i for i in IDENTITIES if i >= ALLOCATED_MIN])),
)


def similar(
    state: tuple[list[tuple[PolicyImage | None, PolicyImage | None]], set[IdentityId]],
) -> st.SearchStrategy[object]:
    """Members or defaults changed alone, as real changes mostly are."""
    pairs, known = state

    @st.composite
    def build(draw: st.DrawFn) -> object:
        fresh = []
        for pair in pairs:
            new = []
            for image in pair:
                if image is not None:
                    what = draw(st.sampled_from(["same", "members", "defaults"]))
                    if what == "members":
                        changed = {**image.members, draw(st.sampled_from(IDENTITIES)): draw(class_rows())}
                        for gone in draw(st.sets(st.sampled_from(IDENTITIES), max_size=1)):
                            changed.pop(gone, None)
                        image = replace(image, members=changed)
                    elif what == "defaults":
                        image = replace(image, defaults={**image.defaults, Scope.CLUSTER: draw(class_rows())})
                new.append(image)
            fresh.append(tuple(new))
        return fresh, draw(st.sampled_from([known, known | {IDENTITIES[3]}, known - {IDENTITIES[3]}]))

    return build()


def endpoint_row(number: int) -> EndpointRow:
    return EndpointRow(
        id=EndpointId(number),
        identity=1000 + number,
        ifindex=10 + number,
        mac=bytes(6),
        gw_mac=bytes(6),
        v4=IPv4Address(f"10.0.0.{number}"),
        mtu=1450,
    )


def answers(
    kernel: Kernel,
) -> dict[tuple[EndpointId, int, IdentityId, int, int], tuple[RowVerdict, tuple[RuleRef, ...]]]:
    model = PolicyModel(kernel.tables)
    found = {}
    seen: dict[tuple[int, IdentityId, int, int], Answer] = {}
    _, rows = kernel.tables["endpoints"].dump()
    for one in rows:
        for direction in (0, 1):
            for identity in IDENTITIES:
                for protocol, port in PROBES:
                    policy = int(one["policy"][direction])
                    key = (policy, identity, protocol, port)
                    if key not in seen:
                        seen[key] = model.lookup(*key)
                    answer = seen[key]
                    found[EndpointId(int(one["id"])), direction, identity, protocol, port] = (
                        answer.verdict,
                        kernel.ids.explain(answer.rule),
                    )
    return found


def desired_of(pairs: list[tuple[PolicyImage | None, PolicyImage | None]]) -> Desired:
    return {EndpointId(n + 1): pair for n, pair in enumerate(pairs)}


def check_now(kernel: Kernel, desired: Desired, known: set[IdentityId]) -> None:
    for (endpoint, direction, identity, protocol, port), got in answers(kernel).items():
        want = naive(desired[endpoint][direction], identity, identity in known, protocol, port)
        assert got == want, (endpoint, direction, identity, protocol, port)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_every_state_in_between_is_old_or_new(btf: Btf, data: st.DataObject) -> None:
    kernel = Kernel(btf)
    for number in (1, 2, 3):
        kernel.endpoints.upsert(endpoint_row(number))
    old_pairs, old_known = state = data.draw(_states)
    kernel.policy.apply(desired_of(old_pairs), old_known, complete=True)
    check_now(kernel, desired_of(old_pairs), old_known)
    for _ in range(2):
        new_pairs, new_known = data.draw(st.one_of(_states, similar(state)))  # type: ignore[arg-type]
        old, new = desired_of(old_pairs), desired_of(new_pairs)

        def look(
            old: Desired = old,
            new: Desired = new,
            before: set[IdentityId] = old_known,
            after: set[IdentityId] = new_known,
        ) -> None:
            for (endpoint, direction, identity, protocol, port), got in answers(kernel).items():
                allowed = {
                    naive(image, identity, known, protocol, port)
                    for image in (old[endpoint][direction], new[endpoint][direction])
                    for known in {identity in before, identity in after}
                }
                assert got in allowed, (endpoint, direction, identity, protocol, port)

        epoch = kernel.epoch.value
        before = kernel.writes()
        kernel.observe(look)
        report = kernel.policy.apply(new, new_known, complete=True)
        kernel.observe(lambda: None)
        check_now(kernel, new, new_known)
        assert (report.epoch > epoch) == (kernel.writes() > before)
        kernel.observe(lambda new=new, known=new_known: check_now(kernel, new, known))
        kernel.policy.collect()
        kernel.observe(lambda: None)
        old_pairs, old_known = state = new_pairs, new_known
    # A second agent finds everything as it should be and writes nothing.
    kernel.restart(kernel.ids)
    before = kernel.writes()
    kernel.policy.apply(desired_of(old_pairs), old_known, complete=True)
    assert kernel.writes() == before
    # Without endpoints nothing is left but the policy that denies.
    for number in (1, 2, 3):
        kernel.endpoints.remove(EndpointId(number))
    kernel.policy.apply({}, (), complete=True)
    kernel.policy.collect()
    assert kernel.sizes() == {"epoch": 1, "policies": 1}


# ---- examples -----------------------------------------------------------------------------------------------


def image(members: Mapping[int, ClassRows] | None = None, **fields: object) -> PolicyImage:
    defaults = {
        "direction": Direction.INGRESS,
        "members": {IdentityId(k): v for k, v in (members or {}).items()},
        "default_rules": (ref("d", "default", -1),),
    }
    return PolicyImage(**(defaults | fields))  # type: ignore[arg-type]


WEB = (row(6, 80, 16, RowVerdict.ALLOW),)
DNS = (row(17, 53, 16, RowVerdict.ALLOW),)


def test_new_endpoint_is_closed_until_its_policy_is_there(btf: Btf) -> None:
    kernel = Kernel(btf)
    kernel.endpoints.upsert(endpoint_row(1))
    assert kernel.endpoints.policies() == {1: (PENDING_POLICY, PENDING_POLICY)}
    assert PolicyModel(kernel.tables).lookup(PENDING_POLICY, 300, 6, 80).reason == 165
    kernel.policy.apply({EndpointId(1): (None, None)}, (), complete=True)
    assert kernel.endpoints.policies() == {1: (0, 0)}


def test_equal_policies_share_rows(btf: Btf) -> None:
    kernel = Kernel(btf)
    for number in range(1, 101):
        kernel.endpoints.upsert(endpoint_row(number))
    desired = {EndpointId(n): (None, image({300: WEB, 301: (replace(WEB[0]),)})) for n in range(1, 101)}
    kernel.policy.apply(desired, [IdentityId(300), IdentityId(301)], complete=True)
    assert kernel.sizes()["policies"] == 2
    assert kernel.sizes()["policy_rows"] == 1
    assert kernel.sizes()["policy_classes"] == 2
    (rule,) = WEB[0].rules
    assert kernel.policy.rows_of_policies() == {(rule.kind, rule.namespace, rule.name): 1}


def test_one_more_identity_is_one_row(btf: Btf) -> None:
    kernel = Kernel(btf)
    for number in range(1, 11):
        kernel.endpoints.upsert(endpoint_row(number))
    members = {300 + n: WEB for n in range(50)}
    first = {EndpointId(n): (None, image(members)) for n in range(1, 11)}
    kernel.policy.apply(first, [], complete=True)
    before = kernel.writes()
    second = {EndpointId(n): (None, image({**members, 400: WEB})) for n in range(1, 11)}
    report = kernel.policy.apply(second, [IdentityId(400)], complete=True)
    # the member, the identity, the epoch
    assert kernel.writes() - before == 3
    assert not report.alarms
    assert kernel.policy.collect() == 0


def test_one_policy_changes_only_its_own_rows(btf: Btf) -> None:
    kernel = Kernel(btf)
    for number in range(1, 51):
        kernel.endpoints.upsert(endpoint_row(number))
    desired = {EndpointId(n): (None, image({300 + n: WEB})) for n in range(1, 51)}
    kernel.policy.apply(desired, [], complete=True)
    before = kernel.writes()
    kernel.policy.apply({**desired, EndpointId(7): (None, image({307: DNS}))}, [], complete=True)
    assert kernel.writes() - before <= 4


def test_what_does_not_fit_is_denied_and_named(btf: Btf) -> None:
    kernel = Kernel(btf, policy_classes=10)
    for number in (1, 2):
        kernel.endpoints.upsert(endpoint_row(number))
    small = image({300: WEB})
    large = image({300 + n: DNS for n in range(20)})
    report = kernel.policy.apply(
        {EndpointId(1): (None, small), EndpointId(2): (small, large)}, [IdentityId(300)], complete=True
    )
    assert [(a.endpoint, a.direction, a.map, a.needed) for a in report.alarms] == [
        (2, Direction.INGRESS, "policy_classes", 20)
    ]
    assert "endpoint 2: the ingress policy needs 20 rows of map policy_classes, 9 are free" in str(report.alarms[0])
    one, two = (kernel.endpoints.policies()[EndpointId(n)] for n in (1, 2))
    assert two == (one[1], DENY_POLICY)
    model = PolicyModel(kernel.tables)
    assert model.lookup(DENY_POLICY, 1, 17, 53).verdict is RowVerdict.DENY
    assert model.lookup(one[1], 300, 6, 80).verdict is RowVerdict.ALLOW
    # It fits once there is room.
    again = kernel.policy.apply({EndpointId(2): (None, image({300: DNS}))}, [IdentityId(300)], complete=True)
    assert not again.alarms


def test_room_is_made_before_an_alarm(btf: Btf) -> None:
    kernel = Kernel(btf, policy_classes=10)
    kernel.endpoints.upsert(endpoint_row(1))
    for shift in range(5):
        rows = WEB if shift % 2 else DNS
        fresh = image(
            {1000 * shift + 300 + n: rows for n in range(8)}, default_rules=(ref(f"d{shift}", "default", -1),)
        )
        report = kernel.policy.apply({EndpointId(1): (None, fresh)}, [], complete=True)
        if shift:
            # Old and new do not fit side by side: deny first, then there is room.
            report = kernel.policy.apply({EndpointId(1): (None, fresh)}, [], complete=True)
        assert not report.alarms


def test_nothing_is_removed_before_all_sources_reported(btf: Btf) -> None:
    kernel = Kernel(btf)
    for number in (1, 2):
        kernel.endpoints.upsert(endpoint_row(number))
    both = {EndpointId(n): (None, image({300: WEB})) for n in (1, 2)}
    kernel.policy.apply(both, [IdentityId(300)], complete=True)
    before = kernel.endpoints.policies()
    kernel.policy.apply({EndpointId(1): both[EndpointId(1)]}, [], complete=False)
    kernel.policy.collect()
    assert kernel.endpoints.policies() == before
    assert kernel.sizes()["identities"] == 1


def test_identities_come_and_go_as_a_change(btf: Btf) -> None:
    kernel = Kernel(btf, identities=3)

    def known() -> set[int]:
        return set(kernel.tables["identities"].dump()[0].tolist())

    first = kernel.policy.apply({}, [IdentityId(n) for n in (1, 300, 301)], complete=True)
    assert known() == {300, 301} and not first.identities_over
    kernel.policy.apply(
        {}, IdentityChange(added=(IdentityId(302), IdentityId(2)), removed=(IdentityId(300),)), complete=True
    )
    assert known() == {301, 302}
    over = kernel.policy.apply({}, IdentityChange(added=(IdentityId(303), IdentityId(304))), complete=True)
    assert known() == {301, 302, 303} and over.identities_over == 1
    again = kernel.policy.apply({}, IdentityChange(removed=(IdentityId(301),)), complete=True)
    assert known() == {302, 303, 304} and not again.identities_over
    before = kernel.writes()
    kernel.policy.apply({}, IdentityChange(added=(IdentityId(304),), removed=(IdentityId(999),)), complete=True)
    assert kernel.writes() == before


def test_what_was_written_before_an_error_is_known_afterwards(btf: Btf) -> None:
    """The kernel refuses a write, whichever: the next attempt makes everything right, and leaves nothing behind."""
    new = {EndpointId(1): (image({300: DNS, 301: WEB}), image({300: DNS}))}
    for stop in range(1, 30):
        kernel = Kernel(btf)
        kernel.endpoints.upsert(endpoint_row(1))
        kernel.policy.apply({EndpointId(1): (None, image({300: WEB, 302: WEB}))}, [IdentityId(302)], complete=True)
        left = [stop]

        def refuse(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError("the kernel says no")

        kernel.observe(refuse)
        try:
            kernel.policy.apply(new, [IdentityId(300)], complete=True)
        except OSError:
            failed = True
        else:
            failed = False
        kernel.observe(lambda: None)
        kernel.policy.apply(new, [IdentityId(300)], complete=True)
        check_now(kernel, new, {IdentityId(300)})
        kernel.policy.collect()
        check_now(kernel, new, {IdentityId(300)})
        used = {name: rows for name, (rows, _) in kernel.policy.usage().items() if rows}
        assert used == {name: rows for name, rows in kernel.sizes().items() if name in used}
        if not failed:
            break
    assert stop > 8


def test_what_has_not_changed_is_not_looked_at(btf: Btf) -> None:
    kernel = Kernel(btf)
    for number in (1, 2):
        kernel.endpoints.upsert(endpoint_row(number))
    pairs = {EndpointId(n): (None, image({300 + n: WEB})) for n in (1, 2)}
    kernel.policy.apply(pairs, [], complete=True)
    before = kernel.writes()
    kernel.policy.apply(dict(pairs), [], complete=True)
    assert kernel.writes() == before
    # But an endpoint whose policies are not what was written is.
    kernel.endpoints.set_policy(EndpointId(1), 7, 7)
    kernel.policy.apply(dict(pairs), [], complete=True)
    check_now(kernel, pairs, set())


def test_crash_while_building_beside_leaves_garbage_that_is_collected(btf: Btf, tmp_path: Path) -> None:
    ids = RuleIds(tmp_path / "rules.json")
    kernel = Kernel(btf, ids)
    kernel.endpoints.upsert(endpoint_row(1))
    kernel.policy.apply({EndpointId(1): (None, image({300: WEB}))}, [], complete=True)
    whole = {name: dict(t.content) for name, t in kernel.tables.items()}

    class Killed(Exception):
        pass

    writes = 0
    new = image({300: DNS, 301: WEB}, default_rules=(ref("other", "default", -1),))
    for stop in range(1, 20):
        for name, content in whole.items():
            kernel.tables[name].content = dict(content)
        kernel.observe(lambda: None)
        kernel.restart(RuleIds(tmp_path / "rules.json"))
        writes = 0

        def count(stop: int = stop) -> None:
            nonlocal writes
            writes += 1
            if writes == stop:
                raise Killed

        kernel.observe(count)
        try:
            kernel.policy.apply({EndpointId(1): (None, new)}, [], complete=True)
        except Killed:
            done = False
        else:
            done = True
        kernel.observe(lambda: None)
        kernel.restart(RuleIds(tmp_path / "rules.json"))
        kernel.policy.apply({EndpointId(1): (None, new)}, [], complete=True)
        kernel.policy.collect()
        check_now(kernel, {EndpointId(1): (None, new)}, set())
        assert {k: v for k, v in kernel.sizes().items() if k.startswith("polic")} == {
            "policies": 2,
            "policy_classes": 2,
            "policy_rows": 2,
        }
        if done:
            break
    assert writes > 4


def test_rules_are_explained_after_a_restart(btf: Btf, tmp_path: Path) -> None:
    kernel = Kernel(btf, RuleIds(tmp_path / "rules.json"))
    kernel.endpoints.upsert(endpoint_row(1))
    rules = (row(6, 80, 16, RowVerdict.REDIRECT, "l7", _ruleset),)
    kernel.policy.apply({EndpointId(1): (None, image({300: rules}))}, [], complete=True)
    policy = kernel.endpoints.policies()[EndpointId(1)][1]
    answer = PolicyModel(kernel.tables).lookup(policy, 300, 6, 80)
    assert kernel.policy.rulesets == {answer.l7: _ruleset}
    fresh = RuleIds(tmp_path / "rules.json")
    assert fresh.explain(answer.rule) == (ref("l7"),)
    kernel.restart(fresh)
    edited = RuleSet(rules=((HttpRule(method="POST"), ref("l7")),), provenance=_ruleset.provenance)
    before = kernel.writes()
    changed = (replace(rules[0], ruleset=edited),)
    kernel.policy.apply({EndpointId(1): (None, image({300: changed}))}, [], complete=True)
    assert kernel.writes() == before  # the same rule set id: only the proxy's rules change
    assert kernel.policy.rulesets == {answer.l7: edited}


def test_a_lost_file_gives_new_numbers_never_old_ones(btf: Btf, tmp_path: Path) -> None:
    kernel = Kernel(btf, RuleIds(tmp_path / "rules.json"))
    kernel.endpoints.upsert(endpoint_row(1))
    kernel.policy.apply({EndpointId(1): (None, image({300: WEB}))}, [], complete=True)
    old = {int(v["rule"]) for v in kernel.tables["policy_rows"].dump()[1]}
    (tmp_path / "rules.json").write_text("{broken")
    kernel.restart(RuleIds(tmp_path / "rules.json"))
    kernel.policy.apply({EndpointId(1): (None, image({300: WEB}))}, [], complete=True)
    kernel.policy.collect()
    new = {int(v["rule"]) for v in kernel.tables["policy_rows"].dump()[1]}
    assert not old & new
    assert kernel.ids.explain(new.pop()) == (ref("p"),)
    assert (tmp_path / "rules.bad").exists()


def test_rule_sets_of_one_name_and_different_content_stay_apart(btf: Btf) -> None:
    kernel = Kernel(btf)
    other = RuleSet(rules=((HttpRule(method="PUT"), ref("l7")),), provenance=_ruleset.provenance)
    desired = {}
    for number, ruleset in ((1, _ruleset), (2, other)):
        kernel.endpoints.upsert(endpoint_row(number))
        rules = (row(6, 80, 16, RowVerdict.REDIRECT, "l7", ruleset),)
        desired[EndpointId(number)] = (None, image({300: rules}))
    kernel.policy.apply(desired, [], complete=True)
    assert sorted(kernel.policy.rulesets.values(), key=repr) == sorted([_ruleset, other], key=repr)


def test_redirect_without_rule_set_is_a_bug(btf: Btf) -> None:
    kernel = Kernel(btf)
    kernel.endpoints.upsert(endpoint_row(1))
    with pytest.raises(ValueError, match="rule set"):
        kernel.policy.apply(
            {EndpointId(1): (None, image({300: (row(6, 80, 16, RowVerdict.REDIRECT),)}))}, [], complete=True
        )
