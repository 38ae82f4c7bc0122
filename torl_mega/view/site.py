"""The viewer on disk: a page, its program, and the data of one or more runs; or all of it in one file.

    RUN/view/index.html             opens from a file, fetches nothing but what lies beside it
    RUN/view/app/                   the program, and libraries that it loads when it needs them
    RUN/view/data/manifest.js       which runs and sets there are
    RUN/view/data/KEY/…             the chunks of one run, and written.json: what they were made of

Contract: a set whose file has not changed is not read again; every file is replaced whole, and the manifest last, so that the
page works at every moment. The page's policy allows its own scripts and style and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError
from torl_mega.run.files import write_text
from torl_mega.run.metrics import read_rows
from torl_mega.view.chunks import FORMAT, SetWriter, script
from torl_mega.view.run_data import is_number
from torl_mega.view.sets import Source, attempts
from torl_mega.view.spans import Pieces, visible
from torl_mega.view.templates import environment

SCRIPTS = (
    "core",
    "store",
    "filters",
    "list",
    "tokens",
    "read",
    "attempt",
    "group",
    "problem",
    "timeline",
    "steps",
    "main",
)
LIBRARIES = {"katex": ("katex",), "highlight": ("highlight_core", "highlight_python")}
PHASES = ("rollout_s", "train_s", "sync_s", "step_s")


@dataclass(slots=True)
class Shown:
    """One run on the page. The tokenizer is read when a set is first written."""

    folder: Path
    key: str  # of its folder under data/
    tokenizer: Path | None  # as it was given
    note: str = ""
    _pieces: list[Pieces | None] = field(default_factory=list)

    @property
    def name(self) -> str:
        return visible(self.folder.resolve().name)

    def model(self) -> Path:
        return self.tokenizer or model_path(self.folder)

    def pieces(self) -> Pieces | None:
        """Of the run's own tokenizer; without it turns are shown whole, and `note` says why. One that was named must exist."""
        if not self._pieces:
            try:
                self._pieces.append(Pieces(Tokenizer(self.model()).decode))
            except DataError as exc:
                if self.tokenizer is not None:
                    raise
                self._pieces.append(None)
                self.note = visible(f"Shown by turn instead of by token: {exc}")
        return self._pieces[0]

    def told_by(self) -> str:
        """What the texts depend on beside the set's file."""
        try:
            model = self.model()
        except DataError:
            return "turns"
        return f"{model} {model.is_dir()}"


