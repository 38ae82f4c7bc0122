"""The loop with recording fakes: order of the verbs, versions, when it evaluates and saves, how it stops."""

from collections.abc import Mapping

import numpy as np
import pytest

from torl_mega.config import GuardsConfig
from torl_mega.config_file import load_config
from torl_mega.errors import GuardError, Preempted, ServerError, ServerLost, StaleServers, WeightSyncError
from torl_mega.loop import Loop, split_mini_batches
from torl_mega.run.limits import check_guards
from torl_mega.serving.probe import check_gap
from torl_mega.serving.turns import Resident
from torl_mega.train import NoServers, OtherRank
from torl_mega.types import Sample, StepBatch, TrainSample


def sample():
    mask = np.array([False, True])
    return Sample(np.arange(2), mask, np.zeros(2, np.float32), np.zeros(2, np.int32), 1.0)


class Recorder:
    """Trainer, sink, collector and log in one, writing down every call."""

    def __init__(self, *, preempt_at: int | None = None, stop_after: int | None = None) -> None:
        self.calls: list[str] = []
        self.preempt_at, self.stop_after, self.collected = preempt_at, stop_after, 0

    def collect(self, step: int) -> StepBatch:
        if step == self.preempt_at:
            raise Preempted
        self.calls.append(f"collect {step}")
        self.collected += 1
        return StepBatch((sample(),) * 4, {"fault_rate": 0.0})

    def old_logprobs(self, samples):
        self.calls.append("old")
        return [TrainSample(s, np.array([0, 0.25], np.float32), np.zeros(2, np.float32)) for s in samples]

    def forward_backward(self, batch):
        self.calls.append(f"update {len(batch)}")
        return {"loss": float(len(self.calls)), "ratio_max": float(len(self.calls))}

    def optim_step(self):
        return {"grad_norm": 1.0}

    def weights(self):
        return iter(())

    def update(self, tensors, *, version: int) -> Mapping[str, float]:
        self.calls.append(f"sync {version}")
        return {"bytes": 8.0}

    def evaluate(self, step: int):
        self.calls.append(f"eval {step}")
        return {"accuracy": 1.0}

    def step(self, step, metrics):
        self.metrics = metrics
        self.calls.append(f"log {step}")

    def evaluation(self, step, metrics):
        pass

    def stop(self):
        return self.stop_after is not None and self.collected >= self.stop_after


def loop(fake, **over):
    settings = {"num_steps": 2, "num_mini_batches": 2, "eval_every": 0, "save_every": 1, "turns": Resident()} | over
    return Loop(
        trainer=fake,
        sink=fake,
        collector=fake,
        share=lambda make: make(),
        log=fake,
        check_guards=lambda step, metrics: None,
        save=lambda done: fake.calls.append(f"save {done}"),
        stop_requested=fake.stop,
        **settings,
    )


def one_step(step):
    return [f"collect {step}", "old", "update 2", "update 2", f"sync {step + 1}", f"log {step}"]


def test_the_order_of_a_run():
    fake = Recorder()
    assert loop(fake).run(0, evaluate_first=True)
    assert fake.calls == ["eval 0", *one_step(0), "save 1", *one_step(1), "eval 2", "save 2"]


def test_what_the_trainer_found_is_recorded_before_its_update():
    fake = Recorder()
    record = lambda step, samples: fake.calls.append(f"record {step}")  # noqa: E731
    loop(fake, num_steps=1, record=record).run(0, evaluate_first=False)
    assert fake.calls[1] == "old"
    assert fake.calls[2] == "record 0"
    assert fake.calls[3].startswith("update")


def test_a_resumed_run_starts_where_it_was_saved():
    fake = Recorder()
    assert loop(fake).run(1, evaluate_first=False)
    assert fake.calls == [*one_step(1), "eval 2", "save 2"]


def test_metrics_are_means_over_updates_and_maxima_where_named():
    fake = Recorder()
    loop(fake, num_steps=1).run(0, evaluate_first=False)
    assert fake.metrics["loss"] == pytest.approx(3.5)  # calls were 3 and 4 long
    assert fake.metrics["ratio_max"] == 4.0
    assert fake.metrics["max_abs_logprob_diff"] == pytest.approx(0.25)
    assert fake.metrics["sync/bytes"] == 8.0
    assert fake.metrics["step_s"] == pytest.approx(sum(fake.metrics[f"{n}_s"] for n in ("rollout", "train", "sync")))


def test_a_preempted_collection_is_dropped_and_the_run_saved_before_it():
    fake = Recorder(preempt_at=1)
    assert not loop(fake, save_every=0).run(0, evaluate_first=False)
    assert fake.calls == [*one_step(0), "save 1"]


def test_a_stop_request_ends_the_run_after_the_step():
    fake = Recorder(stop_after=1)
    assert not loop(fake, num_steps=5, save_every=0).run(0, evaluate_first=False)
    assert fake.calls == [*one_step(0), "save 1"]


