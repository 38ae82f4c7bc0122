"""Atomic writes: old or new content, whole, whatever kills the writer."""

import json
import multiprocessing
import os
import signal

import pytest

from torl_mega.run.files import replace_folder, replacing, temporary_for, write_json, write_text


def test_a_file_and_its_folders_appear_with_their_content(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, 2]})
    assert json.loads(path.read_text()) == {"x": [1, 2]}
    write_text(path, "é \ud800")
    assert path.read_bytes() == "é ".encode() + b"\\ud800"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as out:
        out.writelines([b"new", "not bytes"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _killed_before_the_rename(path, content):
    with replacing(path) as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
        os.kill(os.getpid(), signal.SIGKILL)


def _dies(function, *arguments):
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_writer_killed_between_write_and_rename_leaves_the_old_content_whole(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    _dies(_killed_before_the_rename, path, b"new" * 1000)
    assert path.read_text() == "old"
    assert set(tmp_path.iterdir()) == {path, temporary_for(path)}
    write_text(path, "newer")  # the next write clears up
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    target = tmp_path / "hf"
    for content in ("old", "new"):
        temporary = temporary_for(target)
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "file").write_text(content)
        replace_folder(temporary, target)
        assert (target / "sub" / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [target]