def model_path(run: Path) -> Path:
    """`model.path` of the run's config; a relative one counts from the working folder, as in training."""
    config = run / "config.json"
    try:
        return Path(json.loads(config.read_text())["config"]["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"{config}: does not name the model ({type(exc).__name__}); give its folder by --tokenizer"
        ) from None


def key_of(folder: Path) -> str:
    """A name for the folder of another run's data, of letters that any system takes."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", folder.resolve().name)[:40]
    return f"{plain}_{hashlib.sha256(str(folder.resolve()).encode('utf-8', 'replace')).hexdigest()[:6]}"


def write_sets(
    target: Path,
    run: Shown,
    wanted: Sequence[Source],
    ledger: dict[str, dict[str, Any]],
    *,
    limit: int | None,
    wrote: Callable[[str], None],
) -> None:
    """Writes the sets of `wanted` that are new or changed, newest first, and notes each in `ledger` (see `ledger_of`). `wrote` is
    told after each how far it is."""
    folder = target / "data" / run.key
    todo = [s for s in wanted if ledger.get(s.name, {}).get("made_of") != _made_of(s, run, limit)]
    for number, source in enumerate(reversed(todo), 1):
        made_of = _made_of(source, run, limit)  # before it is read: what changes meanwhile is written again
        ledger[source.name] = {"made_of": made_of, **_write_set(folder, run, source, limit)}
        write_text(folder / "written.json", json.dumps({"format": FORMAT, "sets": ledger}))
        wrote(f"{run.name}: {source.title} ({number} of {len(todo)})")


def _made_of(source: Source, run: Shown, limit: int | None) -> str:
    return f"{source.signature()} {limit} {run.told_by()}"


def ledger_of(target: Path, run: Shown) -> dict[str, dict[str, Any]]:
    """What `written.json` says is there: what each set was made of, and its summary. Nothing after a change of format or where
    the file is damaged."""
    try:
        found = json.loads((target / "data" / run.key / "written.json").read_text())
        return dict(found["sets"]) if found["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_set(folder: Path, run: Shown, source: Source, limit: int | None) -> dict[str, Any]:
    prefix = f"{run.key}/"

    def put(name: str, text: str) -> None:
        write_text(folder / f"{name.removeprefix(prefix)}.js", text)

    summary = _summary(prefix, put, run, source, limit)
    number = summary["chunks"]
    while (left := folder / f"{source.name}.{number:03d}.js").exists():  # of a longer file of that name
        left.unlink()
        number += 1
    return summary


def _summary(
    prefix: str, put: Callable[[str, str], None], run: Shown, source: Source, limit: int | None
) -> dict[str, Any]:
    writer = SetWriter(prefix + source.name, put, limit)
    writer.add_all(attempts(source, run.pieces() if source.kind == "step" else None))
    return {**writer.close(), "note": run.note if source.kind == "step" else ""}


def manifest(runs: Sequence[tuple[Shown, Sequence[Source], Mapping[str, Any]]], *, open_at: str, follow: bool) -> Any:
    """What the page reads first."""
    return {
        "format": FORMAT,
        "follow": follow,
        "open": open_at,
        "runs": [
            {"key": run.key, "name": run.name, "note": _note_of(written), "sets": _sets(run, sources, written)}
            for run, sources, written in runs
        ],
    }


def _note_of(written: Mapping[str, Any]) -> str:
    return next((entry["note"] for entry in written.values() if entry.get("note")), "")


def _sets(run: Shown, sources: Sequence[Source], written: Mapping[str, Any]) -> list[dict[str, Any]]:
    phases = _phases(run.folder)
    sets = []
    for source in sources:
        if source.name not in written:
            continue
        entry = dict(written[source.name])
        version = hashlib.sha256(entry.pop("made_of", "").encode("utf-8", "replace")).hexdigest()[:8]
        entry |= {"name": source.name, "kind": source.kind, "title": visible(source.title), "step": source.step}
        sets.append({**entry, "version": version, "phases": phases.get(source.step) if source.kind == "step" else None})
    return sets


def _phases(run: Path) -> dict[Any, dict[str, float]]:
    """Seconds of each phase of the steps whose metrics are there."""
    rows = [r for r in read_rows(run / "metrics.jsonl") if isinstance(r, dict) and r.get("kind") == "train"]
    return {r.get("step"): {name: round(r[name], 4) for name in PHASES if is_number(r.get(name))} for r in rows}


# ------------------------------------------------------------------------------------------------ the page


def write_page(target: Path) -> None:
    """index.html and the program, where they differ from what is there."""
    for name, text in _program().items():
        write_new(target / "app" / name, text)
    addresses = [f"app/{name}.js" for name in SCRIPTS]
    page = environment().get_template("viewer.html.j2")
    text = page.render(policy="script-src 'self'; style-src 'self'", style=None, inline=[], addresses=addresses)
    write_new(target / "index.html", text)


def write_new(path: Path, text: str) -> None:
    """Writes a file that differs from what is there."""
    try:
        if path.read_text("utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    write_text(path, text)


def single_page(run: Shown, source: Source, *, limit: int | None) -> tuple[str, dict[str, Any]]:
    """The page of one set with everything in it, and the set's summary. Its policy allows these scripts by their hashes."""
    chunks: dict[str, str] = {}
    summary = _summary(f"{run.key}/", chunks.__setitem__, run, source, limit)
    about = manifest([(run, [source], {source.name: summary})], open_at=source.name, follow=False)
    program = _program()
    libraries = [program[f"{name}.js"] for name in LIBRARIES]
    ordered = [program["core.js"], *libraries, script("manifest", about), *chunks.values()]
    inline = [*ordered, *(program[f"{name}.js"] for name in SCRIPTS[1:])]
    policy = f"script-src {' '.join(map(_hash, inline))}; style-src {_hash(program['style.css'])}"
    page = environment().get_template("viewer.html.j2")
    return page.render(policy=policy, style=program["style.css"], inline=inline, addresses=[]), summary


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _program() -> dict[str, str]:
    """Every file of app/ by its name."""
    own = files("torl_mega.view") / "app"
    program = {f"{name}.js": (own / f"{name}.js").read_text("utf-8") for name in SCRIPTS}
    program["style.css"] = (own / "style.css").read_text("utf-8")
    return program | dict(_libraries())


def _libraries() -> Iterator[tuple[str, str]]:
    """Each library as one script, below its licence; those that export to a module are given one."""
    kept = files("torl_mega.view") / "vendor"
    for name, parts in LIBRARIES.items():
        texts = [(kept / f"{part}.js").read_text("utf-8") for part in parts]
        if len(texts) > 1:
            texts = [
                f"torl.library({json.dumps(part)}, function (module) {{\n{text}\n}});\n"
                for part, text in zip(parts, texts, strict=True)
            ]
        yield f"{name}.js", f"/*!\n{(kept / f'LICENSE.{name}').read_text('utf-8')}*/\n{''.join(texts)}"
