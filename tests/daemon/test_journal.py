"""The journal of last valid objects: what it gives back after a restart, whatever happened to its file."""

from pathlib import Path
from typing import Any

import pytest

from ciliate.daemon import journal
from ciliate.daemon.journal import Journal, Key

A: Key = ("Service", "shop", "a")
B: Key = ("Service", "shop", "b")


def document(text: str = "x") -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": "a"}, "text": text}


def test_the_last_form_comes_back_until_objects_have_been_learned(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path)
    for text in ("one", "two", "two"):
        first.keep(A, document(text))
    first.keep(B, document())
    first.forget(B)
    first.write()
    assert path.read_bytes().count(b"two") == 1
    second = Journal(path)
    assert second.get(A) == document("two")
    assert second.others(set()) == [(A, document("two"))]
    assert second.others({A}) == []
    assert second.get(B) is None
    second.settle()
    assert second.get(A) is None
    assert Journal(path).get(A) == document("two")


def test_what_nothing_names_is_pruned_and_an_empty_journal_has_no_file(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path)
    first.write()
    assert not path.exists()
    first.keep(A, document())
    first.keep(B, document())
    first.write()
    second = Journal(path)
    second.prune({B})
    second.write()
    third = Journal(path)
    assert (third.get(A), third.get(B)) == (None, document())
    third.prune(set())
    third.write()
    assert not list(tmp_path.iterdir())


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path)
    first.keep(A, document())
    first.keep(B, document())
    first.write()
    path.write_bytes(path.read_bytes()[:-10])
    second = Journal(path)
    assert (second.get(A), second.get(B)) == (document(), None)
    second.keep(B, document("again"))
    second.write()
    third = Journal(path)
    assert (third.get(A), third.get(B)) == (document(), document("again"))


def test_outdated_lines_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_SLACK", 1000)
    path = tmp_path / "journal"
    one = Journal(path)
    one.keep(B, document("stays"))
    for number in range(500):
        one.keep(A, document(f"{number}"))
        one.write()
    assert path.stat().st_size < 2000
    again = Journal(path)
    assert (again.get(A), again.get(B)) == (document("499"), document("stays"))


def test_what_json_cannot_say_is_not_kept_and_what_was_kept_is_forgotten(tmp_path: Path) -> None:
    one = Journal(tmp_path / "journal")
    one.keep(A, document())
    one.keep(A, document() | {"odd": {None: 1}})
    one.write()
    assert Journal(tmp_path / "journal").get(A) is None
