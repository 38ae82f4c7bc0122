"""The one strict config tree. Loading, overrides and error texts live in `config_file.py`.

Every section is frozen and refuses unknown keys. A default lives in exactly one place: what belongs to the training
recipe of ToRL has no default here and stands in `conf/base.yaml`; what is mechanics (time limits, buffer sizes) or an
option that ToRL does not have is given its default here, with its unit and its reason in the field's docstring.

A recipe field's docstring ends in `Source:`, where ToRL's value was found, and `Differs:` where ours is another on purpose;
`tools/make_recipe_doc.py` makes docs/recipe.md of them. "paper" is arXiv 2503.23383; "script" its scripts/torl_1.5b.sh, and
file names are those of GAIR-NLP/ToRL at cb78cf1, whose verl is a copy of its own ("verl" in the path).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from torl_mega.import_path import is_import_path

Url = Annotated[str, Field(pattern=r"^https?://.*[^/]$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
SHAPING = ("code_error", "overlong", "tool_cost", "format_error")  # names of the reward's summands besides the answer's
AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "batch_std", "reinforce_pp"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


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


class RolloutConfig(Section):
    prompts_per_step: PositiveInt
    """Prompts per RL step. Source: paper §3.1, script:2."""
    group_size: PositiveInt
    """Trajectories per prompt. Source: paper §3.1, script:3."""
    max_response_tokens: PositiveInt
    """Budget for one response: sampled plus inserted tokens. Source: script:25. Differs: exact at every turn; the release
    lets each call write 3,072 tokens and cuts the whole afterwards (vllm_rollout_spmd.py:162,360)."""
    max_tool_calls: int = Field(ge=0)
    """C of the paper: calls that run per answer; after them the policy goes on in text, without the stop string. Source:
    paper §3.1, C = 1."""
    protocol: str = "torl"
    """How calls are written: `torl`, fenced blocks as in the paper; `chat`, as the model's chat template has them; or
    `pkg.module:Class` of your own (docs/own.md)."""
    call_format: Literal["auto", "hermes", "llama3", "fenced"] = "auto"
    """How a chat model writes a call: `<tool_call>` JSON, Llama 3's JSON, a fenced block of the tool's name. auto reads it off the
    chat template, fenced where that knows no tools."""
    tools: tuple[str, ...] = ("python",)
    """What may be called: `python` (a program in the sandbox, the paper's tool), `python_session` (the same, with variables that
    live as long as the trajectory), `search` (texts of search_folder) and `pkg.module:Class` of your own."""
    search_folder: str | None = None
    """Folder of .txt, .md and .jsonl files that the tool `search` finds passages in (BM25)."""
    search_max_chars: PositiveInt = 1024
    """How much of a search's answer is shown."""
    temperature: float = Field(gt=0)
    """Sampling temperature of training rollouts. Source: paper §3.1, script:42."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus; below 1 the sampled distribution is not the trained one. Source: script:43."""
    oversample: float = Field(default=1.0, ge=1)
    """Prompts started per prompt that a step needs. Above 1 the step ends with its first `prompts_per_step` complete groups;
    the slower ones are cut off and their prompts come first in the next step. Which ones those are depends on timing, so
    exact repetition needs 1."""
    refill_rounds: PositiveInt = 4
    """Further collections of a step, at most, with algo.zero_signal = refill."""
    attempts_per_prompt: PositiveInt | None = None
    """Attempts at each prompt, of which `group_size` are kept by GRPO-RoC: correct ones with the fewest failed calls first.
    None = group_size, all kept. rStar2 takes twice the group size."""
    max_concurrency: PositiveInt = 4096
    """Trajectories in flight at once; the rest wait without cost."""
    trajectory_deadline_s: PositiveFloat = 1800.0
    """Wall-clock limit of one trajectory; past it the trajectory is dropped and counted as a fault."""
    max_staleness: int = Field(default=0, ge=0)
    """Policy versions a token may lag behind the update that uses it; 0 = exactly on-policy (the paper), 1 = the next step
    is sampled while this one is trained on, above = servers take new weights in the middle of trajectories."""
    pause: Literal["in_place", "retract"] = "retract"
    """What trajectories under way do while servers take new weights (max_staleness > 1): `retract` computes their KV cache
    anew, `in_place` goes on with the old one."""
    replay: str | None = None
    """Run folder whose recorded trajectories are trained on instead of sampling; no server is started."""

    @model_validator(mode="after")
    def _tools_can_be_had(self) -> Self:
        if self.protocol not in ("torl", "chat") and not is_import_path(self.protocol):
            raise ValueError(
                f"rollout.protocol = {self.protocol!r} is neither torl, chat nor of the form pkg.module:Class"
            )
        for tool in self.tools:
            if tool not in ("python", "python_session", "search") and not is_import_path(tool):
                raise ValueError(
                    f"rollout.tools: {tool!r} is neither python, python_session, search nor of the form pkg.module:Class"
                )
        if {"python", "python_session"} <= set(self.tools):
            raise ValueError("rollout.tools has python and python_session; both are called python, take one")
        if ("search" in self.tools) != (self.search_folder is not None):
            raise ValueError("rollout.tools names search if and only if rollout.search_folder says what is searched")
        if len(set(self.tools)) < len(self.tools) or not self.tools:
            raise ValueError(f"rollout.tools = {list(self.tools)} names a tool twice, or none")
        return self


