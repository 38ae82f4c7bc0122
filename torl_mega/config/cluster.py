"""Where it runs: GPUs, nodes, and which of them train or serve."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from torl_mega.config.section import Section


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
