"""Which metrics a report shows as charts, in which order, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torl_mega.view.run_data import Run, Series, benchmarks
from torl_mega.view.spans import visible


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: a metric of the steps or of the evaluations. `paper` names the end point that the paper gives for it."""

    title: str
    name: str  # of the metric
    meaning: str = ""
    form: Literal["number", "share", "log"] = "number"
    rows: Literal["train", "eval"] = "train"
    paper: str = ""

    def of(self, run: Run) -> Series:
        return (run.train if self.rows == "train" else run.evals).get(self.name, [])


S, E, LOG = "share", "eval", "log"
SECTIONS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Does it learn",
        (
            Panel(
                "accuracy in training", "accuracy", "responses whose final answer is correct; circles: evaluations", S
            ),
            Panel("accuracy in evaluation", "accuracy", "mean over the benchmarks", S, E, "eval_accuracy"),
            Panel("reward", "reward", "mean over all responses"),
        ),
    ),
    (
        "Does it use the tool",
        (
            Panel(
                "code ratio",
                "code_ratio",
                "responses with a complete piece of code; circles: evaluations",
                S,
                paper="code_ratio",
            ),
            Panel("pass ratio", "pass_ratio", "programs that ended OK, of those that ran", S),
            Panel("pass ratio, correct responses", "pass_ratio_correct", "", S),
            Panel("pass ratio, incorrect responses", "pass_ratio_incorrect", "", S),
            Panel("executed code ratio", "executed_code_ratio", "pieces of code that ran, of those written", S),
            Panel(
                "code before the answer", "code_before_answer_ratio", "pieces of code that end before the first box", S
            ),
            Panel("tool calls a response", "tool_calls"),
            Panel("responses that used all calls", "tool_calls_at_limit_ratio", "", S),
            Panel("void turns", "void_turn_ratio", "responses with a turn of neither code nor answer", S),
        ),
    ),
    (
        "Length and endings",
        (
            Panel("response length (tokens)", "response_length", "mean, inserted tokens included"),
            Panel("longest response (tokens)", "response_length_max"),
            Panel("truncated", "truncated_ratio", "responses that ran out of their budget", S),
            Panel("no answer", "no_answer_ratio", "responses without a final box", S),
            Panel("grader timeouts", "grader_timeout_ratio", "", S),
        ),
    ),
    (
        "Signal and optimisation",
        (
            Panel("groups without signal", "group_zero_signal_ratio", "groups whose rewards are all alike", S),
            Panel("entropy", "entropy", "of the trainer's distribution, per token"),
            Panel("gradient norm", "grad_norm", "before clipping"),
            Panel("learning rate", "lr"),
            Panel("loss", "loss"),
            Panel("clipped tokens", "clip_frac", "", S),
            Panel("KL to the old policy", "approx_kl"),
            Panel("KL(server || trainer)", "k3", "per token; more than guards.warn_k3 warns", LOG),
            Panel("largest |server − trainer| log-prob", "max_abs_logprob_diff", "of any trained token", LOG),
        ),
    ),
    (
        "Speed",
        (
            Panel("sampled tokens a second", "rollout_tokens_per_s", "while collecting"),
            Panel("step (s)", "step_s"),
            Panel("rollout (s)", "rollout_s"),
            Panel("training (s)", "train_s"),
            Panel("weight sync (s)", "sync_s"),
            Panel("padding", "padding_share", "of all tokens in micro-batches", S),
            Panel("data-parallel imbalance", "dp_imbalance"),
        ),
    ),
    ("Faults", (Panel("trajectories lost", "fault_rate", "to infrastructure faults, of all wanted", S),)),
)
PICTURE = ("accuracy", "code_ratio", "pass_ratio")


def sections(runs: Sequence[Run]) -> Iterator[tuple[str, list[Panel]]]:
    """The charts that one of the runs has a value for; benchmarks, tools and parts of the reward as the runs name them."""
    names = dict.fromkeys(k for run in runs for k in run.train)
    found = benchmarks(runs)  # one benchmark alone is the mean
    more = {
        "Does it learn": [
            Panel(f"{visible(b)}, accuracy in evaluation", f"{b}/accuracy", "", S, E, f"{b}/accuracy")
            for b in (found if len(found) > 1 else ())
        ]
        + [
            Panel(visible(n.replace("/", ": ", 1)), n)
            for n in names
            if n.startswith("reward/") and n != "reward/answer"
        ],
        "Does it use the tool": [
            Panel(visible(n.removeprefix("tool/").replace("/", ": ").replace("_", " ")), n)
            for n in names
            if n.startswith("tool/")
        ],
        "Faults": [
            Panel(visible(n.removeprefix("faults/")), n, "in a step") for n in sorted(names) if n.startswith("faults/")
        ],
    }
    for title, panels in SECTIONS:
        everything = [*panels, *more.get(title, [])]
        yield title, [p for p in everything if any(v > 0 or p.form != LOG for run in runs for _, v in p.of(run))]


def constant(panel: Panel, runs: Sequence[Run]) -> float | None:
    """The value that the metric had everywhere and always, if it did not move."""
    values = {value for run in runs for _, value in panel.of(run)}
    return values.pop() if len(values) == 1 and any(len(panel.of(run)) > 1 for run in runs) else None
