"""Trackers through their own libraries, offline: groups, transcripts, runs that go on, libraries that fail or are absent."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own reader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from torl_mega.config import Config
from torl_mega.config_file import load_config
from torl_mega.errors import ConfigError
from torl_mega.launch.inputs import check_inputs
from torl_mega.run.metrics import RunMetrics, read_rows
from torl_mega.run.trackers import grouped, hyperparameters, open_trackers

TRAIN = {
    "accuracy": 0.5, "code_ratio": 0.9, "reward": 0.0, "grad_norm": 1.0, "k3": 1e-9, "rollout_s": 2.0, "train_s": 1.0,
    "sync_s": 0.5, "sync/bytes": 7, "execution/error": 0.25, "tool/search/calls": 2, "faults/sandbox_retry": 1,
    "reward/answer": 0.0, "entropy": math.nan,
}  # fmt: skip
TAGS = set(
    """
    rollout/accuracy tools/code_ratio rollout/reward train/grad_norm train/k3 time/rollout_s time/train_s time/sync_s sync/bytes
    tools/execution/error tools/tool/search/calls rollout/faults/sandbox_retry rollout/reward_parts/answer
    """.split()
)
HOSTILE = "<script>alert(1)</script> `*_ \x1b[31m"


def _config(tmp_path: Path, *over: str) -> Config:
    return load_config("conf/quickstart.yaml", [f"runs_dir={tmp_path}", "name=run", *over])


def _samples(kind: str, step: int, most: int) -> list[tuple[str, str]]:
    return [("sample_1", f"{kind} {step} {HOSTILE}")][:most]


def _open(config: Config, folder: Path, resume_at: int = 0) -> RunMetrics:
    folder.mkdir(exist_ok=True)
    trackers = open_trackers(config, folder, resume_at=resume_at, samples=_samples)
    return RunMetrics(folder, num_steps=4, resume_at=resume_at, trackers=trackers)


def _killed_and_gone_on_with(config: Config, folder: Path) -> None:
    """Four steps with an evaluation before, after two and after all; killed in step 3, gone on with from a checkpoint after 2."""
    first = _open(config, folder)
    first.first_sync(0, {"bytes": 7})
    first.evaluation(0, {"accuracy": 0.1, "aime24/accuracy": 0.2})
    for step in range(3):
        first.step(step, {**TRAIN, "accuracy": step / 10})
        if step == 1:
            first.evaluation(2, {"accuracy": 0.3})
    first.close()  # what a killed process leaves is a prefix of it
    again = _open(config, folder, resume_at=2)
    again.first_sync(2, {"bytes": 7})
    for step in range(2, 4):
        again.step(step, {**TRAIN, "accuracy": step / 10})
    again.evaluation(4, {"accuracy": 0.9})
    again.close()


WANTED = [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]  # of rollout/accuracy, in both halves of the run
WANTED_EVAL = [(0, 0.1), (2, 0.3), (4, 0.9)]


def _close(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, round(value, 6)) for step, value in points]


def test_rows_are_told_by_group() -> None:
    assert set(grouped({"kind": "train", "step": 3, **TRAIN})) == TAGS  # and the entropy that is no number is left out
    assert grouped({"kind": "eval", "step": 3, "aime24/accuracy": 1}) == {"eval/aime24/accuracy": 1.0}
    assert grouped({"kind": "sync", "step": 3, "sync/bytes": 7}) == {"sync/first/bytes": 7.0}


def test_tensorboard_has_groups_texts_settings_and_the_papers_figures(tmp_path: Path) -> None:
    config = _config(tmp_path, "logging.samples_every_steps=2")
    _killed_and_gone_on_with(config, tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run/tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0})
    board.Reload()
    assert set(board.Tags()["tensors"]) >= TAGS | {"eval/accuracy", "eval/aime24/accuracy", "sync/first/bytes"}
    assert (
        _close([(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in board.Tensors("rollout/accuracy")])
        == WANTED
    )
    assert (
        _close([(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in board.Tensors("eval/accuracy")])
        == WANTED_EVAL
    )
    texts = board.Tensors("rollout/sample_1/text_summary")
    assert [event.step for event in texts] == [0, 2]  # every second step
    assert HOSTILE in texts[0].tensor_proto.string_val[0].decode()
    content = board.SummaryMetadata("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert content.plugin_data.plugin_name == "custom_scalars"
    assert [c.title[:8] for c in layout.category] == ["Figure 4", "Figure 5", "Figure 6"]
    shown = {tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag}
    logged = {"eval/accuracy", "rollout/reward", "rollout/accuracy"} | {f"tools/{name}" for name in
        "code_ratio pass_ratio pass_ratio_correct pass_ratio_incorrect executed_code_ratio code_before_answer_ratio".split()
    } | {f"eval/{b}/accuracy" for b in "aime24 aime25 math500 olympiadbench amc23".split()}  # fmt: skip
    assert shown == logged
    assert hyperparameters(config)["optim.lr"] == 3e-4
    assert any("hparams" in name for name in board.Tags()["tensors"])


def test_mlflow_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = _config(
        tmp_path, "logging.tensorboard=false", "logging.mlflow.experiment=small", "logging.samples_every_steps=2"
    )
    _killed_and_gone_on_with(config, tmp_path / "run")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("small")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert float(run.data.params["optim.lr"]) == 3e-4
    history = client.get_metric_history(run.info.run_id, "rollout/accuracy")
    assert _close(sorted((m.step, m.value) for m in history)) == WANTED
    history = client.get_metric_history(run.info.run_id, "eval/accuracy")
    assert _close(sorted((m.step, m.value) for m in history)) == WANTED_EVAL
    (text,) = (tmp_path / "mlruns").rglob("step_00002/rollout/sample_1.txt")
    assert text.read_text() == f"train 2 {HOSTILE}"


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(tmp_path, "logging.tensorboard=false", "logging.wandb.project=small", "logging.wandb.tags=[a,b]")
    _killed_and_gone_on_with(config, tmp_path / "run")
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    assert {path.stem for path in files} == {f"run-{known['id']}"}  # both processes, one run
    assert known["missed"] == 0
    rows = [row for path in files for row in _wandb_rows(path)]
    told = [(int(r["step"]), r["rollout/accuracy"]) for r in rows if "rollout/accuracy" in r]
    assert _close(sorted(told)) == WANTED
    assert _close(sorted((int(r["step"]), r["eval/accuracy"]) for r in rows if "eval/accuracy" in r)) == WANTED_EVAL
    pages = [path.read_text() for path in (tmp_path / "run/wandb").rglob("*.html")]
    assert pages
    assert not any("<script>" in page for page in pages)


def _wandb_rows(path: Path) -> list[dict[str, Any]]:
    """What `wandb sync` would send of an offline run: its history records."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _wandb_records(raw: bytes) -> Iterator[bytes]:
    """Of a LevelDB log: blocks of 32 KiB with records (checksum 4, length 2, type 1) that may go on in the next block."""
    assert raw.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", raw, at + 4)
        parts += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


