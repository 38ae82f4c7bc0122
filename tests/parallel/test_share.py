"""`share` and `raise_together` between two real ranks."""

from __future__ import annotations

import json
from pathlib import Path

from torchrun import torchrun


def test_share_carries_rollouts_and_exceptions(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    torchrun(2, Path(__file__).with_name("share_worker.py"), out)
    # 4M tokens: 1 s on an idle machine, 4 s as broadcast_object_list does it; the limit leaves room for a busy one
    assert json.loads(out.read_text())["seconds"] < 15