class SandboxConfig(Section):
    address: str | None = Field(default=None, pattern=r"^(unix:/|https?://)")
    """`unix:/path` or `http://host:port[,http://…]` (SandboxFusion) of a running sandbox; None starts one beside the trainer."""
    wall_s: PositiveFloat = 5.0
    """Wall-clock limit of one snippet, counted from its own start. Source: SandboxFusion's own default (sandbox_api.py:41),
    which vllm_rollout_spmd.py:110 relies on."""
    cpu_s: PositiveFloat = 5.0
    """CPU limit of one snippet. Source: SandboxFusion has the wall-clock limit alone. Differs: a limit below it would end
    programs that ran there, so the recipe sets the same."""
    memory_mb: PositiveInt = 512
    """Address space a snippet may add to the interpreter's own; over HTTP the default of `memory_limit_MB`. Source:
    SandboxFusion has no limit by default (sandbox_api.py:43). Differs: one program must not take a node's memory."""
    output_bytes: PositiveInt = 65536
    """Kept per stream, head and tail; far above it (`flood_bytes`) the snippet is stopped."""
    session_wall_s: PositiveFloat = 30.0
    """Limit of all calls of one `python_session` together, with the earlier programs that each of them runs again."""
    tier: Literal["auto", "A", "B", "C"] = "auto"
    """Confinement: auto takes the strongest of A (namespaces) and B (Landlock or a user of its own) that works; C does not isolate
    and must be asked for."""
    max_running: int = Field(default=0, ge=0)
    """Snippets in their first 50 ms at once; the rest wait in the queue. 0: cores + 2."""
    max_aside: int = Field(default=224, ge=0)
    """Snippets that have run for longer and go on at the lowest priority beside those, as far as memory allows."""
    zygotes: int = Field(default=0, ge=0)
    """Fork servers for ordinary snippets; each forks one snippet at a time. 0: one per four cores."""
    data_libraries: bool = True
    """Keep a second kind of zygote with scipy, pandas and matplotlib, about 150 MB each; without, importing them costs 1.5 s."""
    recycle_after: PositiveInt = 50_000
    """Snippets after which a zygote is replaced, so that nothing that might creep can creep for ever."""
    max_threads: PositiveInt = 64
    """Threads of one snippet."""
    scratch_mb: PositiveInt = 32
    """Files of one snippet, together (tmpfs in tier A), and the size of a single one."""
    scratch_inodes: PositiveInt = 1024
    """Number of files and folders of one snippet."""
    flood_bytes: PositiveInt = 16 << 20
    """Output of one stream past which a snippet is killed as `output_limit`."""
    max_output_bytes: PositiveInt = 8 << 20
    """Ceiling for `output_bytes` of a request."""
    max_fetch_bytes: PositiveInt = 32 << 20
    """Ceiling for the files read back from one snippet, together."""
    max_wall_s: PositiveFloat = 600.0
    """Ceiling for a request's wall and CPU limits; larger ones are cut to it."""
    max_memory_mb: PositiveInt = 8192
    """Ceiling for a request's memory limit; larger ones are cut to it."""
    max_queue: PositiveInt = 16384
    """Requests over HTTP that may wait; beyond it the answer is 503 with Retry-After."""
    nice: int = Field(default=0, ge=0, le=19)
    """Niceness of snippets, for nodes whose cores they share with a trainer."""
    deterministic_random: bool = False
    """Seed `random`, numpy and sympy from the program's own text instead of from the system, for runs that must repeat exactly."""
    uid_base: PositiveInt = 65000
    """As root: the user snippets run as in tier A, and the first of one user per slot in tier B. No account may use them."""
    readable_paths: tuple[str, ...] = ()
    """Further paths snippets may read, such as libraries outside the interpreter's prefix."""
    scratch_dir: str | None = None
    """Where tier B puts working folders; None is the system's temporary folder. Tier A writes nothing to disk."""


_PLANNED = {
    "--max-total-tokens": "serving.max_total_tokens",
    "--mem-fraction-static": "serving.mem_fraction",
    "--enable-memory-saver": "cluster.turns",
}


