"""Fix for Megatron's interleaved schedule on two stages: shapes travel on one group per direction.

With a virtual pipeline over two stages the next and the previous rank are the same process. Megatron then
sends tensors of the two directions over two groups, but their shapes (`variable_seq_lengths`) over one, in an order
that the two sides disagree on: as soon as micro-batches differ in length, a stage takes the shape of a gradient for that
of an activation. `_Communicator` sends shapes the way Megatron sends tensors.
"""

# Megatron-Core's annotations are wider than what its functions return and narrower than what they take
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection


class _Communicator(P2PCommunicator):
    """Megatron's communicator, with shapes on the group of their direction."""

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> Any:
        forward = self.pp_group
        backward: Any = dist.group.WORLD if self.pp_group.size() == 2 else self.pp_group
        device = torch.cuda.current_device()
        got = {name: torch.empty(3, device=device, dtype=torch.int64) for name in ("prev", "next")}
        requests = []
        for tensor, rank, group in (
            (tensor_send_next, self.next_rank, forward),
            (tensor_send_prev, self.prev_rank, backward),
        ):
            if tensor is not None:
                shape = torch.tensor(tensor.size(), device=device, dtype=torch.int64)
                requests.append((dist.isend(shape, rank, group=group), shape))
        for wanted, name, rank, group in (
            (recv_prev, "prev", self.prev_rank, forward),
            (recv_next, "next", self.next_rank, backward),
        ):
            if wanted:
                requests.append((dist.irecv(got[name], rank, group=group), got[name]))
        for request, _ in requests:
            request.wait()
        return (
            got["prev"].tolist() if recv_prev else [0, 0, 0],
            got["next"].tolist() if recv_next else [0, 0, 0],
        )


def schedule_arguments(config: Any) -> dict[str, Any]:
    """Arguments that give Megatron's forward-backward function our communicator; none without a virtual pipeline."""
    if config.virtual_pipeline_model_parallel_size is None:
        return {}
    groups: Any = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return {"p2p_communicator": _Communicator(pp_group=groups.pp, config=config), "pg_collection": groups}
