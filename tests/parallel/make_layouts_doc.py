"""Writes docs/layouts.md, the worst difference of the whole matrix per Megatron version, and every case to build/layouts.md.

python tests/parallel/make_layouts_doc.py RESULTS.jsonl [...]        results of test_layouts.py, kept with TORL_LAYOUTS_OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("logits", "grad", "weights", "logprobs", "entropy", "grad_norm")
PAGE = """# Every layout against HF and torch

A case is one run of the trainer (packed variable-length micro-batches, temperature 0.7, clipped surrogate with entropy
bonus, AdamW with clipping, three steps) on a small random model in fp32, compared with plain `transformers` one sequence
at a time and `torch.optim.AdamW`. Largest absolute differences; `grad_norm` is relative. Limits: logits 2e-6, gradients
2e-7, weights 5e-7. Layouts are all TP, PP, DP in {1, 2, 4} and CP in {1, 2} that fit eight ranks, with sequence
parallelism and a virtual pipeline where they apply; overlap, recomputation and the plain optimizer rotate over them, and
so do the models (Qwen2, Qwen3 and Llama, tied and untied).

Gradients are those of the token-mean loss: `loss_weights` divides by the trained tokens of the whole mini-batch, and the sums
over micro-batches, data and context ranks are divided by nothing more; they are compared before clipping. Their limit is
absolute, so their size counts: advantages are normal numbers times 0.6, which makes the largest gradient
{largest}. With a factor of 1 gradients and differences are larger in
proportion, and a Qwen3 case was above 2e-7.

| megatron-core | cases | layouts | worst |
|---|---|---|---|
{worst}

Made, with a table of all cases in `build/layouts.md`, by

    make mcore-next && mkdir -p build/layouts
    TORL_LAYOUTS_OUT=build/layouts python -m pytest -m slow tests/parallel/test_layouts.py
    python tests/parallel/make_layouts_doc.py build/layouts/*.jsonl
"""


def main(files: list[str]) -> None:
    rows = [json.loads(line) for name in files for line in Path(name).read_text().splitlines()]
    sizes = {r["model"]: max(s["largest_grad"] for s in rows if s["model"] == r["model"]) for r in rows}
    largest = ", ".join(f"{size:.2f} ({model})" for model, size in sorted(sizes.items()))
    versions = {v: [r for r in rows if r["megatron"] == v] for v in sorted({r["megatron"] for r in rows})}
    worst = "\n".join(summary(version, chosen) for version, chosen in versions.items())
    (ROOT / "docs/layouts.md").write_text(PAGE.replace("{largest}", largest).replace("{worst}", worst))
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/layouts.md").write_text("\n".join(table(*item) for item in versions.items()))


def summary(version: str, rows: list[dict[str, Any]]) -> str:
    worst = ", ".join(f"{c} {max(r[c] for r in rows):.1e}" for c in COLUMNS)
    return f"| {version} | {len(rows)} | {len({r['layout'] for r in rows})} | {worst} |"


def table(version: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"# megatron-core {version}", "", f"| layout | model | tied | {' | '.join(COLUMNS)} |"]
    lines.append(f"|{'---|' * (3 + len(COLUMNS))}")
    for r in rows:
        cells = " | ".join(f"{r[c]:.1e}" for c in COLUMNS)
        lines.append(f"| {r['layout']} | {r['model']} | {'yes' if r['tied'] else 'no'} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main(sys.argv[1:])
