"""Rotary settings as they stand in config.json files of users, all of which mean the same to transformers, SGLang and us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ACCEPTED: dict[str, dict[str, Any]] = {
    "version 4": {"rope_parameters": ..., "rope_theta": 1e6},
    "version 4 with yarn": {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": YARN},
    "version 4, old key": {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
    "version 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta beside": {"rope_parameters": YARN, "rope_theta": 1e6},
    "both alike": {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN, "rope_theta": 1e6},
    "yarn of the whole context": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    "llama3 of the whole context": {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    "no setting": {"rope_parameters": ..., "rope_theta": ...},
    "whole heads": {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def change(folder: Path, **settings: Any) -> None:
    """Settings of config.json; ... takes one out."""
    config = {**json.loads((folder / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
