"""The quickstart's base model: the shipped one keeps its card's word, and the tool that makes it is deterministic."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_tiny_base as tool  # noqa: E402
from tiny_base_quality import attempts, faults  # noqa: E402
from tiny_base_traces import TEMPLATE, Mix, interpret, trace, training_problems  # noqa: E402

from torl_mega.data.arithmetic import problems  # noqa: E402
from torl_mega.data.tokenizer import Tokenizer  # noqa: E402
from torl_mega.rollout.python_tool import last_code_block  # noqa: E402

SHIPPED = ROOT / "conf/quickstart"


def test_the_shipped_model_keeps_the_ranges_of_its_card() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    measured, missed = faults(Qwen2ForCausalLM.from_pretrained(SHIPPED).eval(), tokenizer)
    assert missed == []
    assert measured["greedy"].accuracy <= 0.35  # what the quickstart promises of "before"
    printed = re.search(r"\| sampled \| accuracy \| ([\d.]+) \|", (SHIPPED / "README.md").read_text())
    assert printed is not None
    assert abs(float(printed[1]) - measured["sampled"].accuracy) <= 0.02


def test_the_shipped_files_are_small_and_whole() -> None:
    files = {f.name: f.stat().st_size for f in SHIPPED.iterdir()}
    assert set(files) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) < 4_000_000
    assert json.loads((SHIPPED / "config.json").read_text())["max_position_embeddings"] >= 2048 + 128
    assert yaml.safe_load((ROOT / "conf/quickstart.yaml").read_text())["data"]["template"] == TEMPLATE


def test_auto_tokenizer_rebuilds_the_tokenizer_that_was_made() -> None:
    made, shipped = tool.make_tokenizer(0), AutoTokenizer.from_pretrained(SHIPPED)
    assert type(shipped).__name__ == "Qwen2Tokenizer"
    assert made.get_vocab() == shipped.get_vocab()
    assert len(shipped) == tool.VOCAB_SIZE
    rng = random.Random(0)
    for p in islice(problems(2), 50):
        for text, _ in trace(p, rng, Mix()):
            assert made.encode(text) == shipped.encode(text)


def test_the_tokenizer_is_lossless_for_any_text() -> None:
    tokenizer, rng = Tokenizer(SHIPPED), random.Random(0)
    tokenizer.check_lossless()
    for _ in range(200):
        text = "".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(40))
        text = unicodedata.normalize("NFC", text)  # Qwen2's tokenizer normalises, so only NFC can come back
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("2047")
    assert [tokenizer.decode([i]) for i in digits] == ["2", "0", "4", "7"]


def test_observations_of_the_traces_are_what_python_says() -> None:
    """The model is taught real error messages: the interpreter of sums agrees with Python on every form of program."""
    rng, programs = random.Random(0), set[str]()
    for p in islice(training_problems(0), 400):
        programs |= {c for text, _ in trace(p, rng, Mix()) if (c := last_code_block(text.removesuffix("output")))}
    forms = {"".join("9" if ch.isdigit() else ch for ch in c).replace("+", "-"): c for c in programs}
    assert len(forms) >= 5
    for code in [*forms.values(), "a=2\nb=a*3\nprint(b-a)\nprint(b)\n", "print(7\n", "print(q)\n", "x=1\n"]:
        run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
        shown, passed = interpret(code)
        said = run.stdout.strip() or run.stderr.strip().split("\n")[-1] or "(no output)"
        assert (shown, passed) == (said, run.returncode == 0), code


@pytest.mark.parametrize(
    "code", ["__import__('os').system('true')", "while 1: pass", "print(9**9**9)", "(" * 500, "\0"]
)
def test_hostile_programs_only_fail(code: str) -> None:
    assert interpret(code)[1] is False


def test_traces_are_encoded_as_a_rollout_encodes_them() -> None:
    """The pieces of a greedy attempt that calls the tool are, token for token, a trace of pre-training."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = Qwen2ForCausalLM.from_pretrained(SHIPPED).eval()
    torch.manual_seed(0)
    done = attempts(model, tokenizer, list(islice(problems(3), 64)), greedy=False)
    right = [a for a in done if a.called and a.correct]
    assert len(right) >= 5
    for attempt in right:
        text = tokenizer.decode(attempt.ids[attempt.num_prompt :])
        called, _, rest = text.partition("```output")
        shown, _, answer = rest.partition("\n```\n")
        pieces = [called + "```output", shown + "\n```\n", answer.removesuffix("<|endoftext|>")]
        ids = [i for piece in pieces for i in tokenizer.encode(piece)] + [tokenizer.eos_token_id]
        assert attempt.ids[attempt.num_prompt :] == ids


def test_the_same_seed_makes_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        tokenizer = tool.make_tokenizer(3)
        torch.manual_seed(3)
        model = tool.make_model(tokenizer.eos_token_id)
        tool.train(model, tokenizer, tool.Recipe(num_steps=3, batch_size=8), 3)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_check_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    tokenizer = tool.make_tokenizer(0)
    tool.write(tmp_path / "raw", _silent(tool.make_model(tokenizer.eos_token_id)), tokenizer, "says nothing")
    assert tool.main(["--check", str(tmp_path / "raw")]) == 1
    assert "sampled accuracy is 0.000, the card says 0.15 to 0.30" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["raw"]  # nothing half-written beside it


@torch.no_grad()
def _silent(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The model with weights under which EOS is always next."""
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
    model.lm_head.weight[model.config.eos_token_id] = 1.0
    return model
