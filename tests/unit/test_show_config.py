"""`torl config`: every leaf once, its value as the run sees it, and who said it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torl_mega.config_file import load_config, origins
from torl_mega.errors import ConfigError
from torl_mega.launch import show_config

ROOT = Path(__file__).parents[2]
TORL = str(Path(sys.executable).with_name("torl"))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def shown(capsys: pytest.CaptureFixture[str], conf: str, *overrides: str, only: str = "") -> dict[str, Any]:
    show_config.run(Path(conf), overrides, only=only, json_output=True)
    return json.loads(capsys.readouterr().out)


def leaves(tree: Any, prefix: str = "") -> set[str]:
    return {f"{prefix}{k}" for k, v in tree.items() if not isinstance(v, dict)} | {
        leaf for k, v in tree.items() if isinstance(v, dict) for leaf in leaves(v, f"{prefix}{k}.")
    }


def test_every_setting_with_value_origin_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "conf/quickstart_gpu.yaml", "optim.lr=1e-5", "eval.benchmarks={}")
    config = load_config("conf/quickstart_gpu.yaml", ["optim.lr=1e-5"]).model_dump(mode="json")
    assert leaves(config) - {"eval.benchmarks"} <= set(found)
    assert found["optim.lr"]["value"] == 1e-5
    assert found["optim.lr"]["origin"] == "command line"
    assert found["model.dtype"]["origin"] == "conf/quickstart_gpu.yaml"
    assert found["rollout.group_size"]["origin"] == "conf/quickstart.yaml"
    assert found["rollout.max_tool_calls"]["origin"] == "conf/base.yaml"
    assert found["rollout.refill_rounds"] == {
        "value": 4,
        "origin": "default",
        "meaning": "Further collections of a step, at most, with algo.zero_signal = refill.",
    }
    assert sum(not setting["meaning"] for setting in found.values()) < 25


def test_a_section_set_as_a_whole_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "examples/own_data.yaml", "eval.data=[arithmetic:3]", only="data.columns")
    assert {name: s["origin"] for name, s in found.items()} == dict.fromkeys(found, "examples/own_data.yaml")
    assert found["data.columns.problem"]["value"] == "task"
    assert set(found) == {"data.columns.problem", "data.columns.answer", "data.columns.extra"}


def test_what_is_wrong_is_said_as_by_every_command() -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        origins("conf/nothing.yaml")
    with pytest.raises(
        ConfigError, match=r"data\.train\.0\.wieght = 2 is not a setting; did you mean data\.train\.0\.weight"
    ):
        load_config("conf/quickstart.yaml", ["data.train=[{path: a, wieght: 2}]"])
    with pytest.raises(ConfigError, match=r"data\.train = 5: input should be a valid string$"):
        load_config("conf/quickstart.yaml", ["data.train=5"])


def test_from_the_terminal() -> None:
    done = subprocess.run(
        [TORL, "config", "conf/quickstart.yaml", "--only", "nothing"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "no setting starts with 'nothing'\n")
    done = subprocess.run([TORL, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("torl ")
    assert done.returncode == 0
