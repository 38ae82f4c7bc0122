"""One attempt at one prompt: generate, call the tool, insert the observation, go on. Token in, token out.

    prompt ─► generate ──(stop string)──► Tool.call ─► observation, encoded on its own ─┐
                 ▲                                                                      │
                 └──────────────────────────────────────────────────────────────────────┘

The ids that were sampled are the ids that are trained; nothing is decoded and encoded again. A fault of the
infrastructure raises (`ToolFault`, `GenerationError`): the policy never sees one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from torl_mega.interfaces import Generator, Tool, ToolSession
from torl_mega.types import FinishReason, GenerationRequest, Prompt, StopReason, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """How every attempt samples and when it ends."""

    temperature: float  # 0 = greedy
    top_p: float
    max_response_tokens: int  # sampled plus inserted
    max_tool_calls: int  # C; after so many calls the stop string is not set


@dataclass(frozen=True, slots=True)
class Episode:
    """What every trajectory shares; `run` is one trajectory."""

    generator: Generator
    tool: Tool
    encode: Callable[[str], tuple[int, ...]]
    settings: EpisodeSettings

    async def run(self, prompt: Prompt, sample_index: int, *, seed: int) -> Trajectory:
        """Attempt `sample_index` at `prompt`, within `max_response_tokens` exactly. `seed`: of the step, see `sampling_seed`."""
        session = self.tool.open(prompt.problem)
        try:
            return await self._run(prompt, sample_index, session, seed)
        finally:
            await session.close()

    async def _run(self, prompt: Prompt, sample_index: int, session: ToolSession, seed: int) -> Trajectory:
        s = self.settings
        turns: list[Turn] = []
        response: list[int] = []
        stop_reason = StopReason.LENGTH
        while len(response) < s.max_response_tokens:
            num_calls = sum(t.tool_call is not None for t in turns)
            generation = await self.generator.generate(
                GenerationRequest(
                    token_ids=(*prompt.token_ids, *response),
                    max_new_tokens=s.max_response_tokens - len(response),
                    temperature=s.temperature,
                    top_p=s.top_p,
                    stop=self.tool.stop if num_calls < s.max_tool_calls else (),
                    seed=sampling_seed(seed, prompt.problem.problem_id, sample_index, len(turns)),
                    route_key=prompt.problem.problem_id,
                )
            )
            turn = Turn(generation.token_ids, generation.logprobs, generation.policy_versions, generation.text)
            response.extend(turn.token_ids)
            if generation.finish is FinishReason.STOP_STRING:
                turn = await self._with_observation(session, turn, turns, room=s.max_response_tokens - len(response))
                response.extend(turn.observation_ids)
            turns.append(turn)
            if generation.finish is FinishReason.EOS:
                stop_reason = StopReason.EOS
            if generation.finish is not FinishReason.STOP_STRING or not turn.observation_ids:
                break
        return Trajectory(prompt, sample_index, tuple(turns), stop_reason)

    async def _with_observation(self, session: ToolSession, turn: Turn, before: list[Turn], *, room: int) -> Turn:
        """The turn with its call made. An observation over `room` tokens is left out, which ends the trajectory."""
        call = await session.call("".join(t.text for t in before) + turn.text)
        ids = self.encode(call.observation)
        return Turn(
            turn.token_ids, turn.logprobs, turn.policy_versions, turn.text, call, ids if len(ids) <= room else ()
        )


def sampling_seed(run_seed: int, problem_id: str, sample_index: int, turn_index: int) -> int:
    """A 31-bit seed of its own for every generation, the same whenever the run is repeated or resumed."""
    text = f"{run_seed}\0{problem_id}\0{sample_index}\0{turn_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
