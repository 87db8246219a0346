"""The plugin's executable against a stand-in for the agent's socket."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.cni.protocol import VERSIONS
from tests.cni.fake import agent, answered, response

SOURCES: Final = Path(__file__).resolve().parents[2] / "cni-relay"
ENV: Final = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}


@pytest.fixture(scope="session")
def relay() -> Path:
    """The executable as it is installed."""
    subprocess.run(["make", "-s", "-C", str(SOURCES)], check=True)
    return SOURCES / "ciliate-cni"


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executable with AddressSanitizer and UndefinedBehaviorSanitizer: it aborts where the other would go on."""
    output = tmp_path_factory.mktemp("relay") / "ciliate-cni"
    flags = ["-std=gnu11", "-O1", "-g", "-D_GNU_SOURCE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, "-o", output, *sorted(SOURCES.glob("*.c"))], check=True)
    return output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def conf(path: Path, **more: Any) -> bytes:
    whole = {"cniVersion": "1.1.0", "name": "ciliate", "type": "ciliate-cni", "agentSocket": str(path)}
    return json.dumps(whole | more).encode()


def call(
    relay: Path, stdin: bytes, env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [relay], input=stdin, env=ENV if env is None else env, capture_output=True, check=False, timeout=timeout
    )


def error(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    """Return the error that was printed: one document, as the specification wants it."""
    assert done.returncode == 1, done
    document: dict[str, Any] = json.loads(done.stdout)
    assert document.keys() <= {"cniVersion", "code", "msg", "details"}
    return document


# ---- what it is ----------------------------------------------------------------------------------------------------


def test_it_is_a_static_executable(relay: Path) -> None:
    """A node's host may have any C library, or none: no program interpreter, no dynamic section."""
    headers = subprocess.run(["readelf", "-lW", relay], check=True, capture_output=True, text=True).stdout
    assert "INTERP" not in headers
    assert "DYNAMIC" not in headers
    assert relay.stat().st_size < 2 << 20


def test_what_is_not_cni_gets_help(relay: Path) -> None:
    done = call(relay, b"", {})
    assert done.returncode == 2
    assert b"agentSocket" in done.stderr
    assert json.loads(done.stdout)["code"] == 4


# ---- what it passes on ---------------------------------------------------------------------------------------------


def test_it_passes_environment_and_input_and_gives_back_what_the_agent_says(relay: Path, path: Path) -> None:
    stdin = conf(path, note='"\\\n\t\u20ac\U0001f600', prevResult={"deep": [[{"a": "}"}]]})
    env = ENV | {"CNI_ARGS": "A=1;B=\u00e4", "CNI_PATH": "/x", "CNI_NETNS_OVERRIDE": "1", "HOME": "/root"}
    with agent(path, lambda _: answered('{"ips":[], "x":"\u20ac"}\n')) as one:
        done = call(relay, stdin, env)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, '{"ips":[], "x":"\u20ac"}\n', b"")
    body = json.loads(one.bodies[0])
    assert body["stdin"].encode() == stdin
    assert body["env"] == {name: value for name, value in env.items() if name.startswith("CNI_")}


def test_an_error_of_the_agent_is_given_back(relay: Path, path: Path) -> None:
    with agent(path, lambda _: answered('{"code":7}\n', 1)):
        done = call(relay, conf(path))
    assert (done.returncode, done.stdout) == (1, b'{"code":7}\n')


def test_del_that_did_nothing_prints_nothing(relay: Path, path: Path) -> None:
    with agent(path, lambda _: answered("")):
        done = call(relay, conf(path), ENV | {"CNI_COMMAND": "DEL"})
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_socket_may_be_in_the_environment(relay: Path, path: Path) -> None:
    with agent(path, lambda _: answered("yes")):
        done = call(relay, b'{"cniVersion":"1.1.0"}', ENV | {"CILIATE_SOCKET": str(path)})
    assert done.stdout == b"yes"


# ---- VERSION and STATUS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b"", "1.1.0"),
        (b'{"cniVersion":"0.4.0"}', "0.4.0"),
        (b'{"cniVersion":"9.9.9"}', "1.1.0"),
        (b'{"cniVersion":"1.0.0\\",\\"1.1.0"}', "1.1.0"),
        (b'{"cniVersion":1}', "1.1.0"),
        (b"\xff" * (2 << 20), "1.1.0"),
    ],
)
def test_version_needs_no_agent(relay: Path, stdin: bytes, version: str) -> None:
    done = call(relay, stdin, {"CNI_COMMAND": "VERSION"})
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"cniVersion": version, "supportedVersions": list(VERSIONS)}


def test_status_says_not_available_when_no_agent_answers(relay: Path, path: Path) -> None:
    done = call(relay, conf(path, agentTimeout=1), {"CNI_COMMAND": "STATUS"})
    assert error(done)["code"] == 50


def test_status_waits_a_short_while_only(relay: Path, path: Path) -> None:
    began = time.monotonic()
    assert error(call(relay, conf(path, agentTimeout=600), {"CNI_COMMAND": "STATUS"}))["code"] == 50
    assert time.monotonic() - began < 30