class ServingConfig(Section):
    num_servers: PositiveInt = 1
    """SGLang servers started on one machine without GPUs; elsewhere `cluster` says how many."""
    tensor: PositiveInt = 1
    """Tensor-parallel size of each server."""
    expert: PositiveInt = 1
    """Ranks of a server over which the experts of each layer are spread, whole; of the others each rank holds a cut. Divides
    `tensor`."""
    urls: tuple[Url, ...] = ()
    """Servers that run already; when given, none is started."""
    router: Url | None = None
    """URL of an sglang-router in front of `urls`: it chooses the server of each generation. None: we do, by prefix and load."""
    max_total_tokens: PositiveInt | None = None
    """Most tokens of KV cache; None = what serving.mem_fraction leaves beside the weights."""
    weight_dtype: Literal["model", "fp8_block"] = "model"
    """What servers hold: the trainer's weights as they are (model.dtype), or its linear layers quantised to FP8 in blocks of
    128 x 128 at every sync (GPUs only)."""
    prefix_cache: bool = True
    """Keep the KV cache of finished prompts and turns for requests that begin alike. Without it every turn computes its
    whole context again, which is cheaper where contexts are some hundred tokens of a small model on a CPU."""
    max_running_requests: PositiveInt | None = None
    """Requests decoded together; None is SGLang's own choice."""
    mem_fraction: float = Field(default=0.75, gt=0, lt=1)
    """Share of a GPU's whole memory for weights and KV cache. The plan turns it into tokens, which a server holds whatever else
    was on its GPUs when it started; ignored on CPU."""
    startup_timeout_s: PositiveFloat = 1800.0
    """From start to the first 200 of /ready; a cold file system takes minutes, and kernels compiled for the first time more."""
    request_timeout_s: PositiveFloat = 600.0
    """One generation; past it the request is aborted and tried again."""
    max_retries: int = Field(default=3, ge=0)
    """Tries after the first for a request that met a dead, hanging or failing server."""
    hang_timeout_s: PositiveFloat = 120.0
    """A server whose scheduler says nothing for this long hangs: its requests move on and it is started anew. Above one
    bucket's transfer and one prefill, during which the scheduler is deaf."""
    max_restarts: int = Field(default=20, ge=0)
    """Unexpected deaths of one server in one run; past it the side-car ends and says so."""
    transport: Literal["auto", "broadcast", "handles", "disk"] = "auto"
    """How weights travel: process-group broadcast (gloo/NCCL), colocated handles (by value/CUDA IPC), or safetensors on disk.
    `auto` takes what fits the placement: handles where ranks and servers share GPUs, else broadcast; disk, where there is
    `disk_dir`, for `urls` and for servers on GPUs without a rank."""
    sync_host: str | None = None
    """Address of rank 0 that servers reach for the broadcast group. None: the one from which rank 0 reaches the servers."""
    disk_dir: str | None = None
    """Folder on a file system that trainer and servers share, for `disk`; one copy of the weights at a time."""
    bucket_mb: PositiveInt = 512
    """Size of one flattened weight bucket; the sync needs at most two of them."""
    sync_timeout_s: PositiveFloat = 600.0
    """One whole weight sync; past it the run stops and names the server."""
    deterministic: bool = False
    """Same seeds, same tokens and log-probs, bit for bit: SGLang's deterministic inference on GPUs; on a CPU one request
    at a time without prefix cache (slow, for exact comparisons)."""
    extra_args: tuple[str, ...] = ()
    """Further `sglang.launch_server` arguments, passed on as they are."""

    @model_validator(mode="after")
    def _routed(self) -> Self:
        if taken := next((word for word in self.extra_args if word.partition("=")[0] in _PLANNED), None):
            raise ValueError(
                f"serving.extra_args has {taken}, which the plan decides; set {_PLANNED[taken.partition('=')[0]]} instead"
            )
        if self.router is not None and not self.urls:
            raise ValueError(
                "serving.router needs serving.urls, the servers behind it: weights go to each of them directly"
            )
        if self.transport == "disk" and self.disk_dir is None:
            raise ValueError("serving.transport = disk needs serving.disk_dir, a folder that both sides see")
        return self


