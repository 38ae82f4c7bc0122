"""Before step 0: do trainer and server mean the same thing by the same tokens?

A tokenizer that differs, or weights that were mapped wrongly, show nowhere as an error, only as a run that does not
learn. So the probe text must survive encode and decode on both sides, and one prompt must get the same log-probs.
"""

from __future__ import annotations

import numpy as np

from torl_mega.config import Config
from torl_mega.data.tokenizer import PROBE_TEXT
from torl_mega.errors import ServerError
from torl_mega.interfaces import Share, Trainer
from torl_mega.rollout.build import Rank0
from torl_mega.types import Sample


def check_engines(trainer: Trainer, rank0: Rank0 | None, config: Config, share: Share) -> None:
    """Collective. Raises ServerError on every rank, naming the server and what differs."""
    ids = share(lambda: rank0.tokenizer.encode(PROBE_TEXT) if rank0 and rank0.server_urls else ())
    if not ids:
        return
    mask = np.arange(len(ids)) > 0
    sample = Sample(np.array(ids, np.int64), mask, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int32), 0.0)
    mine = trainer.score(sample, temperature=1.0)  # as the servers' prompt log-probs are, whatever they sample at
    share(lambda: rank0 and _compare(rank0, ids, mine, config))


def _compare(rank0: Rank0, ids: tuple[int, ...], trainer_logprobs: np.ndarray, config: Config) -> None:
    from torl_mega.serving import probe

    for url in rank0.server_urls:
        rank0.run(probe.check_tokenizer(url, rank0.tokenizer, PROBE_TEXT))
        check_gap(url, ids, rank0.run(probe.prompt_logprobs(url, ids)), trainer_logprobs, config)


def check_gap(
    url: str, ids: tuple[int, ...], server_logprobs: np.ndarray, trainer_logprobs: np.ndarray, config: Config
) -> None:
    """Raises ServerError for the token where the two [T] log-probs differ most, if that is above the limit."""
    gap = np.abs(server_logprobs[1:] - trainer_logprobs[1:])
    if not gap.max() <= config.guards.probe_logprob_diff:  # so that NaN does not pass
        at = int(gap.argmax()) + 1
        raise ServerError(
            f"{url} and the trainer disagree on the probe text: token {at} (id {ids[at]}) has log-prob "
            f"{server_logprobs[at]:.4f} there and {trainer_logprobs[at]:.4f} here, guards.probe_logprob_diff is "
            f"{config.guards.probe_logprob_diff:g}; both must load the same weights from {config.model.path}"
        )
