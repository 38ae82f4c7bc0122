"""What is trained: the model, the problems and how a prompt is made of one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from torl_mega.config.section import Section
from torl_mega.import_path import is_import_path


class ModelConfig(Section):
    path: str
    """Folder with the HF checkpoint (config.json, tokenizer, safetensors) the policy starts from. Source: paper §3.1,
    script:1, Qwen2.5-Math-1.5B and 7B."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights in forward and backward; the optimizer keeps fp32 masters either way. Source:
    verl/workers/fsdp_workers.py:170,236, bf16 compute with fp32 masters and reduction."""
    fp32_head: bool = False
    """Compute logits in fp32 on trainer and servers: most of their mismatch in bf16 is rounding there (MiniMax-M1 2506.13585,
    ScaleRL 2510.13786). Costs an fp32 copy of the head on either side."""
    fp32_router: bool = True
    """Compute the logits of the trainer's routers in fp32; their softmax is in fp32 always. Servers and `transformers` compute
    them in model.dtype."""


class WeightedData(Section):
    path: str
    """As data.train."""
    weight: PositiveFloat = 1.0
    """Its share of the prompts is weight / sum of all weights."""


class ColumnsConfig(Section):
    problem: str | None = None
    """Column of the problem: text, or chat messages of which the last user message counts; `a.b` is field b of column a. None =
    as the known layouts have it."""
    answer: str | None = None
    """Column of the gold answer."""
    extra: tuple[str, ...] = ()
    """Columns kept in `Problem.extra`, for a reward function or a tool."""


def _train_form(value: Any) -> str:
    return "as list" if isinstance(value, list | tuple) else "as text"


class DataConfig(Section):
    train: Annotated[
        Annotated[str, Tag("as text")] | Annotated[tuple[WeightedData, ...], Tag("as list")], Discriminator(_train_form)
    ]
    """Training problems: a .parquet file in ToRL/verl format, a .jsonl file, `arithmetic:SEED` (generated), `pkg.module:function`
    that yields rows, or a list `[{path, weight}]` of these. Source: paper §2.1, 28,740 problems; script:13,22."""
    columns: ColumnsConfig | None = None
    """Which columns of a file hold what, where the layout is none of the known ones (docs/data.md)."""
    source: str | None = None
    """`pkg.module:function` that is called with data.train and yields its rows, instead of a reader of ours."""
    template: str
    """`torl` (the released code's bytes), `torl_paper` (without the line feed after `Assistant:`), any text with `{problem}`, or
    `chat`: the tokenizer's own chat template (docs/own.md). Source: verl/utils/dataset/rl_dataset.py:33-34."""
    system: str | None = None
    """System message with `chat`; `{tools}` in it stands for what the tools are, where the template is not given them."""
    chat_arguments: dict[str, bool | int | str] = Field(default_factory=dict)
    """More for the chat template, such as `{enable_thinking: false}`."""
    max_prompt_tokens: PositiveInt
    """Longest templated prompt of training, in tokens. Source: script:24. Differs: the release keeps 10 tokens back
    (rl_dataset.py:149), which drops prompts of 391 to 400."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What a longer prompt does: stop before step 0 and name it, or leave it out and count it. Source: rl_dataset.py:149,
    left out."""
    retire_above: float | None = Field(default=None, gt=0, le=1)
    """Problems of which at least this share of a step's attempts is right are not drawn again (ScaleRL's no-positive-resampling,
    2510.13786: 0.9). Generated data never repeats a problem."""
    shuffle: bool = True
    """Draw a new order each epoch from `seed`; False keeps the file's order."""
    max_unreadable_golds: float = Field(default=0.05, ge=0, le=1)
    """Share of a file's gold answers that may not be readable for the grader; above it the run does not start. Not asked with
    reward.function."""

    @property
    def specs(self) -> tuple[str, ...]:
        """What `train` names, one by one."""
        return (self.train,) if isinstance(self.train, str) else tuple(part.path for part in self.train)

    @model_validator(mode="after")
    def _own_source(self) -> Self:
        if self.source is not None and not is_import_path(self.source):
            raise ValueError(f"data.source = {self.source!r} is not of the form pkg.module:name")
        if not self.specs:
            raise ValueError("data.train = [] names nothing to train on")
        if self.template != "chat" and (self.system is not None or self.chat_arguments):
            raise ValueError(
                "data.system and data.chat_arguments go with data.template = chat; put them into the template"
            )
        return self
