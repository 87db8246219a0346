"""The atheris harness finds nothing in the time that it is given: ``FUZZ_SECONDS``, 15 of them by default."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "policy/golden"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "15"))


@pytest.mark.timeout(SECONDS + 240)
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="NOT FUZZED: atheris is not installed (pip install atheris); only hypothesis looked for crashes",
)
def test_the_parser_only_refuses_when_the_input_is_arbitrary(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in GOLDEN.glob("*.yaml"):
        # The harness takes bytes from the end to choose: the last one says that this is a text.
        (corpus / path.stem).write_bytes(path.read_bytes() + b"\x01")
    command = [
        *(sys.executable, str(HERE / "policy_parser.py"), f"-max_total_time={SECONDS}", "-timeout=10"),
        *("-rss_limit_mb=2048", f"-artifact_prefix={tmp_path}/", "-max_len=8192", str(corpus)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS + 200, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:] + run.stdout[-4000:]
    done = re.search(r"Done (\d+) runs in", run.stderr)
    assert done and int(done[1]) > 100, run.stderr[-2000:]
