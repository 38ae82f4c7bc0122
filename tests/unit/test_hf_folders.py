"""HF folders as users have them: what a conversion would lose, read differently or overwrite is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))

import hf_reference as ref
import transformers
from rope_files import ACCEPTED, LLAMA3, YARN, change

from torl_mega.errors import ConfigError
from torl_mega.layout import describe_model, read_hf_config
from torl_mega.trainer.weights.hf_io import HfReader, write_hf
from torl_mega.trainer.weights.hf_mapping import all_names
from torl_mega.trainer.weights.target import check_target


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    for family, tied in (("qwen2", True), ("qwen2", False), ("llama", False)):
        ref.save_model(ref.make_model(family, tied=tied, layers=3), folder / f"{family}_{'tied' if tied else 'untied'}")
    return folder


@pytest.fixture
def model(sources: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a source, to be changed."""
    return Path(shutil.copytree(sources / getattr(request, "param", "qwen2_untied"), tmp_path / "model"))


def read(folder: Path) -> HfReader:
    return HfReader(folder, describe_model(read_hf_config(folder)))


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------------------- case 6: left out


@pytest.mark.parametrize("name", ["self_attn.o_proj.bias", "mlp.down_proj.bias", "mlp.gate_proj.weight_scale", "extra"])
def test_case_6_a_tensor_without_a_place_is_named(model: Path, name: str) -> None:
    add(model, {f"model.layers.0.{name}": torch.zeros(64)})
    assert f"tensor model.layers.0.{name} would be left out" in refusal(read, model)


@pytest.mark.parametrize("model", ["llama_untied"], indirect=True)
def test_case_6_biases_that_the_config_does_not_name(model: Path) -> None:
    parts = ("q", "k", "v")
    add(model, {f"model.layers.{n}.self_attn.{p}_proj.bias": torch.ones(64) for n in range(3) for p in parts})
    assert "model.layers.0.self_attn.k_proj.bias and 8 more would be left out" in refusal(read, model)


def test_case_6_layers_beyond_the_config(model: Path) -> None:
    change(model, num_hidden_layers=2)
    text = refusal(read, model)
    assert "model.layers.2." in text
    assert "a Qwen2ForCausalLM of 2 layers has no place for it" in text


def test_case_6_a_tensor_that_the_index_does_not_name(model: Path) -> None:
    names = [*load_file(model / "model.safetensors"), "model.layers.0.secret"]
    add(model, {"model.layers.0.secret": torch.zeros(2)})
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names[:-1], "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.layers.0.secret would be left out" in refusal(read, model)


def test_case_6_old_rotary_buffers_may_go(model: Path) -> None:
    add(model, {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)})
    assert read(model).one_type() is torch.float32


@pytest.mark.parametrize("model", ["qwen2_tied"], indirect=True)
def test_case_6_a_tied_head_may_be_there_as_a_copy_and_nothing_else(model: Path) -> None:
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    add(model, {"lm_head.weight": embedding.clone()})
    read(model)
    add(model, {"lm_head.weight": embedding + 1})
    assert "lm_head.weight would be left out" in refusal(read, model)


# ------------------------------------------------------------------------------------------- case 7: rotary settings


@pytest.mark.parametrize("model", ["qwen2_untied", "llama_untied"], indirect=True)
@pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
def test_case_7_frequencies_are_those_that_transformers_reads(model: Path, settings: dict[str, Any]) -> None:
    from torl_mega.trainer.cpu import backend as cpu_backend

    cpu_backend.install()
    from torl_mega.trainer.model import rope_frequencies

    change(model, **settings)
    found = rope_frequencies(describe_model(read_hf_config(model)))
    config = transformers.AutoConfig.from_pretrained(model)
    wanted = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaling added to version 5": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN},
        "rope_theta 1000000.0: merge them",
    ),
    "half of each head, inside": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5 is not supported",
    ),
    "half of each head, beside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    "yarn without a factor": ({"rope_parameters": {**YARN, "factor": None}}, "yarn with factor = None: expected a number"),
    "llama3 without a factor": (
        {"rope_parameters": {**LLAMA3, "low_freq_factor": "1"}}, "llama3 with low_freq_factor = 1: expected a number"
    ),
    "a setting of SGLang alone": ({"rope_parameters": {**YARN, "attn_factor": 2.0}}, "rope setting attn_factor"),
    "one per kind of layer": ({"rope_parameters": {"full_attention": YARN}}, "rope setting full_attention"),
    "a list": ({"rope_parameters": [1, 2]}, "malformed"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "text"), REFUSED.values(), ids=REFUSED)
