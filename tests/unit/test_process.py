"""The reaper: nothing survives, however the tree or its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from torl_mega.process.start import free_port, port_in_use, start, tail

STUBBORN = textwrap.dedent("""
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for detach in (False, True):
        if os.fork() == 0:
            if detach:
                os.setsid()
                if os.fork():
                    os._exit(0)
            open(sys.argv[1] + f"/{os.getpid()}", "w").close()
            time.sleep(600)
    open(sys.argv[1] + f"/{os.getpid()}", "w").close()
    time.sleep(600)
""")
OWNER = textwrap.dedent("""
    import signal, sys, time
    from pathlib import Path
    from torl_mega.process.start import start
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born ignoring it
    scratch = Path(sys.argv[3]) if sys.argv[3:] else None
    child = start([sys.executable, "-c", sys.argv[1], sys.argv[2]], name="tree", scratch=scratch)
    print(child.pid, flush=True)
    time.sleep(600)
""")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for(condition, limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def tree(folder: Path) -> list[int]:
    assert wait_for(lambda: len(list(folder.iterdir())) == 3)
    return [int(p.name) for p in folder.iterdir()]


def test_stop_ends_a_tree_that_ignores_sigterm_and_detaches(tmp_path: Path) -> None:
    child = start([sys.executable, "-c", STUBBORN, str(tmp_path)], name="stubborn")
    pids = tree(tmp_path)
    assert child.pid in pids
    assert child.poll() is None
    assert child.stop(grace_s=0.2) == -signal.SIGKILL
    assert not any(map(alive, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_tree_dies_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, STUBBORN, str(tmp_path)], stdout=subprocess.PIPE, stderr=-3)
    assert owner.stdout is not None
    owner.stdout.readline()
    pids = tree(tmp_path)
    owner.send_signal(how)
    owner.wait(10)
    assert wait_for(lambda: not any(map(alive, pids)), 5.0)
    owner.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_its_temporary_files_go_with_the_tree(tmp_path: Path, how: signal.Signals) -> None:
    """And the folder around them with the last tree of several; what somebody else has there stays."""
    (tmp_path / "pids").mkdir()
    around = tmp_path / "around"
    around.mkdir()
    makes = "import os, tempfile; os.makedirs(tempfile.mkdtemp() + '/deep'); tempfile.mkstemp()\n" + STUBBORN
    words = [sys.executable, "-c", OWNER, makes, str(tmp_path / "pids"), str(around / "tree")]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    tree(tmp_path / "pids")
    assert len(list((around / "tree").iterdir())) == 2
    second = start(["sleep", "600"], name="second", scratch=around / "second")
    owner.send_signal(how)
    owner.wait(10)
    assert wait_for(lambda: not (around / "tree").exists(), 5.0)
    assert (around / "second").is_dir()
    second.stop()
    assert not around.exists()
    owner.stdout.close()


def test_a_killed_reaper_takes_the_command_along() -> None:
    child = start(["sleep", "600"], name="sleep")
    reaper = int(Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(reaper, signal.SIGKILL)
    assert wait_for(lambda: not alive(child.pid))
    child.stop()


def test_a_fork_dies_with_the_process_that_asked_for_that() -> None:
    """Megatron forks its writers; a rank whose reaper is killed must not leave one behind."""
    forks = "import os, sys, time; from torl_mega.process.start import forks_die_with_parent; "
    forks += "forks_die_with_parent(); pid = os.fork(); "
    forks += "pid and print(pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", forks], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    fork = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not alive(fork))
    parent.stdout.close()


def test_a_finished_command_leaves_no_background_job(tmp_path: Path) -> None:
    script = f"(setsid sleep 600 & echo $! > {tmp_path}/pid); exit 7"
    child = start(["sh", "-c", script], name="sh")
    assert child.wait(10) == 7
    assert not alive(int((tmp_path / "pid").read_text()))


def test_exit_codes_are_the_commands_own() -> None:
    assert start(["sh", "-c", "exit 3"], name="sh").wait(10) == 3
    assert start(["sh", "-c", "kill -SEGV $$"], name="sh").wait(10) == -signal.SIGSEGV
    assert start(["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.01; done"], name="sh").stop(5) in (
        5,
        -15,
    )


def test_a_missing_command_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "around").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ghost: No such file or directory: /no/such/command"):
        start(["/no/such/command"], name="ghost", scratch=tmp_path / "around" / "ghost")
    assert not (tmp_path / "around").exists()


def test_environment_log_and_stdin(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log"
    child = start(
        ["sh", "-c", 'read line; echo "$line $COLOUR"; echo loud >&2'],
        name="echo", log_path=log, env={"COLOUR": "green", "PATH": os.environ["PATH"]}, stdin=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(b"sea\n")
    child.stdin.close()
    assert child.wait(10) == 0
    assert log.read_text() == "sea green\nloud\n"
    assert tail(log, 1) == "loud"
    assert tail(tmp_path / "none") == ""


def test_start_is_cheap() -> None:
    begin = time.monotonic()
    for _ in range(5):
        start(["true"], name="true").wait(10)
    assert (time.monotonic() - begin) / 5 < 1.0


def test_ports() -> None:
    import socket

    port = free_port()
    assert not port_in_use("127.0.0.1", port)
    assert not port_in_use("127.0.0.1", port + 1), "an SGLang server's ranks meet there"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert port_in_use("127.0.0.1", port)
