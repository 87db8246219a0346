"""The border is checked once: a document that is not what it should be is refused with the place named."""

import msgspec
import pytest

from ciliate.proxy.api import InvalidRequestError, PutRulesets, RulesetSpec, decode_put


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (b"{}", "rulesets"),
        (b'{"rulesets":[{"id":0}]}', "id"),
        (b'{"rulesets":[{"id":1},{"id":1}]}', "rule set 1 is there twice"),
        (b'{"rulesets":[{"id":1,"htpp":[]}]}', "htpp"),
        (b'{"rulesets":[{"id":1,"http":[{"headers":[["a b",null]]}]}]}', r"rule set 1: http\[0\]\.headers: 'a b'"),
        (b'{"rulesets":[{"id":1,"http":[{"headers":[["",null]]}]}]}', "headers: ''"),
    ],
)
def test_a_document_that_is_wrong_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        decode_put(body)


def test_more_rule_sets_than_the_datapath_knows_are_refused() -> None:
    put = PutRulesets(rulesets=tuple(RulesetSpec(id=number) for number in range(1, 16386)))
    with pytest.raises(InvalidRequestError, match="at most 16384"):
        decode_put(msgspec.json.encode(put))


def test_a_document_comes_back_as_it_was_sent() -> None:
    put = PutRulesets(rulesets=(RulesetSpec(id=3, allow_all=True),), prune=False)
    assert decode_put(msgspec.json.encode(put)) == put
