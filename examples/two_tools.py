"""A tool with a state of its own, beside Python, for a chat model.

    PYTHONPATH=examples torl train examples/two_tools.yaml

One instance serves one trajectory. The constructor may take the problem; `close` is called when the trajectory is over.
"""

from torl_mega.rollout.own_tool import ToolError


class Notes:
    """Keeps notes: with a text it adds one, without it shows them all."""

    timeout_s = 5.0
    max_chars = 1000

    def __init__(self, problem):
        self.lines = [f"The problem: {problem.problem}"]

    async def __call__(self, text: str = "") -> str:
        if len(text) > 200:
            raise ToolError("a note has at most 200 characters")
        self.lines += [text] if text else []
        return "noted" if text else "\n".join(self.lines)

    def close(self):
        self.lines.clear()
