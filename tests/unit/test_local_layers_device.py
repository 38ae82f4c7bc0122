"""The local layers go where the device is, so that `trainer.layer_spec: local` runs on a GPU: shown on torch's meta device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from torl_mega.trainer.cpu import backend

backend.install()

from torl_mega.config_file import load_config  # noqa: E402
from torl_mega.errors import ConfigError  # noqa: E402
from torl_mega.trainer.cpu.attention import SdpaCoreAttention  # noqa: E402
from torl_mega.trainer.micro_batch import build_micro_batch  # noqa: E402
from torl_mega.types import Sample  # noqa: E402

META = torch.device("meta")


def micro_batch(device: torch.device) -> Any:
    samples = [
        Sample(
            token_ids=np.arange(n),
            loss_mask=np.arange(n) > 1,
            rollout_logprobs=np.zeros(n, np.float32),
            policy_versions=np.zeros(n, np.int32),
            advantage=1.0,
        )
        for n in (5, 17, 6)
    ]
    offsets = np.cumsum([0, 5, 17, 6])
    packing = {"align": 1, "total_align": 4, "context_size": 1, "context_rank": 0}
    return build_micro_batch(samples, offsets, [0, 1, 2], **packing, device=device, local=True)


def test_a_micro_batch_lies_on_its_device() -> None:
    made = micro_batch(META)
    groups = [t for group in made.packed.groups for t in (group.rows, group.places)]
    tensors = [made.token_ids, made.rows, made.targets, made.packed.cu_seqlens_q, made.packed.restore, *groups]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_attention_stays_on_its_device() -> None:
    config: Any = SimpleNamespace(attention_dropout=0.0, kv_channels=8)
    groups: Any = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    attention = SdpaCoreAttention(config, 1, None, "self", pg_collection=groups)
    made = micro_batch(META)
    tokens = made.token_ids.shape[1]
    query, key, value = (torch.zeros(tokens, heads, 8, device=META) for heads in (4, 2, 2))
    found = attention(query, key, value, packed_seq_params=made.packed)
    assert (found.device.type, tuple(found.shape)) == ("meta", (tokens, 32))


def test_fp8_is_refused_with_local_layers() -> None:
    with pytest.raises(ConfigError, match="fp8_current is Transformer Engine's"):
        load_config(
            "conf/torl_1.5b.yaml", ["trainer.layer_spec=local", "trainer.precision=fp8_current", "model.dtype=bfloat16"]
        )
