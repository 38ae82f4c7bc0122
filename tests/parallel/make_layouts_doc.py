"""Writes docs/layouts.md from the results of the matrix.

python tests/parallel/make_layouts_doc.py RESULTS.jsonl [...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("logits", "grad", "weights", "logprobs", "entropy", "grad_norm")
HEAD = """# Every layout against HF and torch

Each row is one run of the trainer (packed variable-length micro-batches, temperature 0.7, clipped surrogate with entropy
bonus, AdamW with clipping, three steps) on a small random model in fp32, compared with plain `transformers` one sequence
at a time and `torch.optim.AdamW`. Largest absolute differences; `grad_norm` is relative. Limits: logits 2e-6, gradients
2e-7, weights 5e-7. Layouts are all TP, PP, DP in {1, 2, 4} and CP in {1, 2} that fit eight ranks, with sequence
parallelism and a virtual pipeline where they apply; overlap, recomputation and the plain optimizer rotate over them.

Gradients are those of the token-mean loss: `loss_weights` divides by the trained tokens of the whole mini-batch, and the sums
over micro-batches, data and context ranks are divided by nothing more; they are compared before clipping. Their limit is
absolute, so their size counts: advantages are normal numbers times 0.6, which makes the largest gradient {largest}. With a
factor of 1 gradients and differences are larger in proportion, and a Qwen3 case was above 2e-7.

Models rotate over the layouts. Made by `tests/parallel/make_layouts_doc.py` from the results of `tests/parallel/layout_worker.py`.

"""


def main(files: list[str]) -> None:
    rows = [json.loads(line) for name in files for line in Path(name).read_text().splitlines()]
    sizes = {r["model"]: max(s["largest_grad"] for s in rows if s["model"] == r["model"]) for r in rows}
    text = [HEAD.replace("{largest}", ", ".join(f"{size:.2f} ({model})" for model, size in sorted(sizes.items())))]
    for version in sorted({r["megatron"] for r in rows}):
        chosen = [r for r in rows if r["megatron"] == version]
        worst = ", ".join(f"{c} {max(r[c] for r in chosen):.1e}" for c in COLUMNS)
        text.append(
            f"## megatron-core {version}: {len(chosen)} cases, {len({r['layout'] for r in chosen})} layouts\n\n"
        )
        text.append(
            f"Worst: {worst}.\n\n| layout | model | tied | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}\n"
        )
        for r in chosen:
            cells = " | ".join(f"{r[c]:.1e}" for c in COLUMNS)
            text.append(f"| {r['layout']} | {r['model']} | {'yes' if r['tied'] else 'no'} | {cells} |\n")
        text.append("\n")
    (ROOT / "docs/layouts.md").write_text("".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
