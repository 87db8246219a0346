"""Rule sets become resources: what changes with what."""

from ciliate.proxy import _pb as pb
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.compile import (
    ProxyOptions,
    compile_denial,
    compile_listener,
    compile_rules,
    policy_name,
    rule_of_policy,
)


def rbac(spec: RulesetSpec) -> pb.Message:
    config = pb.TypedExtensionConfig.FromString(compile_rules(spec).body.value)
    return pb.RBAC.FromString(config.typed_config.value).rules


def test_a_listener_does_not_depend_on_the_rules_so_that_a_change_of_them_cuts_nothing() -> None:
    one, two = (compile_listener(7, 10007, ProxyOptions()) for _ in range(2))
    assert one == two
    assert compile_listener(7, 10008, ProxyOptions()).version != one.version


def test_equal_rules_have_equal_versions_and_other_rules_another() -> None:
    def spec(path: str) -> RulesetSpec:
        return RulesetSpec(id=1, http=(HttpRuleSpec(path=path),))

    assert compile_rules(spec("/a")) == compile_rules(spec("/a"))
    assert compile_rules(spec("/a")).version != compile_rules(spec("/b")).version


def test_each_rule_is_a_policy_that_carries_its_text() -> None:
    rules = rbac(RulesetSpec(id=1, http=(HttpRuleSpec(path="/a", rule="x|y"), HttpRuleSpec(rule="x|y"))))
    assert sorted(rules.policies) == [policy_name(0, "x|y"), policy_name(1, "x|y")]
    assert {rule_of_policy(name) for name in rules.policies} == {"x|y"}
    assert rules.action == pb.RBACRules.ALLOW


def test_every_given_field_must_match() -> None:
    spec = HttpRuleSpec(method="GET", path="/a", host="h", headers=(("X-A", "1"), ("X-B", None)))
    (policy,) = rbac(RulesetSpec(id=1, http=(spec,))).policies.values()
    conditions = policy.permissions[0].and_rules.rules
    assert [one.header.name for one in conditions] == [":method", ":path", ":authority", "x-a", "x-b"]
    assert conditions[3].header.string_match.exact == "1"
    assert conditions[4].header.present_match


def test_a_rule_without_conditions_and_allow_all_match_anything() -> None:
    for spec in (RulesetSpec(id=1, http=(HttpRuleSpec(),)), RulesetSpec(id=1, allow_all=True)):
        (policy,) = rbac(spec).policies.values()
        assert [one.any for one in policy.permissions] == [True]


def test_no_rules_and_the_fallback_allow_nothing() -> None:
    assert not rbac(RulesetSpec(id=1)).policies
    assert compile_rules(RulesetSpec(id=1)) == compile_denial(1)


def test_a_listener_listens_on_the_loopback_addresses_only_and_keeps_both_addresses() -> None:
    made = pb.Listener.FromString(compile_listener(1, 10001, ProxyOptions()).body.value)
    addresses = [made.address, *(one.address for one in made.additional_addresses)]
    assert [one.socket_address.address for one in addresses] == ["127.0.0.1", "::1"]
    assert {one.socket_address.port_value for one in addresses} == {10001}
    assert made.transparent.value
    assert [one.name.rpartition(".")[2] for one in made.listener_filters] == ["original_dst", "original_src"]
    assert made.filter_chains[0].filters[0].name == "envoy.filters.network.rbac", "what was not redirected is refused"
