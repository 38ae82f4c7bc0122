"""The matrix of layouts: every TP x PP x DP x CP that fits eight ranks, with SP and a virtual pipeline where they apply."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

MOE_FAMILIES = (("qwen3moe", False), ("qwen2moe", False), ("qwen3moe", True))
FAMILIES = tuple((family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True))


@dataclass(frozen=True, slots=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence: bool = False
    overlap: bool = False
    recompute: str = "none"
    distributed_optimizer: bool = True
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def name(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}", f"DP{self.data}", f"CP{self.context}"]
        parts += [f"VPP{self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"ETP{self.expert_tensor}"] if self.expert_tensor > 1 else []
        parts += ["SP"] if self.sequence else []
        parts += ["overlap"] if self.overlap else []
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        parts += [] if self.distributed_optimizer else ["plain-optimizer"]
        return " ".join(parts)

    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual_pipeline}",
            f"parallel.data={self.data}",
            f"parallel.context={self.context}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.expert={self.expert}",
            f"parallel.expert_tensor={self.expert_tensor}",
            f"trainer.overlap={str(self.overlap).lower()}",
            f"trainer.recompute={self.recompute}",
            f"trainer.distributed_optimizer={str(self.distributed_optimizer).lower()}",
        ]


def moe_matrix() -> list[Layout]:
    """Every EP x ETP x TP x PP x DP x CP that fits four ranks, and a few of eight; the rest rotates."""
    layouts: list[Layout] = []
    for tp, pp, dp, cp in product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2)):
        ranks = tp * dp * cp
        if ranks * pp > 4:
            continue
        for ep, etp, vpp in product((1, 2, 4), (1, 2), (1, 2) if pp > 1 else (1,)):
            if ranks % (ep * etp) == 0:
                layouts.append(
                    _rotating(Layout(tp, pp, vpp, dp, cp, tp > 1, expert=ep, expert_tensor=etp), len(layouts))
                )
    return [*layouts, *MOE_EIGHT]


def _rotating(layout: Layout, n: int) -> Layout:
    return replace(
        layout,
        overlap=layout.data > 1 and n % 2 == 0,
        recompute=("none", "selective", "full")[n % 3],
        distributed_optimizer=n % 5 != 4,
    )


def matrix(max_world: int = 8) -> list[Layout]:
    """Every layout; overlap, recomputation and the plain optimizer rotate over them."""
    layouts: list[Layout] = []
    for tp, pp, dp, cp in product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2)):
        if tp * pp * dp * cp > max_world:
            continue
        for vpp, sp in product((1, 2) if pp > 1 else (1,), (False, True) if tp > 1 else (False,)):
            n = len(layouts)
            layouts.append(
                Layout(
                    tensor=tp,
                    pipeline=pp,
                    virtual_pipeline=vpp,
                    data=dp,
                    context=cp,
                    sequence=sp,
                    overlap=dp > 1 and n % 2 == 0,
                    recompute=("none", "selective", "full")[n % 3],
                    distributed_optimizer=n % 5 != 4,
                )
            )
    return layouts


MOE_EIGHT = [
    Layout(tensor=2, pipeline=2, virtual_pipeline=2, data=2, sequence=True, expert=2, expert_tensor=2),
    Layout(tensor=2, data=2, context=2, sequence=True, expert=4, expert_tensor=2, overlap=True),
    Layout(pipeline=2, data=4, expert=4, recompute="full"),
    Layout(tensor=4, data=2, sequence=True, expert=8),
]
MOE_DEFAULT = [
    Layout(tensor=2, sequence=True),  # the same experts on both tensor ranks
    Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2, overlap=True),
    Layout(tensor=2, context=2, sequence=True, expert=2, expert_tensor=2, recompute="full"),
]

DEFAULT = [
    Layout(),
    Layout(tensor=2, pipeline=2, sequence=True, recompute="full"),
    Layout(tensor=2, context=2, sequence=True, recompute="selective"),
    Layout(pipeline=2, virtual_pipeline=2, data=2, overlap=True),
    Layout(tensor=4),
    Layout(pipeline=4, virtual_pipeline=2),
    Layout(data=4, overlap=True),
    Layout(data=2, context=2, distributed_optimizer=False),
]
