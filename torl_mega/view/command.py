"""`torl view`: from a run folder to one static page, or the verdict of an audit.

Returns an exit code, prints the path it wrote, and raises DataError with one line for a folder that holds no run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError
from torl_mega.rollout.recorder import parse_rows, read_rows, step_path
from torl_mega.rollout.token_audit import Audit, Rules, audit_files
from torl_mega.run.files import write_text
from torl_mega.view.page import trajectories_page


def view(
    run: Path,
    *,
    step: int | None = None,
    out: Path | None = None,
    audit: Callable[[Path, Path], Rules] | None = None,
    limit: int = 64,
    tokenizer: Path | None = None,
    as_json: bool = False,
) -> int:
    """Writes one step's trajectories as HTML (the last step unless `step` says), the first `limit` of them.

    `out` defaults to `RUN/view/step_NNNNN.html`; `tokenizer` to the run's own `model.path`. With `audit`
    no page is made: every step (or the one) is re-proved token by token against `audit(run, tokenizer)`, and 1 is returned at
    the first violation.
    """
    paths = _step_files(run, step)
    if tokenizer is not None and not tokenizer.is_dir():
        raise DataError(f"--tokenizer {tokenizer} is no folder; give one with config.json and a tokenizer")
    if audit is not None:
        rules = audit(run, tokenizer or _model_path(run))
        return _audit(paths if step is not None else _step_files(run, None), rules, as_json)
    path = paths[-1]
    codec, note = _tokenizer(run, tokenizer)
    rows = list(read_rows(path))
    shown = list(parse_rows(path, rows[:limit]))
    number = _number(path)
    decode = codec.decode if codec else None
    page = trajectories_page(run.name, number, shown, num_recorded=len(rows), decode=decode, note=note)
    target = out or run / "view" / f"step_{number:05d}.html"
    with _writing(target):
        write_text(target, page)
    _say({"html": str(target), "step": number, "shown": len(shown), "recorded": len(rows)}, as_json, str(target))
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


def _step_files(run: Path, step: int | None) -> list[Path]:
    if run.is_file():
        raise DataError(f"{run} is a file; give a run's folder, such as runs/quickstart")
    folder = run / "trajectories"
    paths = sorted(folder.glob("step_*.jsonl.zst"))
    if not paths:
        raise DataError(f"{folder} holds no step_*.jsonl.zst; give a run folder such as runs/quickstart")
    if step is None:
        return paths
    wanted = step_path(folder, step)
    if wanted not in paths:
        raise DataError(f"{wanted} is not there; this run has steps {_number(paths[0])} to {_number(paths[-1])}")
    return [wanted]


def _number(path: Path) -> int:
    found = re.match(r"step_(\d+)\.", path.name)
    if found is None:
        raise DataError(f"{path}: not named step_NNNNN.jsonl.zst")
    return int(found[1])


def _model_path(run: Path) -> Path:
    """`model.path` of the run's config; a relative one counts from the working folder, as in training."""
    config = run / "config.json"
    try:
        return Path(json.loads(config.read_text())["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"{config}: does not name the model ({type(exc).__name__}); give its folder by --tokenizer"
        ) from None


def _tokenizer(run: Path, given: Path | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer and a note for the page. Without the run's own tokenizer the page shows whole turns and says why; one that
    was named must exist."""
    if given is not None:
        return Tokenizer(given), ""
    try:
        return Tokenizer(_model_path(run)), ""
    except DataError as exc:
        return None, f"Shown by turn instead of by token: {exc}"


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise DataError(f"{target} cannot be written: {exc.strerror}; choose another --out") from None


def _say(values: Mapping[str, object], as_json: bool, text: str) -> None:
    print(json.dumps(values) if as_json else text)
