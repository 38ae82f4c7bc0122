"""TensorBoard: numbers by group, transcripts, hyperparameters, and the charts of the paper's Figures 4 to 6 as a layout.

Contract: implements `Tracker`. What lies at or after `resume_at` from an earlier process is hidden by TensorBoard itself, so the
caller tells again what happened at `resume_at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torl_mega.run import paper

MEASURES = ("eval/accuracy", "rollout/accuracy", "rollout/reward", "tools/code_ratio", "tools/pass_ratio")


class Board:
    def __init__(self, folder: Path, settings: Mapping[str, str | float | bool], *, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=resume_at)
        if resume_at == 0:
            self._writer.add_custom_scalars(layout())
            for summary in hparams(dict(settings), dict.fromkeys(MEASURES, 0.0)):
                self._file().add_summary(summary)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Indented, so that TensorBoard's Markdown shows it as it is."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        self._writer.close()

    def _file(self) -> Any:
        return self._writer._get_file_writer()


def layout() -> dict[str, dict[str, list[Any]]]:
    """Category -> chart -> ["Multiline", tags]."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    code = ["tools/executed_code_ratio", "tools/code_before_answer_ratio"]
    passed = ["tools/pass_ratio", "tools/pass_ratio_correct", "tools/pass_ratio_incorrect"]
    return {
        "Figure 4: benchmarks": {name: lines(f"eval/{name}/accuracy") for name in paper.BENCHMARKS}
        | {"average": lines("eval/accuracy")},
        "Figure 5: use of code": {
            "code ratio": lines("tools/code_ratio"),
            "pass ratio": lines(passed[0]),
            "pass ratio by outcome": lines(*passed[1:]),
            "effective code": lines(*code),
        },
        "Figure 6: settings compared": {
            "reward": lines("rollout/reward"),
            "accuracy": lines("rollout/accuracy", "eval/accuracy"),
        },
    }
