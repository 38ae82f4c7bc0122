"""What `SamplingAhead` asks of its child, which here only counts."""

import contextlib
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest

from torl_mega.config_file import load_config
from torl_mega.errors import StaleServers
from torl_mega.rollout.ahead import SamplingAhead
from torl_mega.run.folder import RunFolder
from torl_mega.types import StepBatch

NUM_STEPS = 9


def _child(pipe, fail_once):
    """Answers as the real one, a cursor being the number of steps that lie before it."""
    cursor = 0
    pipe.send((True, cursor))
    with contextlib.suppress(EOFError):
        while True:
            command, value = pipe.recv()
            if command == "close":
                return
            if command == "restore":
                cursor = value
                pipe.send((True, None))
            elif value == fail_once:
                fail_once = None
                pipe.send((False, StaleServers("other weights")))
            else:
                cursor += 1
                pipe.send((True, (StepBatch((), {"prompts": float(cursor - 1), "step": float(value)}), cursor)))


@contextlib.contextmanager
def counted(folder, staleness, start, fail_once=None):
    """Rollouts that go on at step `start`, with `_child` in the place of the real one."""

    class Counted(SamplingAhead):
        def _start_child(self):
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._child = context.Process(target=_child, args=(theirs, fail_once))
            self._child.start()
            theirs.close()

    config = load_config(Path("conf/quickstart.yaml"), [f"rollout.max_staleness={staleness}", f"num_steps={NUM_STEPS}"])
    with contextlib.closing(Counted(config, RunFolder(folder), SimpleNamespace(requested=False))) as rollouts:
        rollouts.restore({"cursor": start, "collected": {}})
        yield rollouts


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_every_step_gets_its_own_prompts_once(tmp_path, staleness, start):
    with counted(tmp_path, staleness, start) as rollouts:
        for step in range(start, NUM_STEPS):
            assert rollouts.collect(step).metrics == {"prompts": step, "step": step}


@pytest.mark.parametrize("failing", [4, 5, 6])
def test_a_step_that_failed_is_asked_for_again_with_the_same_prompts(tmp_path, failing):
    seen = []
    with counted(tmp_path, 2, 4, fail_once=failing) as rollouts:
        while len(seen) < NUM_STEPS - 4:
            with contextlib.suppress(StaleServers):
                seen.append(rollouts.collect(4 + len(seen)).metrics["prompts"])
    assert seen == list(range(4, NUM_STEPS))