def test_case_7_what_would_be_read_differently_is_refused(model: Path, settings: dict[str, Any], text: str) -> None:
    change(model, rope_theta=..., **settings) if "rope_parameters" in settings else change(model, **settings)
    assert text in refusal(describe_model, read_hf_config(model))


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("silent", ["num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", ""])
def test_case_7_where_config_json_is_silent_we_take_what_transformers_takes(name: str, silent: str) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 64,
        "vocab_size": 9,
    }
    written: dict[str, Any] = {
        "num_key_value_heads": 16,
        "head_dim": 16,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1e-5,
    }
    written.pop(silent, None)
    wanted = getattr(transformers, f"{name}Config")(**sizes, **written)
    found = describe_model({"architectures": [f"{name}ForCausalLM"], **sizes, **written})
    head_dim = getattr(wanted, "head_dim", None) or 512 // 64
    assert (found.num_kv_groups, found.head_dim) == (wanted.num_key_value_heads, head_dim)
    assert (found.max_positions, found.norm_eps) == (wanted.max_position_embeddings, wanted.rms_norm_eps)
    assert found.rope_theta == wanted.rope_parameters["rope_theta"]
    assert found.tied == wanted.tie_word_embeddings


# ------------------------------------------------------------------------------------------- case 8: the tensors' type


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_case_8_config_json_names_the_type_of_the_tensors(
    model: Path, tmp_path: Path, keys: tuple[str, ...], dtype: torch.dtype
) -> None:
    config = {k: v for k, v in read_hf_config(model).items() if "dtype" not in k} | dict.fromkeys(keys, "float16")
    tensors = load_file(model / "model.safetensors")
    names = all_names(describe_model(config))
    write_hf(tmp_path / "out", ((name, tensors[name].to(dtype)) for name in names), config=config, source=None)
    written = read_hf_config(tmp_path / "out")
    assert {k for k in written if "dtype" in k} == set(keys or ("torch_dtype",))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is dtype
    assert torch.equal(loaded.state_dict()["model.norm.weight"], tensors["model.norm.weight"].to(dtype))


# ------------------------------------------------------------------------------------------- cases 11 and 14


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([], "index.json is damaged"),
        ({"weight_map": ["model.norm.weight"]}, "index.json is damaged"),
        ({"weight_map": {"model.norm.weight": 5}}, "is missing"),
        ({"metadata": {}}, "index.json is damaged"),
    ],
)
def test_case_11_a_damaged_index_is_one_line(model: Path, index: Any, text: str) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert text in refusal(read, model)


def test_case_11_an_index_that_names_the_wrong_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "a.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": norm}, model / "b.safetensors", {"format": "pt"})
    where = {**dict.fromkeys(tensors, "a.safetensors"), "model.norm.weight": "a.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert "tensor model.norm.weight cannot be read from a.safetensors" in refusal(read, model)
    shutil.copy(model / "a.safetensors", model / "model.safetensors")
    assert "remove the one that is out of date" in refusal(read, model)


def test_case_14_weights_of_two_types_are_named(model: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in load_file(model / "model.safetensors").items()}
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    save_file({**tensors, "lm_head.weight": head}, model / "model.safetensors", {"format": "pt"})
    text = refusal(read(model).one_type)
    assert "lm_head.weight is F32 and model.embed_tokens.weight is BF16" in text


# ------------------------------------------------------------------------------------------- case 3: what is replaced


def converted(source: Path, out: Path) -> None:
    tensors = load_file(source / "model.safetensors").items()
    write_hf(out, tensors, config=read_hf_config(source), source=source)


def test_case_3_an_earlier_result_may_be_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_target(out, model)
    out.mkdir()
    check_target(out, model)
    converted(model, out)
    check_target(out, model)
    (out / "notes.txt").write_text("mine")
    assert "not an earlier result" in refusal(check_target, out, model)


@pytest.mark.parametrize("where", ["model", ".", "..", "model/../model", "other", "file", "link", "mixed", "pt"])
def test_case_3_nothing_else_is_replaced(model: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "file").write_text("x")
    converted(model, tmp_path / "result")
    (tmp_path / "link").symlink_to(tmp_path / "result")
    shutil.copytree(tmp_path / "result", tmp_path / "mixed")
    shutil.copy(model / "model.safetensors", tmp_path / "mixed/model-2.safetensors")  # somebody's own, beside ours
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt/pytorch_model.bin").write_bytes(b"weights")
    before = sorted(tmp_path.rglob("*"))
    text = refusal(check_target, tmp_path / where, model)
    assert "not an earlier result" in text or "is or holds the source" in text
    assert sorted(tmp_path.rglob("*")) == before
