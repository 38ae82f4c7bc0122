"""The quick list gives what comparing every name gives, and compares nothing."""

from __future__ import annotations

import pytest

from torl_mega.serving.plugin import expert_names

ENTRIES = [
    (f"experts.{'w2' if part == 'down_proj' else 'w13'}_", f"experts.{n}.{part}.", n, shard)
    for n in range(128)
    for shard, part in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
]


@pytest.mark.parametrize(
    "name",
    [
        *(f"model.layers.{n % 48}.mlp.experts.{n}.{part}.weight" for n in (1, 11, 127) for part in ("up_proj", "down_proj")),
        "model.layers.3.mlp.experts.5.gate_proj.weight_scale_inv",
        "experts.5.gate_proj.weight",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.shared_expert.up_proj.weight",
        "model.embed_tokens.weight",
    ],
)  # fmt: skip
def test_the_same_entries_fit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    quick = expert_names.QuickList(ENTRIES)
    assert list(quick) == ENTRIES  # nothing at hand
    monkeypatch.setattr(expert_names, "_at_hand", [name])
    fitting = [entry for entry in ENTRIES if entry[1] in name]
    assert [entry for entry in quick if entry[1] in name] == fitting
    if fitting and ".mlp." in name:
        assert len(list(quick)) == 1
