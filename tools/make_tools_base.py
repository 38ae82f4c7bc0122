"""Makes conf/quickstart_tools: a chat model of 0.5M parameters, questions for two tools, and the texts that one of them searches.

    python tools/make_tools_base.py --out conf/quickstart_tools       (13 minutes, one core)

Half of the questions are sums (`Compute 37*45-12.`), which Python answers and the texts do not; the other half ask for a number
that stands in one of 1,200 texts (`Code of kelotavi?`), which `search` finds and Python cannot know. The base model has seen both
tools used for both, right and wrong, so that choosing is what is left to learn.

Traces are encoded by the very code that a rollout uses (`ChatTools`), so a rollout meets no token sequence it has not seen.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import make_tiny_base as tiny
import torch
from tiny_base_traces import interpret
from transformers import GenerationConfig

from torl_mega.data.arithmetic import problems
from torl_mega.data.tokenizer import Tokenizer
from torl_mega.rollout.chat import ChatTools, make_chat
from torl_mega.rollout.fences import FencedTools
from torl_mega.rollout.python_tool import Limits, PythonTool
from torl_mega.rollout.search import make_search
from torl_mega.rollout.tools import NoSandbox
from torl_mega.types import ExecutionStatus, ToolCall

VOCAB_SIZE = 512
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
NUM_FACTS, NUM_TRAIN, NUM_EVAL = 1200, 2000, 256
CHAT_TEMPLATE = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{- tool.function.name + ': ' + tool.function.description + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

Fact = tuple[str, str]  # word, number
Question = dict[str, str]


def facts(seed: int) -> list[Fact]:
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < NUM_FACTS:
        words["".join(rng.choices(SYLLABLES, k=4))] = None
    return [(word, str(rng.randrange(1000, 10_000))) for word in words]


def questions(known: list[Fact], seed: int) -> Iterator[Question]:
    """Endless, one kind after the other."""
    rng, sums = random.Random(seed), problems(seed)
    while True:
        sum_ = next(sums)
        yield {"problem": f"Compute {sum_.problem}.", "answer": sum_.answer, "source": "sums"}
        word, number = rng.choice(known)
        yield {"problem": f"Code of {word}?", "answer": number, "source": "facts"}


def call(name: str, **arguments: str) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def trace(question: Question, known: dict[str, str], rng: random.Random) -> list[tuple[str, ToolCall | None]]:
    """The turns of one answer, each with what its call was answered."""
    asked = question["problem"].split()[-1][:-1]
    right = question["answer"]
    wrong = str(max(0, int(right) + rng.choice((-300, -100, -20, -10, -1, 1, 10, 20, 100, 300))))
    draw = rng.random()
    if draw < 0.25:
        return [(f"It is \\boxed{{{wrong}}}.", None)]
    if rng.random() < 0.5:
        code = f"print({asked})"
        said, passed = interpret(code)
        status = ExecutionStatus.OK if passed else ExecutionStatus.ERROR
        turn, made = call("python", code=code), ToolCall(code, status, 0, said, 0.0)
    else:
        found = f"[facts] The code of {asked} is {known[asked]}." if asked in known else "(nothing found)"
        turn, made = call("search", query=asked), ToolCall(asked, ExecutionStatus.OK, None, found, 0.0, tool="search")
    answered = right in made.observation
    return [(turn, made), (f"So \\boxed{{{right if answered else wrong}}}.", None)]


def make_tokenizer(corpus: list[str]) -> Any:
    tokenizer = tiny.qwen2_tokenizer(corpus, VOCAB_SIZE - len(tiny.SPECIAL_TOKENS) - len(MARKUP))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tiny.SPECIAL_TOKENS[1:])})
    tokenizer.add_tokens(list(MARKUP))
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(chat: ChatTools, tokenizer: Tokenizer, question: Question, turns: Any) -> tuple[list[int], list[int]]:
    """Token ids [T] and labels [T], -100 where the policy does not write."""
    ids = list(chat.template.prompt(question["problem"]))
    labels = [-100] * len(ids)
    for text, made in turns:
        written = [*tokenizer.encode_with_special(text), chat.end_ids[0]]
        inserted = list(chat.follow([made])) if made is not None else []
        ids += written + inserted
        labels += written + [-100] * len(inserted)
    return ids, labels


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The base model of the quickstart with two tools

A Qwen2 of {num:,} parameters with a chat template, pre-trained from random weights for {steps} steps of 64 generated
conversations. Made by

    python tools/make_tools_base.py --out conf/quickstart_tools --seed {seed}

No data or weights of anybody else went into it; it is good for one test of a training loop. 25 % of the conversations answer at
once, wrongly; the others call `python` or `search`, by a coin's throw, and read what they find.

`train.jsonl` and `eval.jsonl` hold the questions, half of them sums, half about `texts/facts.txt`; none of the evaluation's words
or sums were in a conversation.
"""


def make(out: Path, *, seed: int, num_steps: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    known = facts(seed)
    unseen, seen = known[:NUM_EVAL], known[NUM_EVAL:]
    fresh = tiny.temporary_for(out)
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "texts").mkdir(parents=True)
    (fresh / "texts/facts.txt").write_text(
        "\n\n".join(f"The code of {word} is {number}." for word, number in known) + "\n"
    )
    for name, source, count, first in (("train", seen, NUM_TRAIN, 5000), ("eval", unseen, NUM_EVAL, 6000)):
        rows = islice(questions(source, seed + first), count)
        (fresh / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng, table = random.Random(seed), dict(known)
    corpus = []
    for question in islice(questions(seen, seed + 1), 600):
        corpus.append(question["problem"])
        corpus += [
            part for text, made in trace(question, table, rng) for part in (text, made.observation if made else "")
        ]
    corpus += ["system\nuser\nassistant\npython: Runs a Python program and returns what it prints.\n"
               "search: Finds passages in a collection of texts by their words.\n"] * 200  # fmt: skip
    hf = make_tokenizer(corpus)
    torch.manual_seed(seed)
    end = hf.convert_tokens_to_ids("<|im_end|>")
    model = tiny.make_model(end, VOCAB_SIZE)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=True)
    hf.save_pretrained(fresh)
    model.save_pretrained(fresh)
    tokenizer = Tokenizer(fresh)
    box = FencedTools(
        {"search": make_search(fresh / "texts", max_chars=1024)}, PythonTool(NoSandbox(), Limits(1, 1, 1, 1))
    )
    chat = make_chat(box, tokenizer, system=None, arguments={}, family="auto")

    def conversations() -> Iterator[tuple[list[int], list[int]]]:
        for question in questions(seen, seed + 2):
            yield encode(chat, tokenizer, question, trace(question, table, rng))

    rows = conversations()
    batches = (tiny.padded(list(islice(rows, 64)), end) for _ in range(num_steps))
    tiny.fit(model, batches, num_steps=num_steps, lr=2e-3)
    model.save_pretrained(fresh)
    num = sum(p.numel() for p in model.parameters())
    (fresh / "README.md").write_text(CARD.format(num=num, steps=num_steps, seed=seed))
    for file in fresh.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    tiny.replace_folder(fresh, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=2000)
    args = parser.parse_args()
    make(args.out, seed=args.seed, num_steps=args.num_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
