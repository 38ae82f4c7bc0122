"""Every command line of a GPU server that a shipped config would start, read by SGLang's own parser."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

from torchrun import run_python  # noqa: E402

from torl_mega.config import Config  # noqa: E402
from torl_mega.config_file import load_config  # noqa: E402
from torl_mega.planner.shapes import hf_config  # noqa: E402
from torl_mega.serving.fp8_format import QUANTIZATION_CONFIG  # noqa: E402
from torl_mega.serving.server import launch_command  # noqa: E402

SHIPPED = sorted(p for p in (*ROOT.glob("conf/torl_*.yaml"), *ROOT.glob("conf/clusters/torl_*.yaml")))
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "deterministic": ["serving.deterministic=true"],
    "fp8": ["serving.weight_dtype=fp8_block"],
    "limited": ["serving.max_total_tokens=131072", "serving.max_running_requests=256"],
    "sleeping": ["serving.extra_args=[--enable-memory-saver]"],
}
CASES = [(conf.stem, variant) for conf in SHIPPED for variant in VARIANTS]
Read = dict[tuple[str, str], tuple[Config, dict[str, Any]]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Config and what SGLang reads in its command line, by (config, variant). One start of the parser reads them all."""
    folder = tmp_path_factory.mktemp("commands")
    configs, commands = [], []
    for conf in SHIPPED:
        model = folder / Path(load_config(conf).model.path).name
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(hf_config(model.name)))
        for overrides in VARIANTS.values():
            configs.append(load_config(conf, [f"model.path={model}", *overrides]))
            command = launch_command(configs[-1], host="10.0.0.7", port=30000, on_gpu=True)
            assert command[1:3] == ["-m", "sglang.launch_server"]
            commands.append(command[3:])
    file = folder / "commands.json"
    file.write_text(json.dumps(commands))
    output = run_python(Path(__file__).with_name("server_flags.py"), file, timeout_s=200)
    return dict(zip(CASES, zip(configs, json.loads(output.splitlines()[-1]), strict=True), strict=True))


@pytest.mark.parametrize(("conf", "variant"), CASES)
def test_sglang_reads_what_we_mean(read: Read, conf: str, variant: str) -> None:
    config, found = read[conf, variant]
    serving = config.serving
    assert (found["model_path"], found["host"], found["port"]) == (config.model.path, "10.0.0.7", 30000)
    assert (found["tp_size"], found["dtype"]) == (serving.tensor, "bfloat16")
    assert found["device"] is None or found["device"] == "cuda", "a GPU server names no CPU"
    assert found["mem_fraction_static"] == serving.mem_fraction
    assert found["context_length"] > config.max_context_tokens
    assert found["enable_deterministic_inference"] == serving.deterministic
    assert found["enable_memory_saver"] == (variant == "sleeping")
    assert found["max_total_tokens"] == serving.max_total_tokens
    assert found["max_running_requests"] == serving.max_running_requests
    assert (found["load_format"] == "dummy") == (variant == "fp8")
    override = json.loads(found["json_model_override_args"])
    assert override == ({"quantization_config": QUANTIZATION_CONFIG} if variant == "fp8" else {})
