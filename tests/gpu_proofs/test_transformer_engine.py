"""Transformer Engine's own Python layers, with the GPU image's megatron-core: built for every layout without a GPU.

Names, shapes, marks of parameters and checkpoint keys are those of the local layers, whose numbers tests/parallel compares
with HF; each precision profile comes out as the recipe it is named after. No kernel runs here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

import hf_reference as ref  # noqa: E402
import torch  # noqa: E402
from torchrun import NEXT, run_python  # noqa: E402

TE = ROOT / "build/te"  # made by `make gpu-sources`
MODELS = ["qwen2_untied", "qwen2_tied", "qwen3_untied", "llama_tied"]
MOE = ["qwen3moe_untied", "qwen2moe_untied"]
RECIPES = {
    "default": (None, None, False),
    "fp8_hybrid_delayed": ("TEDelayedScaling", "HYBRID", True),
    "fp8_current": ("Float8CurrentScaling", "HYBRID", True),
    "fp8_blockwise": ("Float8BlockScaling", "E4M3", True),
    "mxfp8": ("MXFP8BlockScaling", "E4M3", True),
}
pytestmark = pytest.mark.skipif(
    not (TE.is_dir() and NEXT.is_dir()),
    reason="NOT PROVEN: run `make gpu-sources` to fetch Transformer Engine's layers",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("te")
    for name in (*MODELS, *MOE):
        family, tied = name.split("_")
        model = ref.make_model(family, tied=tied == "tied", dtype=torch.bfloat16)
        ref.save_model(model, folder / "models" / name)
    results = folder / "results.jsonl"
    worker = Path(__file__).with_name("te_worker.py")
    run_python(worker, results, TE, folder / "models", next_megatron=True, timeout_s=280)
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.parametrize(("model", "layouts", "ranks"), [*((m, 8, 35) for m in MODELS), *((m, 6, 15) for m in MOE)])
def test_layers_are_the_local_ones_in_every_layout(
    table: list[dict[str, Any]], model: str, layouts: int, ranks: int
) -> None:
    """Experts are grouped in one module here, a module each there."""
    rows = [row for row in table if row.get("model") == model]
    assert (len(rows), sum(row["ranks"] for row in rows)) == (layouts, ranks)
    assert all(row["keys"] > 0 for row in rows)
    wrong = [f"{row['layout']}: {text}" for row in rows for text in row["problems"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("profile", RECIPES)
def test_a_precision_profile_is_the_recipe_it_is_named_after(table: list[dict[str, Any]], profile: str) -> None:
    rows = [row for row in table if row.get("recipe") == profile]
    assert len(rows) == 3
    for row in rows:
        found = row["found"]
        assert (found["recipe"], found["format"], found["active"]) == RECIPES[profile], row
        assert found["rope_fusion"]
        assert not row["problems"], row


def test_the_layer_that_the_doctor_tries_has_those_arguments(table: list[dict[str, Any]]) -> None:
    assert table[1]["linear"][:3] == ["self", "in_features", "out_features"]
    assert {"bias", "params_dtype"} <= set(table[1]["linear"])


def test_the_versions_are_those_of_the_image(table: list[dict[str, Any]]) -> None:
    megatron, te = table[0]["versions"]
    pins = (ROOT / "pyproject.toml").read_text()
    assert f'"megatron-core=={megatron.split("+")[0]}"' in pins
    assert f'"transformer_engine=={te.split("+")[0]}"' in pins