def test_a_stop_request_in_the_last_step_loses_nothing():
    fake = Recorder(stop_after=1)
    assert loop(fake, num_steps=1, save_every=0).run(0, evaluate_first=False)
    assert fake.calls == [*one_step(0), "eval 1", "save 1"]


def test_servers_back_from_a_crash_get_the_weights_and_the_step_is_collected_again():
    fake = Recorder()
    collect, failures = fake.collect, [StaleServers("restarted"), StaleServers("again")]

    def flaky(step):
        if failures:
            raise failures.pop()
        return collect(step)

    fake.collect = flaky
    assert loop(fake, num_steps=1).run(0, evaluate_first=False)
    assert fake.calls[:3] == ["sync 0", "sync 0", "collect 0"]


def test_an_evaluation_that_meets_stale_servers_is_made_again_after_a_sync():
    fake = Recorder()
    evaluate, failures = fake.evaluate, [StaleServers("restarted")]

    def flaky(step):
        if failures:
            raise failures.pop()
        return evaluate(step)

    fake.evaluate = flaky
    assert loop(fake, num_steps=1).run(0, evaluate_first=True)
    assert fake.calls[:2] == ["sync 0", "eval 0"]


def test_a_server_lost_in_a_sync_is_left_out_and_any_other_sync_error_ends_the_run():
    fake = Recorder()
    update, failures = fake.update, [ServerLost("died")]

    def flaky(tensors, *, version):
        if failures:
            raise failures.pop()
        return update(tensors, version=version)

    fake.update = flaky
    assert loop(fake).sync(3) == {"bytes": 8.0}
    failures[:] = [WeightSyncError("lm_head.weight differs")]
    with pytest.raises(WeightSyncError, match="lm_head"):
        loop(fake).sync(4)


def test_mini_batches_are_consecutive_and_complete():
    assert split_mini_batches(list(range(10)), 3) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]
    assert split_mini_batches([1], 2) == [[1]]


def test_guards_name_metric_setting_and_remedy():
    check_guards(3, {"fault_rate": 0.1, "max_abs_logprob_diff": 9.0}, GuardsConfig())
    with pytest.raises(GuardError, match=r"step 3: fault_rate = 0.2 is above guards.max_fault_rate = 0.1; see faults/"):
        check_guards(3, {"fault_rate": 0.2}, GuardsConfig())
    with pytest.raises(GuardError, match="max_logprob_diff"):
        check_guards(3, {"max_abs_logprob_diff": 2e-4}, GuardsConfig(max_logprob_diff=1e-4))


def test_what_is_not_a_number_passes_no_guard():
    for metric in ("fault_rate", "max_abs_logprob_diff"):  # with and without a limit
        with pytest.raises(GuardError, match=f"step 3: {metric} is not a number"):
            check_guards(3, {metric: float("nan")}, GuardsConfig())


def test_skipped_updates_are_counted_over_the_updates_of_a_step():
    fake = Recorder()
    answers = [{"grad_norm": 0.0, "faults/skipped_updates": 1.0}, {"grad_norm": 1.0}]
    fake.optim_step = lambda: answers.pop(0)
    loop(fake, num_steps=1).run(0, evaluate_first=False)
    assert fake.metrics["faults/skipped_updates"] == 1.0
    assert fake.metrics["grad_norm"] == 0.5


@pytest.mark.parametrize("server", [[0.0, -1.0, -2.6], [0.0, float("nan"), -2.0]])
def test_the_probe_names_the_token_and_lets_nothing_pass_that_is_no_number(server):
    config, mine = load_config("conf/base.yaml"), np.array([0.0, -1.0, -2.0])
    check_gap("http://s", (7, 8, 9), np.array([0.0, -1.0, -2.4]), mine, config)
    with pytest.raises(ServerError, match="http://s and the trainer disagree on the probe text: token"):
        check_gap("http://s", (7, 8, 9), np.array(server), mine, config)


def test_guards_warn_before_they_stop(caplog):
    check_guards(3, {"truncated_ratio": 0.39, "void_turn_ratio": 1.0}, GuardsConfig(max_truncated_ratio=0.8))
    assert not caplog.records
    check_guards(3, {"truncated_ratio": 0.41}, GuardsConfig(max_truncated_ratio=0.8))
    assert "truncated_ratio = 0.41 comes near guards.max_truncated_ratio = 0.8" in caplog.text


def test_ranks_beside_rank_0_step_through_their_weights_and_say_nothing(capsys):
    tensors = iter([("a", None), ("b", None)])
    other = OtherRank()
    assert NoServers().update(tensors, version=1) == {}  # a replay gathers nothing
    assert other.update(tensors, version=1) == {}
    assert list(tensors) == []
    other.step(0, {"accuracy": 1.0})
    other.evaluation(0, {"accuracy": 1.0})
    other.first_sync(0, {"bytes": 1.0})
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="only rank 0 collects"):
        other.collect(0)
