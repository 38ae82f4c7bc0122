"""One attempt at one prompt: generate, call the tool, insert the observation, go on. Token in, token out.

    prompt ─► generate ──(stop string)──► Tool.call ─► observation, encoded on its own ─┐
                 ▲                                                                      │
                 └──────────────────────────────────────────────────────────────────────┘

A chat model calls at the end of its turn: there the closing token ends a generation, and the messages of its template that
hold the results (`ChatTool.follow`) are inserted.

The ids that were sampled are the ids that are trained; nothing is decoded and encoded again. A fault of the
infrastructure raises (`ToolFault`, `GenerationError`): the policy never sees one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torl_mega.interfaces import ChatSession, ChatTool, Generator, Tool, ToolSession
from torl_mega.types import FinishReason, GenerationRequest, Prompt, StopReason, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """How every attempt samples and when it ends."""

    temperature: float  # 0 = greedy
    top_p: float
    max_response_tokens: int  # sampled plus inserted
    max_tool_calls: int  # C; after so many calls the stop string is not set
    routes: bool = False  # keep the experts that each token went to (algo.router_replay = rollout)


@dataclass(frozen=True, slots=True)
class Episode:
    """What every trajectory shares; `run` is one trajectory."""

    generator: Generator
    tool: Tool | ChatTool
    encode: Callable[[str], tuple[int, ...]]
    settings: EpisodeSettings
    tell: Callable[[Turn], None] | None = None  # is told each turn as it ends

    async def run(self, prompt: Prompt, sample_index: int, *, seed: int) -> Trajectory:
        """Attempt `sample_index` at `prompt`, within `max_response_tokens` exactly. `seed`: of the step, see `sampling_seed`."""
        session = self.tool.open(prompt.problem)
        try:
            return await self._run(prompt, sample_index, session, seed)
        finally:
            await session.close()

    async def _run(
        self, prompt: Prompt, sample_index: int, session: ToolSession | ChatSession, seed: int
    ) -> Trajectory:
        s = self.settings
        turns: list[Turn] = []
        response: list[int] = []
        times = [time.time()]
        stop_reason = StopReason.LENGTH
        while len(response) < s.max_response_tokens:
            calls_left = s.max_tool_calls - sum(len(t.tool_calls) for t in turns)
            chat = self.tool if isinstance(self.tool, ChatTool) else None
            asked = time.monotonic()
            generation = await self.generator.generate(
                GenerationRequest(
                    token_ids=(*prompt.token_ids, *response),
                    max_new_tokens=s.max_response_tokens - len(response),
                    temperature=s.temperature,
                    top_p=s.top_p,
                    stop=self.tool.stop if not isinstance(self.tool, ChatTool) and calls_left > 0 else (),
                    seed=sampling_seed(seed, prompt.problem.problem_id, sample_index, len(turns)),
                    route_key=prompt.problem.problem_id,
                    stop_token_ids=() if chat is None else chat.end_ids,
                    routes_from=sum(len(t.routes) for t in turns if t.routes is not None) if s.routes else None,
                )
            )
            answered = time.monotonic()
            turn = Turn(
                generation.token_ids,
                generation.logprobs,
                generation.policy_versions,
                generation.text,
                routes=generation.routes,
            )
            response.extend(turn.token_ids)
            room = s.max_response_tokens - len(response)
            if generation.finish is FinishReason.STOP_STRING:
                turn = await self._with_observation(session, turn, turns, room=room)
            elif chat is not None and calls_left > 0 and {*turn.token_ids[-1:]} & {*chat.end_ids}:
                turn = await self._with_results(chat, session, turn, calls_left, room=room)
            response.extend(turn.observation_ids)
            turns.append(turn)
            times += [answered - asked, time.monotonic() - answered]
            if self.tell is not None:
                self.tell(turn)
            if generation.finish is FinishReason.EOS and not turn.tool_calls:
                stop_reason = StopReason.EOS
            if not turn.observation_ids:
                break
        return Trajectory(prompt, sample_index, tuple(turns), stop_reason, tuple(times))

    async def _with_observation(self, session: Any, turn: Turn, before: list[Turn], *, room: int) -> Turn:
        """The turn with its call made. An observation over `room` tokens is left out, which ends the trajectory."""
        call = await session.call("".join(t.text for t in before) + turn.text)
        ids = self.encode(call.observation)
        return dataclasses.replace(turn, tool_call=call, observation_ids=ids if len(ids) <= room else ())

    async def _with_results(self, chat: ChatTool, session: Any, turn: Turn, calls_left: int, *, room: int) -> Turn:
        """The chat's turn with its calls made, if there are any, likewise."""
        calls = await session.calls(turn.text, most=calls_left)
        if not calls:
            return turn
        ids = chat.follow(calls)
        return dataclasses.replace(
            turn, tool_call=calls[0], more_calls=calls[1:], observation_ids=ids if len(ids) <= room else ()
        )


def sampling_seed(run_seed: int, problem_id: str, sample_index: int, turn_index: int) -> int:
    """A 31-bit seed of its own for every generation, the same whenever the run is repeated or resumed."""
    text = f"{run_seed}\0{problem_id}\0{sample_index}\0{turn_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
