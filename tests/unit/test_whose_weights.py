"""Which servers may be scored as `model.path`, by what they say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from torl_mega.errors import ServerError
from torl_mega.serving.whose_weights import judged

URL = "http://a:1"


def test_the_same_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for loaded in ("model", "link"):
        for version in ("default", "0"):  # of a trainer that has made no step
            line = judged(URL, str(tmp_path / loaded), version, str(tmp_path / "model"))
            assert line == f"{URL} holds the weights of {tmp_path / loaded}, version {version}"
    assert judged(URL, "Qwen/Qwen2.5-Math-7B", "default", "Qwen/Qwen2.5-Math-7B").startswith(f"{URL} holds")


def test_a_folder_that_only_the_server_sees_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert judged(URL, "/mnt/x/model", "default", str(tmp_path / "model")).startswith("warning: ")


@pytest.mark.parametrize(
    ("loaded", "version", "what"),
    [
        ("model", "7", "holds version 7 of a training run's weights"),
        ("model", "torn", "holds no whole weights (version torn)"),
        ("model", "asleep", "holds no whole weights (version asleep)"),
        ("other/model", "default", "holds the weights of"),
        ("/mnt/x/another", "default", "holds the weights of /mnt/x/another"),
    ],
)
def test_what_cannot_be_the_model_is_one_line(tmp_path: Path, loaded: str, version: str, what: str) -> None:
    for folder in ("model", "other/model"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ServerError) as caught:
        judged(URL, str(tmp_path / loaded), version, str(tmp_path / "model"))
    assert what in str(caught.value)
    assert f"model.path = {tmp_path / 'model'} is asked for; start it again with that model" in str(caught.value)
    assert "\n" not in str(caught.value)
