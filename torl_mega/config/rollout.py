"""How trajectories come to be: sampling, the sandbox that runs programs, the servers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from torl_mega.config.section import Section, Url
from torl_mega.import_path import is_import_path


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
