"""Every command line of a GPU server that a shipped config would start, and its environment, as SGLang's own code reads them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

import hf_reference as ref  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rope_files import ACCEPTED, YARN, change  # noqa: E402
from torchrun import run_python  # noqa: E402

from torl_mega.config import Config  # noqa: E402
from torl_mega.config_file import load_config  # noqa: E402
from torl_mega.errors import ServerError  # noqa: E402
from torl_mega.launch.gpu_env import gpu_environment  # noqa: E402
from torl_mega.layout import describe_model  # noqa: E402
from torl_mega.planner.hardware import GPUS, Assumptions  # noqa: E402
from torl_mega.planner.known_models import hf_config  # noqa: E402
from torl_mega.planner.memory import server_memory, sglang_reserve  # noqa: E402
from torl_mega.serving.fp8_format import QUANTIZATION_CONFIG  # noqa: E402
from torl_mega.serving.sglang_server import PLAIN, Room, launch_command  # noqa: E402

SHIPPED = sorted(p for p in (*ROOT.glob("conf/torl_*.yaml"), *ROOT.glob("conf/clusters/torl_*.yaml")))
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "deterministic": ["serving.deterministic=true"],
    "fp8": ["serving.weight_dtype=fp8_block"],
    "limited": ["serving.max_total_tokens=131072", "serving.max_running_requests=256"],
    "in turns": [],
}
GPUS_OF = [
    ("h100", 1, {}),
    ("h100", 2, {}),
    ("h100", 8, {}),
    ("h200", 4, {}),
    ("b200", 2, {}),
    ("h100", 2, {"requests": 64}),
]
"""GPU, serving.tensor, limits: what SGLang keeps free there is what the plan books."""
OWN_FACTOR = {**YARN, "rope_theta": 1e4, "attention_factor": 1.3}
CASES = [(conf.stem, variant) for conf in SHIPPED for variant in VARIANTS]
# of a job: nothing said, a setting of the site's own, a folder for compiled kernels
JOBS: list[dict[str, str]] = [{}, {"NCCL_CUMEM_ENABLE": "1"}, {"TORL_CACHE": "/scratch/kernels"}]
Read = dict[tuple[str, str], tuple[Config, dict[str, Any]]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Config], dict[str, Any]]:
    """The configs, and what one start of SGLang's own code makes of all their commands and environments."""
    folder = tmp_path_factory.mktemp("commands")
    configs, commands = [], []
    for conf in SHIPPED:
        model = folder / Path(load_config(conf).model.path).name
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text(json.dumps(hf_config(model.name)))
        for variant, overrides in VARIANTS.items():
            configs.append(load_config(conf, [f"model.path={model}", *overrides]))
            room = planned(configs[-1]) if variant == "in turns" else PLAIN
            command = launch_command(configs[-1], host="10.0.0.7", port=30000, on_gpu=True, room=room)
            assert command[1:3] == ["-m", "sglang.launch_server"]
            commands.append(command[3:])
    ours = [{**job, **gpu_environment(configs[0].runs_dir, job)} for job in JOBS]
    ropes = []
    ref.save_model(ref.make_model("qwen2", tied=True, layers=1), folder / "model")
    for n, settings in enumerate([*ACCEPTED.values(), {"rope_parameters": OWN_FACTOR}]):
        ropes.append(str(shutil.copytree(folder / "model", folder / f"rope_{n}")))
        change(Path(ropes[-1]), **settings)
    file = folder / "questions.json"
    questions = {"commands": commands, "environments": [*JOBS, *ours], "model": str(ROOT / "conf/quickstart")}
    gpus = []
    for gpu, tensor, limits in GPUS_OF:
        words = ["--tp-size", str(tensor), "--enable-memory-saver", "--cuda-graph-backend-prefill", "breakable"]
        words += ["--max-running-requests", str(limits["requests"])] if limits else []
        gpus.append([GPUS[gpu].memory / 2**20, words])
    file.write_text(json.dumps({**questions, "ropes": ropes, "gpus": gpus}))
    output = run_python(Path(__file__).with_name("sglang_reads.py"), file, timeout_s=200)
    return configs, {**json.loads(output.splitlines()[-1]), "models": ropes}


@pytest.fixture(scope="module")
def read(asked: tuple[list[Config], dict[str, Any]]) -> Read:
    """Config and what SGLang reads in its command line, by (config, variant)."""
    configs, answers = asked
    return dict(zip(CASES, zip(configs, answers["commands"], strict=True), strict=True))