# ---- waiting -------------------------------------------------------------------------------------------------------


def test_it_waits_for_an_agent_that_is_not_there_yet(relay: Path, path: Path) -> None:
    with subprocess.Popen([relay], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV) as process:
        assert process.stdin is not None
        process.stdin.write(conf(path))
        process.stdin.close()
        time.sleep(0.5)  # so that it has tried at least once; the outcome does not depend on it
        assert process.poll() is None
        with agent(path, lambda _: answered("late")):
            assert process.wait(60) == 0
            assert process.stdout is not None
            assert process.stdout.read() == b"late"


def test_it_waits_for_an_agent_that_is_starting(relay: Path, path: Path) -> None:
    starting = response(503, {"error": "the agent is starting: waiting for nodes"})
    with agent(path, lambda number: answered("done") if number > 3 else starting) as one:
        assert call(relay, conf(path)).stdout == b"done"
    assert len(one.bodies) == 4


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\ncontent-le", answered("half")[:-4]])
def test_it_asks_again_when_the_agent_ends_in_the_middle_of_its_answer(relay: Path, path: Path, first: bytes) -> None:
    with agent(path, lambda number: first if number == 1 else answered("whole")) as one:
        assert call(relay, conf(path)).stdout == b"whole"
    assert one.bodies[0] == one.bodies[1]


