"""How it is trained: layout, memory, precision, checkpoints, and `torl pretrain`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from torl_mega.config.section import Section


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