class Failing:
    """A Tracker whose library raises from the `good`-th call on, until `until`."""

    def __init__(self, good: int, until: int = 1_000) -> None:
        self.good, self.until, self.calls, self.told = good, until, 0, list[int]()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.good < self.calls <= self.until:
            raise RuntimeError("the server\nsaid 500")
        self.told.append(step)

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, *, complete: bool) -> None: ...


def _guarded(folder: Path, tracker: Failing, monkeypatch: pytest.MonkeyPatch, resume_at: int = 0) -> RunMetrics:
    from torl_mega.run import trackers

    monkeypatch.setattr(trackers, "_wanted", lambda *_: [("wandb", lambda run_id: (tracker, run_id or "x1"))])
    return _open(_config(folder, "logging.tensorboard=false"), folder / "run", resume_at)


def test_a_tracker_that_fails_costs_nothing_but_its_own_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Failing(good=2)
    log = _guarded(tmp_path, tracker, monkeypatch)
    for step in range(8):
        log.step(step, TRAIN)
    log.close()
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "logging.wandb fails (the server said 500); the run goes on, metrics.jsonl has it all"
    assert err[1:] == ["logging.wandb missed 6 entries; metrics.jsonl has them all"]  # said once
    assert tracker.calls == 2 + 3  # left alone after three failures in a row
    assert [r["step"] for r in read_rows(tmp_path / "run/metrics.jsonl")] == list(range(8))
    # the next process tells it what it missed
    healed = Failing(good=1_000)
    log = _guarded(tmp_path, healed, monkeypatch, resume_at=8)
    log.close()
    assert healed.told == list(range(2, 8))
    # and one that cannot even be opened again does not end a run that goes on
    from torl_mega.run import trackers

    def refuse(_: str | None) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(trackers, "_wanted", lambda *_: [("wandb", refuse)])
    log = _open(_config(tmp_path, "logging.tensorboard=false"), tmp_path / "run", 8)
    log.step(8, TRAIN)
    log.close()
    assert "no route to host" in capsys.readouterr().err


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
    (tmp_path / "file").write_text("")
    config = _config(tmp_path, "logging.tensorboard=false", f"logging.mlflow.uri={tmp_path}/file/x")
    with pytest.raises(ConfigError, match=r"logging.mlflow cannot begin: .*logging.mlflow=null") as said:
        _open(config, tmp_path / "run")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_absent_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"pip install -e '\.\[{name}\]'"):
        check_inputs(_config(tmp_path, f"logging.{name}={{}}"), 1)
