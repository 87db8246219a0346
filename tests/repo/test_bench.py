"""The benchmark's arithmetic and the form of its results."""

import json
from pathlib import Path

import pytest
from bench import __main__ as command
from bench import report


def test_ratio_above_one_is_better_whatever_the_unit() -> None:
    faster = report.compare("a", [20, 22, 21], [10, 11, 10], peer_name="p", unit="Gbit/s", at_least=1)
    sooner = report.compare("b", [10, 11, 10], [20, 22, 21], peer_name="p", unit="us", lower_is_better=True, at_least=1)
    assert faster.ratio == sooner.ratio == pytest.approx(2, rel=0.06)
    assert faster.met is sooner.met is True
    slower = report.compare("c", [10, 11, 10], [20, 22, 21], peer_name="p", unit="1/s", at_least=1)
    assert slower.met is False


def test_wide_interval_does_not_meet_a_goal_with_confidence() -> None:
    ours = [100.0, 60, 101, 62, 100, 99, 61]
    row = report.compare("a", ours, [100.0] * 7, peer_name="p", unit="x", at_least=0.95, with_confidence=True)
    assert row.ratio is not None
    assert row.ratio >= 0.95
    assert row.met is False
    narrow = report.compare("a", [99.0] * 7, [100.0] * 7, peer_name="p", unit="x", at_least=0.95, with_confidence=True)
    assert narrow.met is True


def test_results_have_the_agreed_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    row = report.absolute("start", 1.5, [1.0, 1.5, 2.0], unit="s", below=2)
    (found,) = json.loads(report.write_json([row]).read_text())
    assert {"name", "ours", "peer", "peer_name", "unit", "ratio", "goal", "met"} <= found.keys()
    assert (found["peer"], found["ratio"], found["met"], found["spread"]) == (None, None, True, [1.0, 2.0])


def test_names_of_rows_are_unique() -> None:
    names = [name for section in (*command.SECTIONS, *command.ASKED_FOR.values()) for name in section.names()]
    assert len(names) == len(set(names)) > 30