@pytest.mark.parametrize(("conf", "variant"), CASES)
def test_sglang_reads_what_we_mean(read: Read, conf: str, variant: str) -> None:
    config, found = read[conf, variant]
    serving = config.serving
    assert (found["model_path"], found["host"], found["port"]) == (config.model.path, "10.0.0.7", 30000)
    assert (found["tp_size"], found["dtype"]) == (serving.tensor, "bfloat16")
    assert found["device"] is None or found["device"] == "cuda", "a GPU server names no CPU"
    room = planned(config) if variant == "in turns" else PLAIN
    assert found["mem_fraction_static"] == (room.mem_fraction or serving.mem_fraction)
    assert found["context_length"] > config.max_context_tokens
    assert found["enable_deterministic_inference"] == serving.deterministic
    assert found["enable_memory_saver"] == (variant == "in turns")
    assert found["max_total_tokens"] == (room.kv_tokens or serving.max_total_tokens)
    assert found["max_running_requests"] == serving.max_running_requests
    assert (found["load_format"] == "dummy") == (variant == "fp8")
    override = json.loads(found["json_model_override_args"])
    assert override == ({"quantization_config": QUANTIZATION_CONFIG} if variant == "fp8" else {})


@pytest.mark.parametrize("n", range(len(GPUS_OF)))
def test_case_9_the_plan_books_what_sglang_keeps_free(asked: tuple[list[Config], dict[str, Any]], n: int) -> None:
    gpu, tensor, limits = GPUS_OF[n]
    limit = [f"serving.max_running_requests={limits['requests']}"] if limits else []
    config = load_config(ROOT / "conf/torl_7b.yaml", [f"serving.tensor={tensor}", *limit])
    total = GPUS[gpu].memory
    _, reserve = sglang_reserve(config, GPUS[gpu])
    assert asked[1]["fractions"][n] == round((total - reserve) / total, 3)


@pytest.mark.parametrize("n", range(len(JOBS)))
def test_both_ends_of_the_weight_group_have_the_same_nccl_settings(
    asked: tuple[list[Config], dict[str, Any]], n: int
) -> None:
    """What SGLang chooses by itself is what ranks get, and what the job says reaches both."""
    configs, answers = asked
    alone, with_ours = answers["environments"][n], answers["environments"][len(JOBS) + n]
    rank = {**JOBS[n], **gpu_environment(configs[0].runs_dir, JOBS[n])}
    chosen = {name: value for name, value in alone.items() if name.startswith("NCCL_")}
    assert {"NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"} <= chosen.keys()
    assert chosen == {name: value for name, value in rank.items() if name.startswith("NCCL_")}
    assert chosen == {name: value for name, value in with_ours.items() if name.startswith("NCCL_")}


@pytest.mark.parametrize("n", range(len(JOBS)))
def test_kernels_are_kept_where_the_container_does_not_end(asked: tuple[list[Config], dict[str, Any]], n: int) -> None:
    configs, answers = asked
    folder = JOBS[n].get("TORL_CACHE") or str(Path(configs[0].runs_dir).resolve() / ".cache")
    caches = {k: v for k, v in answers["environments"][len(JOBS) + n].items() if not k.startswith("NCCL_")}
    assert {"TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"} <= caches.keys()
    assert all(place.startswith(folder) for place in caches.values()), caches
    rank = {**JOBS[n], **gpu_environment(configs[0].runs_dir, JOBS[n])}
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert rank[name].startswith(folder)
        assert rank[name] == caches[name]


def planned(config: Config) -> Room:
    """What a server's side-car is told on the config's own hardware."""
    memory = server_memory(
        describe_model(hf_config(config.model.path)), config, GPUS[config.cluster.gpu], Assumptions()
    )
    return Room(int(memory.kv_tokens), memory.mem_fraction, in_turns=True)


def hf_rotary(model: str, positions: int) -> torch.Tensor:
    """[positions, head size]: cosines, then sines, of transformers."""
    rotary = transformers.AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = cos.size(-1) // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], -1)


@pytest.mark.parametrize("n", range(len(ACCEPTED)), ids=list(ACCEPTED))
def test_case_7_sglang_turns_heads_as_transformers_does(asked: tuple[list[Config], dict[str, Any]], n: int) -> None:
    found, model = torch.tensor(asked[1]["ropes"][n]), asked[1]["models"][n]
    torch.testing.assert_close(found, hf_rotary(model, len(found)), rtol=0, atol=2e-6)


def test_case_7_a_factor_that_sglang_leaves_out_is_not_served(asked: tuple[list[Config], dict[str, Any]]) -> None:
    found, model = torch.tensor(asked[1]["ropes"][-1]), asked[1]["models"][-1]
    assert float((found - hf_rotary(model, len(found))).abs().max()) > 0.1
    few = ["data.max_prompt_tokens=64", "eval.max_prompt_tokens=64", "rollout.max_response_tokens=64"]
    config = load_config(SHIPPED[0], [f"model.path={model}", *few])
    with pytest.raises(ServerError, match=r"attention_factor = 1\.3, which SGLang leaves out"):
        launch_command(config, host="127.0.0.1", port=1, on_gpu=True)
    change(Path(model), rope_parameters={**OWN_FACTOR, "attention_factor": 0.1 * math.log(4.0) + 1})
    launch_command(config, host="127.0.0.1", port=1, on_gpu=True)
