"""`torl view`: from run folders to a page of trajectories, or the verdict of an audit.

Returns an exit code, prints the path it wrote, and raises DataError with one line for a folder that holds no run.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torl_mega.errors import DataError
from torl_mega.rollout.recorder import step_path
from torl_mega.rollout.token_audit import Audit, Rules, audit_files
from torl_mega.run.files import write_text
from torl_mega.view import site
from torl_mega.view.follow import serve
from torl_mega.view.sets import Source, eval_sources, step_sources
from torl_mega.view.update import update


@dataclass(frozen=True, slots=True)
class Options:
    """What `torl view` can be told beside its runs."""

    step: int | None = None
    limit: int | None = None  # attempts of each step
    out: Path | None = None
    tokenizer: Path | None = None
    as_json: bool = False

    @property
    def one_file(self) -> Path | None:
        """`out` where it names one file that is to hold everything."""
        return self.out if self.out is not None and self.out.suffix.lower() in (".html", ".htm") else None


def view(
    run: Path,
    others: Sequence[Path] = (),
    options: Options = Options(),
    *,
    audit: Callable[[Path, Path], Rules] | None = None,
) -> int:
    """Writes every step and evaluation of the runs, or the one step, as a page with its data beside it.

    `out` defaults to the folder `RUN/view`; named `*.html` it is one file with one step in it (the last unless `step` says).
    `tokenizer` defaults to the run's own `model.path`. With `audit` no page is made: every step (or the one) is re-proved token
    by token against `audit(run, tokenizer)`, and 1 is returned at the first violation.
    """
    steps = _steps(run, options.step)
    _check_tokenizer(options.tokenizer)
    if audit is not None:
        if steps[-1].kind == "eval":
            raise DataError(
                f"{run} has evaluations alone, whose transcripts hold no tokens; audit a run with trajectories"
            )
        rules = audit(run, options.tokenizer or site.model_path(run))
        return _audit([s.path for s in steps], rules, options.as_json)
    if (file := options.one_file) is not None:
        if others:
            raise DataError(f"--out {file}: one file holds one step of one run; give a folder to compare runs")
        with _writing(file):
            shown = site.Shown(run, "run", options.tokenizer)
            text, summary = site.single_page(shown, steps[-1], limit=options.limit)
            write_text(file, text)
        return _wrote(file, steps[-1], summary, options.as_json)
    target = options.out or run / "view"
    runs = _runs(run, others, options.tokenizer)
    try:
        with _writing(target):
            written = update(target, runs, step=options.step, limit=options.limit, tell=_tell)
    except KeyboardInterrupt:
        print(f"stopped; what was written until now is in {target / 'index.html'}", file=sys.stderr)
        return 130
    return _wrote(target / "index.html", steps[-1], written[steps[-1].name], options.as_json)


def follow(
    run: Path, others: Sequence[Path], options: Options, *, port: int, stop: threading.Event | None = None
) -> int:
    """Serves the page on 127.0.0.1 and keeps it up to date until Ctrl-C or `stop`; the run may not have begun its first step."""
    if not run.is_dir():
        raise DataError(f"{run} is no folder; give a run's folder, such as runs/quickstart")
    _check_tokenizer(options.tokenizer)
    if options.one_file is not None:
        raise DataError(f"--out {options.out}: one file cannot grow; give a folder, or leave --follow out")
    target = options.out or run / "view"
    runs = _runs(run, others, options.tokenizer)

    def refresh(*, follow: bool, read: bool = True) -> None:
        update(target, runs, step=options.step, limit=options.limit, follow=follow, read=read)

    def ready(url: str) -> None:
        _say({"url": url, "html": str(target / "index.html")}, options.as_json, f"{url} follows {run}; Ctrl-C ends it")

    with _writing(target):
        refresh(follow=True, read=False)
        serve(target, lambda: refresh(follow=True), port=port, ready=ready, stop=stop or threading.Event())
        refresh(follow=False)  # a page that follows nothing any more
    return 0


def _check_tokenizer(given: Path | None) -> None:
    if given is not None and not given.is_dir():
        raise DataError(f"--tokenizer {given} is no folder; give one with config.json and a tokenizer")


def _runs(run: Path, others: Sequence[Path], tokenizer: Path | None) -> list[site.Shown]:
    """The run and those to compare with; the tokenizer that was given is for all of them."""
    for other in others:
        _steps(other, None)
    folders = [folder.resolve() for folder in (run, *others)]
    if len(set(folders)) < len(folders):
        raise DataError(f"{others[-1]} is named twice; give other runs to compare with")
    return [site.Shown(run, "run", tokenizer), *(site.Shown(o, site.key_of(o), tokenizer) for o in others)]


def _wrote(path: Path, source: Source, summary: Mapping[str, object], as_json: bool) -> int:
    said = {"html": str(path), "step": source.step, "shown": summary["attempts"], "recorded": summary["recorded"]}
    _say(said | {"faults": summary["faults"]}, as_json, str(path))
    return 0


def _audit(paths: Sequence[Path], rules: Rules, as_json: bool) -> int:
    result = audit_files(paths, rules)
    _say(
        {**asdict(result), "violation": str(result.violation) if result.violation else None}, as_json, _verdict(result)
    )
    return 0 if result.violation is None else 1


def _verdict(result: Audit) -> str:
    if result.violation is not None:
        return f"audit failed: {result.violation}"
    return (
        f"audit passed: {result.num_trajectories} trajectories in {result.num_files} files; "
        f"{result.num_sampled} trained tokens were sampled, {result.num_inserted} masked ones were inserted"
    )


def _steps(run: Path, step: int | None) -> list[Source]:
    """The recorded steps or the one; of a run that only evaluated, its evaluations. Raises DataError where there are none."""
    if run.is_file():
        raise DataError(f"{run} is a file; give a run's folder, such as runs/quickstart")
    steps = step_sources(run)
    if step is None:
        found = steps or eval_sources(run)
        if not found:
            raise DataError(
                f"{run / 'trajectories'} holds no step_*.jsonl.zst; give a run folder such as runs/quickstart"
            )
        return found
    wanted = [s for s in steps if s.step == step]
    if not wanted:
        has = f"this run has steps {steps[0].step} to {steps[-1].step}" if steps else "this run has recorded no step"
        raise DataError(f"{step_path(run / 'trajectories', step)} is not there; {has}")
    return wanted


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(f"{target} cannot be written: {exc.strerror}; choose another --out") from None


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say(values: Mapping[str, object], as_json: bool, text: str) -> None:
    print(json.dumps(values) if as_json else text, flush=True)
