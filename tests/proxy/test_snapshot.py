"""What is kept on disk."""

from pathlib import Path

import pytest

from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.snapshot import Kept, Snapshot, SnapshotError, load, save

KEPT = Snapshot(rulesets=(Kept(port=10005, spec=RulesetSpec(id=5, http=(HttpRuleSpec(path="/a", rule="r"),))),))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rulesets.json"
    assert load(path) == Snapshot()
    save(path, KEPT)
    assert load(path) == KEPT
    assert KEPT.ports() == {5: 10005}
    assert [one.name for one in tmp_path.iterdir()] == ["rulesets.json"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version":2}', b'{"rulesets":[{"port":1}]}'])
def test_a_file_that_cannot_be_used_is_set_aside_and_reported(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "rulesets.json"
    path.write_bytes(text)
    with pytest.raises(SnapshotError, match=r"rulesets\.bad"):
        load(path)
    assert (tmp_path / "rulesets.bad").read_bytes() == text
    assert load(path) == Snapshot()