def test_a_socket_that_nobody_listens_on_is_waited_for(relay: Path, path: Path) -> None:
    """A killed agent leaves it behind."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    found = error(call(relay, conf(path, agentTimeout=1)))
    assert found["code"] == 11
    assert "refused" in found["details"]


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC"])
def test_it_says_try_again_when_the_time_is_over(relay: Path, path: Path, command: str) -> None:
    began = time.monotonic()
    found = error(call(relay, conf(path, agentTimeout=1, cniVersion="1.0.0"), ENV | {"CNI_COMMAND": command}))
    assert (found["code"], found["cniVersion"]) == (11, "1.0.0")
    assert str(path) in found["details"]
    assert "ciliate status" in found["details"]
    assert 0.4 < time.monotonic() - began < 30


def test_the_reason_of_an_agent_that_is_starting_is_told(relay: Path, path: Path) -> None:
    with agent(path, lambda _: response(503, {"error": "the agent is starting: waiting for nodes"})):
        found = error(call(relay, conf(path, agentTimeout=1)))
    assert found["code"] == 11
    assert "waiting for nodes" in found["details"]


def listening(path: Path, backlog: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def test_an_agent_that_hangs_does_not_hang_it(relay: Path, path: Path) -> None:
    """It accepts, or the kernel does, and never reads: the request is larger than what a socket holds."""
    with listening(path, 8):
        found = error(call(relay, conf(path, agentTimeout=1, filler="x" * 900_000), timeout=30))
    assert found["code"] == 11
    assert "no answer in time" in found["details"]


def test_an_agent_whose_queue_is_full_does_not_hang_it(relay: Path, path: Path) -> None:
    with listening(path, 0), socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path))
        found = error(call(relay, conf(path, agentTimeout=1), timeout=30))
    assert found["code"] == 11


def test_an_answer_that_drips_does_not_hang_it(relay: Path, path: Path) -> None:
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while not stop.wait(0.05):
                try:
                    connection.send(b"HTTP/1.1 200 OK\r\n")
                except OSError:
                    return

    with listening(path, 8) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            found = error(call(relay, conf(path, agentTimeout=1), timeout=30))
        finally:
            stop.set()
            thread.join()
    assert found["code"] == 11


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_a_refusal_is_told_at_once(relay: Path, path: Path) -> None:
    with agent(path, lambda _: response(400, {"error": "no such field"})) as one:
        found = error(call(relay, conf(path)))
    assert (found["code"], len(one.bodies)) == (5, 1)
    assert "status 400: no such field" in found["details"]


def test_what_is_no_agent_is_told_at_once(relay: Path, path: Path) -> None:
    with agent(path, lambda _: b"SSH-2.0-OpenSSH_9.2\r\n"):
        assert error(call(relay, conf(path)))["code"] == 6


@pytest.mark.parametrize("document", [{}, {"stdout": "x"}, {"stdout": 1, "exit_code": 0}, {"exit_code": "0"}, [], "x"])
def test_an_answer_that_is_none_of_ours_is_told(relay: Path, path: Path, document: object) -> None:
    with agent(path, lambda _: response(200, document)):
        assert error(call(relay, conf(path)))["code"] == 6


def test_a_large_answer_is_whole_and_a_huge_one_is_refused(relay: Path, path: Path) -> None:
    with agent(path, lambda _: answered("x" * (3 << 20))):
        done = call(relay, conf(path))
    assert (done.returncode, len(done.stdout)) == (0, 3 << 20)
    path.unlink()
    with agent(path, lambda _: answered("x" * (5 << 20))):
        assert error(call(relay, conf(path)))["code"] == 5


def test_input_has_a_limit(relay: Path, path: Path) -> None:
    filler = (1 << 20) - len(conf(path, filler=""))
    with agent(path, lambda _: answered("fits")):
        assert call(relay, conf(path, filler="x" * filler)).stdout == b"fits"
        assert error(call(relay, conf(path, filler="x" * (filler + 1))))["code"] == 5


@pytest.mark.parametrize(
    ("stdin", "code"),
    [
        (b"", 7),
        (b"nonsense", 7),
        (b"{", 7),
        (b'{"agentSocket":1}', 7),
        (b'{"agentSocket":""}', 7),
        (b'{"agentSocket":"/a\\u0000b"}', 7),
        (b'{"agentSocket":"/' + b"x" * 200 + b'"}', 7),
        (b'{"agentTimeout":"5"}', 7),
        (b'{"agentTimeout":0}', 7),
        (b'{"agentTimeout":-5}', 7),
        (b'{"agentTimeout":601}', 7),
        (b'{"agentTimeout":1.5}', 7),
        (b'{"agentTimeout":1e3}', 7),
        (b'{"agentTimeout":99999999999999999999999}', 7),
        (b'{"agentSocket":"/nope","x":"\xff"}', 6),
    ],
)
def test_settings_that_are_none_are_told(relay: Path, stdin: bytes, code: int) -> None:
    assert error(call(relay, stdin))["code"] == code


def test_an_environment_that_is_no_text_is_told(relay: Path, path: Path) -> None:
    env = {os.fsencode(name): os.fsencode(value) for name, value in ENV.items()} | {b"CNI_ARGS": b"\xff"}
    done = subprocess.run([relay], input=conf(path), env=env, capture_output=True, check=False)
    found = error(done)
    assert (found["code"], found["details"]) == (6, "CNI_ARGS")


def test_a_result_that_cannot_be_printed_is_no_success(relay: Path, path: Path) -> None:
    with agent(path, lambda _: answered("x")), Path("/dev/full").open("wb") as full:
        done = subprocess.run([relay], input=conf(path), env=ENV, stdout=full, check=False)
    assert done.returncode == 1


# ---- with sanitizers -----------------------------------------------------------------------------------------------


def sane(done: subprocess.CompletedProcess[bytes]) -> None:
    """It ended by itself, and no sanitizer spoke."""
    assert done.returncode in (0, 1, 2), done.stderr.decode(errors="replace")
    assert b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr, done.stderr.decode()


ANSWERS: Final[list[bytes]] = [
    answered(),
    answered("\u20ac" * 1000, 1),
    response(200, {"exit_code": -(10**14), "stdout": ""}),
    response(400, {"error": "\u20ac" * 400}),
    response(400, "x" * 5000),
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\ncontent-length: 2",
    b"HTTP/1.1 \r\n\r\n",
    b"HTTP/1.",
    b"HTT",
    b"\0" * 100,
    b"HTTP/1.1 200 OK\0\r\ncontent-length: 2\r\n\r\n{}",
    b'HTTP/1.1 200 OK\r\ncontent-length: 23\r\n\r\n{"stdout":"\\ud83d\\ude00"}',
    b'HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n{"stdout":"\\ud83d"}',
    b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"stdout":"\\',
    b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{"stdout":"\\u1',
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_no_sanitizer_speaks_when_answers_are_malformed(checked: Path, path: Path, answer: bytes) -> None:
    with agent(path, lambda _: answer):
        sane(call(checked, conf(path, agentTimeout=1)))


pieces = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00", b"0", b"-", b"1e9", b"null",
        b'"agentSocket"', b'"agentTimeout"', b'"cniVersion"', b'"1.1.0"', b'"/x"', b" ", b"\n", b"\0", b"\xff",
        b"\xe2\x82\xac", b"\xf0\x9f", b"{" * 200, b'{"a":' * 130, b'"agentTimeout":1,',
    ]
)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(pieces, max_size=12), start=st.sampled_from([b"", b"{", b'{"agentTimeout":1,']))
def test_no_sanitizer_speaks_when_input_is_malformed(checked: Path, parts: list[bytes], start: bytes) -> None:
    """VERSION reads the version alone; ADD also the settings and all of the rest, but its timeout is not in 1..600."""
    stdin = start + b"".join(parts)
    sane(call(checked, stdin, {"CNI_COMMAND": "VERSION"}))
    sane(call(checked, b'{"agentTimeout":0,"x":' + stdin, ENV | {"CNI_ARGS": "\u20ac"}))


def test_no_sanitizer_speaks_when_all_is_well(checked: Path, path: Path) -> None:
    """Leaks included: the process gives back what it took."""
    replies: Callable[[int], bytes] = lambda number: answered("ok" * 50_000) if number > 1 else b""  # noqa: E731
    with agent(path, replies):
        done = call(checked, conf(path, filler="\u20ac\n" * 20_000))
    sane(done)
    assert done.stdout == b"ok" * 50_000


def test_it_ends_when_the_runtime_ends_it(relay: Path, path: Path) -> None:
    with subprocess.Popen([relay], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV) as process:
        assert process.stdin is not None
        process.stdin.write(conf(path))
        process.stdin.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
