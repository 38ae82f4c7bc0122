"""What a launcher does before it starts anything: refuse what cannot work, and freeze the config that every process reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from torl_mega.config import Config
from torl_mega.data.problem_files import is_missing
from torl_mega.errors import CheckpointError, ConfigError, DataError
from torl_mega.import_path import is_import_path, load
from torl_mega.layout import check_layout, check_router_settings, check_served_experts, read_hf_config
from torl_mega.rollout.benchmark_table import SOURCE_NOTE
from torl_mega.rollout.evaluate import absent_benchmarks
from torl_mega.run.files import write_json
from torl_mega.run.folder import RunFolder
from torl_mega.run.trackers import check_installed
from torl_mega.serving.fp8_format import check_fp8_serving

EVALUATED = frozenset({"model"})  # the sections in which evaluations of one name may differ


def check_inputs(config: Config, num_ranks: int | None) -> None:
    """Raises TorlError for a model, layout or data file that cannot work; opens no big file. `num_ranks`: None without a
    trainer."""
    check_installed(config.logging)
    hf_config = read_hf_config(config.model.path)
    problems = check_layout(hf_config, config.parallel, num_ranks) if num_ranks else []
    problems = problems or [
        *check_fp8_serving(hf_config, config),
        *check_served_experts(hf_config, config.serving.tensor, config.serving.expert),
        *check_router_settings(hf_config, config.algo),
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    replay = config.rollout.replay
    if num_ranks and replay is not None and not RunFolder(Path(replay)).trajectories.is_dir():
        raise DataError(
            f"rollout.replay = {replay!r} is no run with trajectories/; give the folder of one, e.g. runs/quickstart"
        )
    if num_ranks and replay is not None:
        from torl_mega.rollout.replay import check_recording  # torch comes with it

        check_recording(config)
    absent = absent_benchmarks(config.eval)  # may be left out, but not all of them
    wanted = [spec for spec in config.eval.data if spec not in absent] or config.eval.data
    train = config.data.specs if config.data.source is None else ()  # what a user's reader takes is for it to say
    for setting, spec in [*(("data.train", spec) for spec in train), *(("eval.data", spec) for spec in wanted)]:
        if is_missing(spec):
            raise DataError(f"{setting} = {spec!r} is not there; give a parquet or jsonl file, or arithmetic:SEED")
    for setting, path in (("reward.function", config.reward.function), ("data.source", config.data.source)):
        if path is not None:
            load(path, setting)


def check_texts(config: Config, num_ranks: int) -> None:
    """As `check_inputs`, for `torl pretrain`."""
    if config.pretrain is None:
        raise ConfigError(
            "the config has no section pretrain; `torl pretrain` needs pretrain.data (docs/pretraining.md)"
        )
    problems = check_layout(read_hf_config(config.model.path), config.parallel, num_ranks)
    if problems:
        raise ConfigError("; ".join(problems))
    if is_import_path(config.pretrain.data):
        load(config.pretrain.data, "pretrain.data")
    elif not Path(config.pretrain.data).is_file():
        raise DataError(
            f"pretrain.data = {config.pretrain.data!r} is not there; give a jsonl file or pkg.module:function"
        )


def without_trainer(config: Config) -> Config:
    """The config of `torl eval` and `torl rollout`: the servers serve what `model.path` holds. A Megatron checkpoint of a
    run is converted first. Raises TorlError."""
    if config.serving.weight_dtype != "model":
        raise ConfigError(
            f"serving.weight_dtype = {config.serving.weight_dtype} needs a trainer that sends the weights; without one the "
            "servers serve model.path as it is: add serving.weight_dtype=model"
        )
    if (folder := RunFolder.of(config)).checkpoints.exists():
        raise ConfigError(
            f"{folder.path} holds a training run, whose trajectories, metrics and tables would be replaced; give this one a "
            f"name of its own (name=…)"
        )
    if not (Path(config.model.path) / "manifest.json").is_file():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(_converted(config))})})


def check_program(program: str, config: Config) -> None:
    """Raises ConfigError when a program that collects without a trainer would have nothing to do."""
    if program == "eval" and not config.eval.data:
        raise ConfigError("eval.data is empty; name benchmarks, e.g. 'eval.data=[data/torl_test.parquet]'")


def freeze(config: Config, folder: RunFolder, name: str) -> Path:
    """Writes `jobs/<name>.yaml` of the run folder: every process of a run reads this one."""
    frozen = folder.path / "jobs" / f"{name}.yaml"
    frozen.parent.mkdir(exist_ok=True)
    frozen.write_text(json.dumps(config.model_dump(mode="json"), indent=1))
    return frozen.resolve()


def _converted(config: Config) -> Path:
    """The checkpoint as an HF folder inside this run's own, with the tokenizer of the run it belongs to."""
    checkpoint = Path(config.model.path).resolve()
    owner = checkpoint.parents[1] / "config.json"
    if not owner.is_file():
        raise ConfigError(
            f"model.path = {checkpoint} is a Megatron checkpoint outside a run folder, so its tokenizer is unknown; "
            f"convert it with tools/convert_megatron_to_hf.py --tokenizer DIR"
        )
    try:
        tokenizer = str(json.loads(owner.read_text())["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{owner} holds no run's settings ({type(exc).__name__}: {exc}), so the tokenizer of {checkpoint} is unknown; convert "
            f"it with tools/convert_megatron_to_hf.py --tokenizer DIR"
        ) from None
    out = RunFolder.of(config).path / f"{checkpoint.parents[1].name}_{checkpoint.name}_hf"
    if not out.exists():
        command = [sys.executable, "-m", "torl_mega.trainer.weights.export", "--checkpoint", str(checkpoint)]
        command += ["--out", str(out), "--tokenizer", tokenizer]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise CheckpointError(f"{checkpoint} could not be converted: {last.removeprefix('error: ')}")
    write_json(out / SOURCE_NOTE, {"model": tokenizer, "checkpoint": str(checkpoint)})
    return out
