"""The documentation agrees with the tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_generated_reference_is_up_to_date() -> None:
    command = [sys.executable, "scripts/reference.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^ +make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_rule_of_the_checker_is_explained() -> None:
    source = (ROOT / "scripts/check_rules.py").read_text()
    rules = set(re.findall(r": ([a-z-]+)(?:: |\")", source)) & set(re.findall(r"[a-z]+(?:-[a-z]+)*", source))
    page = (ROOT / "docs/how-to/contribute.md").read_text()
    assert {"bare-task", "struct-outside-border"} <= rules
    assert not [rule for rule in rules if f"`{rule}`" not in page]


def test_fragments_have_a_known_kind() -> None:
    kinds = {"feature", "bugfix", "security", "removal"}
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if path.suffix == ".md"]
    assert names
    assert not [name for name in names if not re.fullmatch(rf"(\d+|\+\w+)\.({'|'.join(kinds)})(\.\d+)?\.md", name)]
