"""Saves beside training with the GPU image's megatron-core, without nvidia-resiliency-ext and beside one as images ship it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

import hf_reference as ref  # noqa: E402
from torchrun import NEXT, run_python  # noqa: E402

WORKER = ROOT / "tests/parallel/resume_worker.py"
pytestmark = pytest.mark.skipif(
    not NEXT.is_dir(), reason="NOT PROVEN: run `make gpu-sources` to fetch megatron-core 0.19.2"
)

# what strategies/nvrx.py of megatron-core 0.19.2 looks for, module by module
NVRX = {
    "core": ["AsyncCallsQueue", "AsyncRequest"],
    "cached_metadata_filesystem_reader": ["CachedMetadataFileSystemReader"],
    "filesystem_async": ["FileSystemWriterAsync", "get_write_results_queue", "_results_queue"],
    "state_dict_saver": ["CheckpointMetadataCache", "save_state_dict_async_finalize", "save_state_dict_async_plan"],
}


def stand_in(folder: Path, version: str) -> Path:
    """A package that has every name of nvidia-resiliency-ext that Megatron looks for, and none that works."""
    package = folder / "nvidia_resiliency_ext/checkpointing/async_ckpt"
    package.mkdir(parents=True)
    for name, symbols in NVRX.items():
        (package / f"{name}.py").write_text("".join(f"{symbol} = object()\n" for symbol in symbols))
    (folder / "nvidia_resiliency_ext/__init__.py").write_text(f"__version__ = {version!r}\n")
    info = folder / f"nvidia_resiliency_ext-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("async") / "model"
    ref.save_model(ref.make_model("qwen2", tied=True), path)
    return path


@pytest.mark.parametrize("beside", [pytest.param(None, marks=pytest.mark.slow), "0.6.0"])
def test_an_asynchronous_save_resumes_bit_for_bit(model: Path, tmp_path: Path, beside: str | None) -> None:
    also = [stand_in(tmp_path / "site", beside)] if beside else []
    calm, resumed = tmp_path / "calm", tmp_path / "resumed"
    calm.mkdir()
    run_python(WORKER, calm, model, "3", "async", next_megatron=True, also=also, timeout_s=120)
    shutil.copytree(calm / "step_000002", resumed / "step_000002")
    run_python(WORKER, resumed, model, "3", "async", next_megatron=True, also=also, timeout_s=120)
    assert (resumed / "final.json").read_text() == (calm / "final.json").read_text()
    whole = (calm / "metrics.jsonl").read_text().splitlines()
    assert (resumed / "metrics.jsonl").read_text().splitlines() == whole[2:], (
        "it trained what was not saved, and no more"
    )


def test_megatron_is_not_imported_beside_an_older_one_and_the_pin_is_new_enough(tmp_path: Path) -> None:
    code = "import megatron.core.dist_checkpointing.strategies.nvrx as n; n.has_nvrx_async_support()"
    with pytest.raises(AssertionError, match="Minimum required nvidia-resiliency-ext"):
        run_python("-c", code, next_megatron=True, also=[stand_in(tmp_path / "old", "0.6.0.dev33")])
    pinned = re.search(r'"nvidia-resiliency-ext==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    run_python("-c", code, next_megatron=True, also=[stand_in(tmp_path / "pinned", pinned[1])])