class RewardConfig(Section):
    correct: float
    """Reward of a correct answer. Source: paper §2.3, math_verifier.py:60."""
    wrong: float
    """Reward of a wrong or missing answer. Source: paper §2.3, math_verifier.py:66. Differs: the box must stand in prose
    that the policy wrote; the release also reads boxes in observations and programs."""
    code_error: float = Field(default=0.0, le=0)
    """Added when a program of the trajectory did not run. Source: paper §2.3 has -0.5 as an option, §3.1 leaves it off.
    Differs: the release also fines answers without a call (naive.py:72)."""
    overlong: float = Field(default=0.0, le=0)
    """Added to a response that uses up its token budget, growing from 0 over the buffer before it (DAPO, 2503.14476); 0 = off."""
    overlong_buffer_tokens: PositiveInt = 512
    """Tokens before rollout.max_response_tokens over which `overlong` grows."""
    tool_cost: float = Field(default=0.0, le=0)
    """Added for every program that ran; 0 = off."""
    tool_cost_floor: float = Field(default=-0.5, le=0)
    """What `tool_cost` comes to at most, however many programs ran."""
    format_error: float = Field(default=0.0, le=0)
    """Added to a response without a final box; 0 = off."""
    function: str | None = None
    """A function of your own instead of the comparison of answers, `pkg.module:name` (docs/own.md): called in a killable process
    within grader_timeout_s; the shaping options are added to it."""
    checker: Literal["own", "math_verify"] = "own"
    """Who compares answers: this project's grader, or math-verify with its defaults as the paper's reward does."""
    grader_timeout_s: PositiveFloat = 5.0
    """Limit of one answer check; past it the answer is wrong and counted as `grader_timeout`."""
    grader_workers: PositiveInt = 2
    """Killable grader processes that check at once; hanging ones are set aside and do not take a place."""
    grader_memory_mb: PositiveInt = 1024
    """Address space one check may add to the interpreter's own."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.function is not None and not is_import_path(self.function):
            raise ValueError(f"reward.function = {self.function!r} is not of the form pkg.module:name")
        if self.correct <= self.wrong:
            raise ValueError(f"reward.correct = {self.correct} is not above reward.wrong = {self.wrong}")
        penalties = [self.code_error, self.overlong, self.tool_cost and self.tool_cost_floor, self.format_error]
        if self.correct + sum(penalties) <= (self.correct + self.wrong) / 2:
            active = ", ".join(f"{n} {p}" for n, p in zip(SHAPING, penalties, strict=True) if p)
            raise ValueError(
                f"reward penalties ({active}) together bring a correct answer ({self.correct}) down to the middle between "
                f"correct and wrong or below; their sum must stay above {(self.wrong - self.correct) / 2}"
            )
        return self


class AlgoConfig(Section):
    advantage: AdvantageKind
    """(reward - baseline) / scale; docs/algorithms.md has the kinds. Source: paper §3.1, script:19,
    core_algos.py:146-151. Differs: a group of one has advantage 0, not its reward."""
    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """PPO's clip per token, GSPO's per sequence, or CISPO's clipped weight that keeps every token's gradient. Source: paper
    §3.1, core_algos.py:299."""
    clip_low: float = Field(gt=0, le=1)
    """Lower side of the ratio clip: 1 - clip_low. Source: ppo_trainer.yaml:35."""
    clip_high: float = Field(gt=0)
    """Upper side: 1 + clip_high (0.28 is DAPO's clip-higher). Source: ppo_trainer.yaml:35."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, most that a token counts, in advantages: bounds ratios far above 1 (1912.09729; verl
    takes 3). Source: none in core_algos.py:299."""
    loss_agg: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "prompt_mean"]
    """Tokens of the mini-batch alike; every sequence alike; sums over a constant length (Dr. GRPO); every prompt alike.
    Source: dp_actor.py:283-312, the token mean of every micro-batch, weighed by sequences. Differs: that depends on packing
    and on the number of GPUs; ours is the token mean of the whole mini-batch."""
    kl_coef: float = Field(ge=0)
    """Weight of the KL to the starting policy. Source: paper §3.1, script:7-8. Differs: at 0 no reference pass is made."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL; k3 is clamped at 10. Source: script:33, core_algos.py (low-var k3)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or its sum over the response taken off the reward. Source: script:9,50."""
    ref_every_steps: int = Field(default=0, ge=0)
    """RL steps after which the reference becomes the current policy; 0 = the starting weights for ever."""
    entropy_coef: float = Field(ge=0)
    """Weight of the entropy bonus. Source: script:10."""
    router_replay: Literal["off", "rollout", "old"] = "off"
    """Models with experts: every pass of the trainer takes, token by token, the experts that the server took (R3, 2510.11370), or
    those of the old-log-prob pass (R2, 2507.18071 §5.3). Their weights still come from the trainer's own router."""
    router_aux_coef: float = Field(default=0.0, ge=0)
    """Weight of the loss that makes routers choose all experts alike, per sequence and layer (DeepSeek-V3 2412.19437, 2.1.2). 0 in
    GRPO: it pulls against the reward."""
    correction: Literal["none", "tis", "seq_tis", "mis", "geo", "geo_tis"] = "none"
    """Correction between server and trainer, off- or on-policy: importance sampling truncated per token or sequence, masked
    per token, geometric-mean rejection of sequences, or that with `tis`. Left out, it is `tis` where rollout.max_staleness >
    0."""
    correction_low: float = Field(default=0.5, ge=0)
    """Ratios below it are masked (mis)."""
    correction_high: float = Field(default=2.0, gt=0)
    """Ratios above it are truncated (tis, seq_tis, geo_tis) or masked (mis)."""
    correction_geo: tuple[float, float] | None = None
    """Bounds of the geometric-mean ratio, for geo and geo_tis; None = [0.999, 1.001], as in all of verl's presets: a mean over
    a sequence moves far less than a token."""
    correction_veto: float | None = Field(default=None, gt=0, lt=1)
    """A token with a ratio below it drops its whole sequence; 1e-4 catches what is a fault, no drift."""
    zero_signal: Literal["keep", "drop", "refill"] = "keep"
    """Groups whose advantages are all zero: counted in the mean, left out of it, or replaced by sampling further prompts
    (DAPO's dynamic sampling, which looks at the answers alone), at most rollout.refill_rounds times. Source:
    core_algos.py:146, kept."""
    penalties: Literal["reward", "advantage"] = "reward"
    """Where the reward's penalties act: in the reward, where a group's std may blow them up, or on the advantage, at most
    `penalty_bound` of its size."""
    penalty_bound: float = Field(default=0.5, ge=0, lt=1)
    """Share of an advantage that penalties take at most (ASPO 2508.19201); below 1 no sign flips."""
    old_logprobs: Literal["always", "when_needed"] = "always"
    """`when_needed` leaves the pass out where the ratio is 1 by construction: one update per step on the newest weights,
    without correction and without KL in the reward. Mismatch quantiles are then not logged. Source: ray_trainer.py:990,
    always."""
    void_turns: Literal["keep", "mask"] = "keep"
    """Mask trajectories with a turn that holds neither a complete code block nor an answer (SimpleTIR, 2509.02479)."""
    mask_truncated: bool = False
    """Leave responses that ran out of budget out of the loss (DAPO's overlong filter)."""
    train_on_observations: bool = False
    """Train on what the tools say as on what was sampled: a control of the paper's claim that masking it keeps training stable
    (§2.3.2), not a recipe."""

    @field_validator("router_replay", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        """YAML reads off as false."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.zero_signal == "refill" and self.advantage == "reinforce_pp":
            raise ValueError(
                "algo.zero_signal = refill replaces groups whose answers are alike, but with algo.advantage = reinforce_pp these "
                "have advantages too; use keep or drop, or another advantage"
            )
        if self.train_on_observations and self.old_logprobs == "when_needed":
            raise ValueError(
                "algo.train_on_observations needs algo.old_logprobs = always: no server samples what a tool says, so it has no "
                "log-probs without the pass"
            )
        return self

    @property
    def geo_bounds(self) -> tuple[float, float]:
        return self.correction_geo or (0.999, 1.001)


class OptimConfig(Section):
    lr: PositiveFloat
    """Peak learning rate. Source: script:7,28."""
    weight_decay: float = Field(ge=0)
    """On matrices only, as in Megatron. Source: fsdp_workers.py:278. Differs: the release decays biases and norms too, by
    1e-8 of their size an update."""
    betas: tuple[Beta, Beta]
    """Adam's decay rates. Source: fsdp_workers.py:277."""
    eps: PositiveFloat
    """Adam's epsilon. Source: torch.optim.AdamW's default, which fsdp_workers.py:277 leaves."""
    clip_grad: PositiveFloat
    """Global gradient norm. Source: ppo_trainer.yaml:34. Differs: the release's loss is an eighth of the mean on 8 GPUs
    (dp_actor.py:312), so the same number there acts at a norm of 8; Adam cancels the factor."""
    schedule: Literal["constant", "linear", "cosine"]
    """What the learning rate does after the warm-up, over num_steps. Source: ppo_trainer.yaml:45-47, constant."""
    warmup_steps: int = Field(ge=0)
    """Optimizer steps of linear warm-up: update n (from 0) has (n + 1) / (warmup_steps + 1) of `lr`. Source:
    ppo_trainer.yaml:45-47, none."""


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Ranks over which each matrix is cut (Megatron's tensor parallelism); keep it inside a node."""
    pipeline: PositiveInt = 1
    """Stages that hold a share of the layers each."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved 1F1B); 1 = plain 1F1B."""
    context: PositiveInt = 1
    """Ranks over which each sequence is cut."""
    data: PositiveInt | Literal["auto"] = "auto"
    """Data-parallel size; `auto` takes what the launcher's world size leaves, 1 on one machine without GPUs."""
    sequence: bool = False
    """Sequence parallelism inside the tensor group."""
    expert: PositiveInt = 1
    """Ranks of a pipeline stage over which the experts of each layer are spread. They take tokens from each other, so they come
    out of tensor x context x data, not on top."""
    expert_tensor: PositiveInt = 1
    """Ranks over which one expert's matrices are cut, in the place of `tensor` for all others; expert x expert_tensor divides the
    ranks of a stage."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the policy."""
        return self.tensor * self.pipeline * self.context

    @property
    def world_size(self) -> int:
        """Trainer ranks when this config alone decides (`data: auto` counts as 1)."""
        return self.model_size * (1 if self.data == "auto" else self.data)


class TrainerConfig(Section):
    mini_batch_samples: PositiveInt
    """Trajectories per optimizer step. Source: script:6,30; ppo_mini_batch_size = 1024 counts prompts, which
    fsdp_workers.py:119 multiplies by the 16 samples and divides by the 8 GPUs, so one mini-batch takes the whole step."""
    micro_batch_tokens: PositiveInt
    """Token budget of one packed micro-batch per data-parallel rank."""
    logprob_chunk_tokens: PositiveInt = 2048
    """Tokens whose logits exist at once, per rank: [chunk, V / tensor] in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation."""
    precision: Literal["default", "fp8_hybrid_delayed", "fp8_current", "fp8_blockwise", "mxfp8"] = "default"
    """`default` computes in model.dtype; the others need Transformer Engine and a chip that has them. fp8_hybrid_delayed is
    unfit for RL (trainer/precision.py says why)."""
    layer_spec: Literal["auto", "local"] = "auto"
    """Layers on a GPU. auto: Transformer Engine's. local: Megatron's own with torch's attention, as on a CPU, for a machine that
    has no Transformer Engine or to tell its numbers from ours; `torl plan` predicts Transformer Engine's memory and time."""
    deterministic: bool = False
    """On GPUs only kernels whose sums repeat bit for bit, so that a resumed run does; attention's backward is slower for it. On a
    CPU everything repeats already and this changes nothing."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with compute."""
    optimizer_offload: bool = False
    """Keep optimizer state in host memory and step there (Megatron's HybridDeviceOptimizer); needs bfloat16 and the
    distributed optimizer. Without a GPU it changes nothing."""
    park_weights: bool = False
    """While servers sample keep the weights in host memory too, where ranks and servers take turns (cluster.turns). Gradients
    and optimizer state leave the GPU in any case."""
    gradient_bucket_parameters: PositiveInt = 40_000_000
    """Parameters per gradient bucket when `overlap` is on (Megatron's own default)."""
    collective_timeout_s: PositiveFloat = 1800.0
    """Process-group time limit; a rank that hangs ends the run instead of blocking it."""
    share_timeout_s: PositiveFloat = 14400.0
    """How long ranks wait for rank 0 while it samples or evaluates."""


class BenchmarkConfig(Section):
    """How one benchmark is sampled where it differs from the others."""

    samples_per_problem: PositiveInt | None = None
    """None = eval.samples_per_problem."""
    temperature: float | None = Field(default=None, ge=0)
    """0 is greedy; None = eval.temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """None = eval.top_p."""


class EvalConfig(Section):
    data: tuple[str, ...] = ()
    """Benchmarks: paths as in data.train, or `arithmetic:SEED`; empty = no evaluation. A name that is no file stands for a
    benchmark that is not there: it is left out, and every report says so. Source: paper §3.1, five benchmarks. Differs: the
    release's test file holds three of them, with 134 of MATH500's 500 problems."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest templated prompt of a benchmark, in tokens; a longer one counts as wrong. None = data.max_prompt_tokens.
    Source: ppo_trainer.yaml:8. Differs: the release keeps 10 tokens back (ray_trainer.py:526)."""
    max_problems: PositiveInt | None = None
    """First problems of each benchmark; None = all."""
    temperature: float = Field(ge=0)
    """0 = greedy. Source: paper §3.1, ray_trainer.py:648."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus; None = rollout.top_p."""
    benchmarks: dict[str, BenchmarkConfig] = {}
    """By name (aime24, math500, …): samples_per_problem, temperature and top_p of its own."""
    samples_per_problem: PositiveInt = 1
    """k of avg@k and pass@k. Source: paper §3.1, one greedy attempt."""
    every_steps: int = Field(default=0, ge=0)
    """Also evaluate during training; 0 = only before step 0 and after the last step. Source: script:57."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=0, ge=0)
    """0 = only at the end. Source: script:56."""
    keep_last: PositiveInt = 2
    """Checkpoints that are kept; older ones go once the next is complete."""
    async_save: bool = False
    """Write while training goes on."""
    export_hf: bool = True
    """Write `hf/` after the last step."""


class PretrainConfig(Section):
    """`torl pretrain`: texts instead of problems, the loss of a language model instead of the policy's. From the rest of the config
    it takes model, optim, parallel, trainer, checkpoint, logging, seed, num_steps, the lengths of data and rollout, and
    guards.max_skipped_updates."""

    data: str
    """A .jsonl file of texts (docs/pretraining.md), or `pkg.module:function` that yields such rows, endless or not."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are trained: those behind the prompt that the model itself is to write, or all but the first."""
    rows_per_step: PositiveInt = 64
    """Rows of an optimizer step; the loss is the mean over all their trained tokens."""


class GuardsConfig(Section):
    """Limits above which a step stops the run, and near which it warns; None = log only. Shares in [0, 1], but for the count of
    skipped updates and what is in nats."""

    max_fault_rate: float = Field(default=0.1, ge=0, le=1)
    """Trajectories lost to infrastructure faults."""
    max_logprob_diff: PositiveFloat | None = None
    """Largest |server - trainer| log-prob of any trained token."""
    warn_k3: PositiveFloat = 0.01
    """KL(server || trainer) per token, by k3, above which a step warns. bf16 on both sides gives about 1e-4 to 1e-3."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """Updates in a row that are skipped because their gradient is not a number; one more ends the run."""
    max_void_turn_ratio: float | None = Field(default=None, ge=0, le=1)
    """Trajectories with a turn that holds neither a complete program nor an answer."""
    max_truncated_ratio: float | None = Field(default=None, ge=0, le=1)
    """Trajectories that ran out of their token budget."""
    max_grader_timeout_ratio: float | None = Field(default=0.2, ge=0, le=1)
    """Trajectories whose answer the grader could not judge in time."""
    warn_at: float = Field(default=0.5, gt=0, le=1)
    """Share of each limit above which a warning is logged."""
    probe_logprob_diff: PositiveFloat = 0.5
    """The start-up probe's limit for the same prompt on server and trainer; bf16 rounds, so it is loose by default."""


class WandbConfig(Section):
    """A run at Weights & Biases, beside metrics.jsonl; needs the library wandb."""

    project: str = "torl_mega"
    """Where the run is listed."""
    entity: str | None = None
    """User or team; None = the account's own."""
    group: str | None = None
    """Runs that belong together, such as the seeds of one arm."""
    mode: Literal["online", "offline"] | None = None
    """offline writes RUN/wandb/, for `wandb sync`. None = as WANDB_MODE says, or online."""
    tags: tuple[str, ...] = ()
    """Labels of the run there."""


class MlflowConfig(Section):
    """A run at MLflow, beside metrics.jsonl; needs the library mlflow-skinny or mlflow."""

    uri: str | None = None
    """Tracking server (`http://host:port`) or a folder. None = as MLFLOW_TRACKING_URI says, or the folder `mlruns` in runs_dir."""
    experiment: str = "torl_mega"
    """Where the run is listed."""


class LoggingConfig(Section):
    trajectories: bool = True
    """Write trajectories/step_*.jsonl.zst."""
    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases; None = not."""
    mlflow: MlflowConfig | None = None
    """Also log to MLflow; None = not."""
    samples: int = Field(default=4, ge=0)
    """Transcripts that the trackers get with each evaluation and every `samples_every_steps` steps."""
    samples_every_steps: PositiveInt = 10
    """Fewer than every step, so that texts do not fill a tracker."""


class ClusterConfig(Section):
    """Where the processes of a run go on a Slurm allocation; `torl plan` turns it into a placement."""

    nodes: PositiveInt = 1
    """Nodes this config is laid out for; a job plans again with the nodes it was really given."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each node; cores that act as GPUs where `gpu` is cpu."""
    gpu: Literal["a100", "h100", "h200", "b200", "cpu"] = "h100"
    """Kind of GPU (table in planner/hardware.py); `cpu` runs every engine on cores, one rank per would-be GPU."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """Ranks and servers share each GPU, or each has GPUs of its own."""
    turns: Literal["auto", "always", "never"] = "auto"
    """Colocated: servers let go of weights and KV cache while the trainer trains, and the trainer of gradients and optimizer
    state while they sample; `never` keeps both resident. `auto` is `always` on GPUs, but `never` with rollout.max_staleness > 0,
    where servers sample all the time."""
    server_nodes: int = Field(default=0, ge=0)
    """Disaggregated: how many nodes, the last of the allocation, only serve."""
    server_gpus_per_node: int = Field(default=0, ge=0)
    """Disaggregated inside every node instead: how many of its GPUs, the last ones, only serve."""
    ranks_per_node: PositiveInt | None = None
    """Trainer ranks on a training node; None = one per training GPU."""
    servers_per_node: PositiveInt | None = None
    """SGLang servers on a serving node; None = as many as serving.tensor fits into its GPUs."""
    sandbox_cores: PositiveInt = 32
    """Cores per node kept for the sandbox pool; the rest is split over ranks and servers. A quarter of a small node."""
    hang_s: PositiveFloat = 7200.0
    """No metrics, trajectories or checkpoint written for this long: every rank prints its stacks and the step ends."""

    @model_validator(mode="after")
    def _split(self) -> Self:
        split = (self.server_nodes > 0) + (self.server_gpus_per_node > 0)
        if self.placement == "colocated" and split:
            raise ValueError("cluster.server_nodes and server_gpus_per_node need cluster.placement = disaggregated")
        if self.placement == "disaggregated" and self.turns == "always":
            raise ValueError(
                "cluster.turns = always needs cluster.placement = colocated: nobody shares a GPU otherwise"
            )
        if self.placement == "disaggregated" and split != 1:
            raise ValueError(
                "cluster.placement = disaggregated needs exactly one of cluster.server_nodes and server_gpus_per_node"
            )
        return self


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run folder below `runs_dir`; a run of the same name is resumed."""
    runs_dir: str = "runs"
    """Folder of all runs; of several nodes one that all of them see."""
    seed: int = Field(default=0, ge=0)
    """Of data order, sampling seeds and initialisation."""
    num_steps: PositiveInt
    """RL steps of the whole run. Source: axes of the paper's figures 1, 4 and 5, about 1,000 for 1.5B and 500 for 7B. Differs:
    the script has no limit (300 epochs of 224 steps)."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    sandbox: SandboxConfig = SandboxConfig()
    serving: ServingConfig = ServingConfig()
    reward: RewardConfig
    algo: AlgoConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    trainer: TrainerConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    pretrain: PretrainConfig | None = None
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per RL step; of `torl pretrain` a step is one."""
        if self.pretrain is not None:
            return 1
        return self.rollout.prompts_per_step * self.rollout.group_size // self.trainer.mini_batch_samples

    @property
    def needs_old_logprobs(self) -> bool:
        """False where leaving the old-log-prob pass out was asked for and changes nothing."""
        algo = self.algo
        on_policy = self.updates_per_step == 1 and self.rollout.max_staleness == 0
        charged = algo.kl_coef > 0 and algo.kl_in == "reward"
        corrected = algo.correction != "none" or algo.correction_veto is not None
        return algo.old_logprobs == "always" or charged or corrected or not on_policy or algo.router_replay == "old"

    @property
    def max_train_tokens(self) -> int:
        """Longest sequence that is trained on."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def max_context_tokens(self) -> int:
        """Longest sequence the servers ever see: a training or an evaluation prompt, and its response."""
        evaluated = self.eval.max_prompt_tokens if self.eval.data else None
        return max(self.data.max_prompt_tokens, evaluated or 0) + self.rollout.max_response_tokens

    @model_validator(mode="before")
    @classmethod
    def _correct_stale_samples(cls, raw: Any) -> Any:
        """Uncorrected, samples that are one version old cost the quickstart 0.06 of its final accuracy."""
        algo, rollout = (raw.get(name) for name in ("algo", "rollout")) if isinstance(raw, dict) else (None, None)
        if not isinstance(algo, dict) or not isinstance(rollout, dict) or "correction" in algo:
            return raw
        return {**raw, "algo": {**algo, "correction": "tis" if rollout.get("max_staleness") else "none"}}

    @model_validator(mode="after")
    def _servers_tell_the_experts(self) -> Self:
        if self.algo.router_replay != "rollout":
            return self
        if self.serving.router is not None:
            raise ValueError(
                "algo.router_replay = rollout cannot go through serving.router: sglang-router drops the request for the experts; "
                "take serving.router = null, or router_replay = old"
            )
        if self.rollout.max_staleness > 1 and self.rollout.pause == "retract":
            raise ValueError(
                "algo.router_replay = rollout with rollout.max_staleness > 1 needs rollout.pause = in_place: an attempt that is "
                "retracted keeps its log-probs, but SGLang tells the experts of its second time through the model"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rollout.protocol == "chat" and self.data.template != "chat":
            raise ValueError(
                "rollout.protocol = chat needs data.template = chat; calls are written as the chat template has them"
            )
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        if self.trainer.mini_batch_samples > samples:
            raise ValueError(
                f"trainer.mini_batch_samples = {self.trainer.mini_batch_samples} is more than a step collects "
                f"({self.rollout.prompts_per_step} prompts x {self.rollout.group_size}); take at most {samples}"
            )
        if samples % self.trainer.mini_batch_samples:
            raise ValueError(
                f"trainer.mini_batch_samples = {self.trainer.mini_batch_samples} does not divide the {samples} samples of a step"
            )
        if self.trainer.micro_batch_tokens < self.max_train_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens = {self.trainer.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_response_tokens = {self.max_train_tokens} tokens"
            )
        if self.serving.weight_dtype == "fp8_block" and self.model.dtype != "bfloat16":
            raise ValueError(f"serving.weight_dtype = fp8_block needs model.dtype = bfloat16, found {self.model.dtype}")
        if self.serving.weight_dtype == "fp8_block" and self.serving.transport == "disk":
            raise ValueError(
                "serving.weight_dtype = fp8_block cannot be verified after serving.transport = disk, where SGLang lays FP8 "
                "weights out anew while loading; take broadcast or handles"
            )
        if self.trainer.optimizer_offload and not (
            self.model.dtype == "bfloat16" and self.trainer.distributed_optimizer
        ):
            # megatron-core 0.16.1 and 0.19.2 fail otherwise, in the first step or while building the optimizer
            raise ValueError(
                f"trainer.optimizer_offload needs model.dtype = bfloat16 and trainer.distributed_optimizer = true, found "
                f"{self.model.dtype} and {str(self.trainer.distributed_optimizer).lower()}"
            )
        if self.trainer.layer_spec == "local" and self.trainer.precision != "default":
            raise ValueError(
                f"trainer.precision = {self.trainer.precision} is Transformer Engine's; leave trainer.layer_spec = local out"
            )
        if self.rollout.max_staleness and not self.logging.trajectories:
            raise ValueError(
                "rollout.max_staleness > 0 needs logging.trajectories: a resumed run reads collected steps back"
            )
        if self.rollout.attempts_per_prompt and self.rollout.attempts_per_prompt < self.rollout.group_size:
            raise ValueError(
                f"rollout.attempts_per_prompt = {self.rollout.attempts_per_prompt} is fewer than the "
                f"rollout.group_size = {self.rollout.group_size} that are kept of them"
            )
        if self.algo.ref_every_steps and not self.algo.kl_coef:
            raise ValueError("algo.ref_every_steps moves the reference of the KL; it needs algo.kl_coef above 0")
        if self.parallel.sequence and self.parallel.tensor == 1:
            raise ValueError("parallel.sequence = true needs parallel.tensor > 1")
        if self.parallel.virtual_pipeline > 1 and self.parallel.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
        algo = self.algo
        if algo.correction_low > algo.correction_high:
            raise ValueError(
                f"algo.correction_low = {algo.correction_low:g} is above algo.correction_high = {algo.correction_high:g}; swap them"
            )
        if algo.geo_bounds[0] > algo.geo_bounds[1]:
            raise ValueError(f"algo.correction_geo = {list(algo.geo_bounds)} is not [low, high]; swap them")
        return self

    @model_validator(mode="after")
    def _turns_fit(self) -> Self:
        if self.cluster.turns == "always" and self.rollout.max_staleness:
            raise ValueError(
                f"cluster.turns = always needs rollout.max_staleness = 0, found {self.rollout.max_staleness}: servers sample all "
                "the time; take cluster.turns = never or cluster.placement = disaggregated"
            )
        if self.cluster.turns == "always" and self.serving.urls:
            raise ValueError("cluster.turns = always needs servers that the run itself starts; leave serving.urls out")
        if self.trainer.park_weights and (
            self.cluster.turns == "never" or self.cluster.placement == "disaggregated" or self.rollout.max_staleness
        ):
            raise ValueError(
                "trainer.park_weights needs ranks and servers that take turns: cluster.placement = colocated, cluster.turns = auto "
                "or always, rollout.max_staleness = 0"
            )
        return self
