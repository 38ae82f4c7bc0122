"""A tool of your own: instead of running programs, work out what they would print.

    PYTHONPATH=examples torl train examples/own_tool.yaml

The class is the tool: its docstring the description, the types of `__call__` the schema, one instance per trajectory.
"""

import ast
import operator

from torl_mega.rollout.own_tool import ToolError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Calculator:
    """Works out whole-number arithmetic, as in `print(6*7)`."""

    name = "python"  # answers what the policy writes into ```python blocks

    async def __call__(self, expression: str) -> str:
        try:
            return str(self.value(ast.parse(expression.strip().removeprefix("print"), mode="eval").body))
        except (SyntaxError, KeyError, TypeError) as exc:
            raise ToolError(f"not arithmetic: {expression.strip()[:40]}") from exc

    def value(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](self.value(node.left), self.value(node.right))
        raise TypeError(node)
