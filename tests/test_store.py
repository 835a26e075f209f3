"""Committed directories are whole or absent."""

import contextlib
import json

import pytest

from gptcore.config import UserError
from gptcore.store import DamagedError, claim, commit_dir, content_id, is_committed, read_manifest


def commit(directory, text="hello"):
    with commit_dir(directory, {"kind": "toy"}) as tmp:
        (tmp / "a.txt").write_text(text)
    return directory


def test_commit_lists_sizes_and_hashes(tmp_path):
    manifest = read_manifest(commit(tmp_path / "x"), verify=True)
    assert manifest["kind"] == "toy"
    assert manifest["files"]["a.txt"]["bytes"] == 5


def test_an_exception_leaves_nothing(tmp_path):
    with contextlib.suppress(RuntimeError), commit_dir(tmp_path / "x", {}) as tmp:
        (tmp / "a.txt").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_marker_is_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "torn").touch()
    assert not is_committed(tmp_path / "x")
    with pytest.raises(UserError, match="COMMITTED"):
        read_manifest(tmp_path / "x")
    assert sorted(p.name for p in commit(tmp_path / "x").iterdir()) == ["COMMITTED", "a.txt", "manifest.json"]


def test_the_first_of_two_writers_wins(tmp_path):
    commit(tmp_path / "x", "first")
    commit(tmp_path / "x", "second")
    assert (tmp_path / "x" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("text", "verify"), [("hello!", False), ("hellO", True)])
def test_a_changed_file_is_named(tmp_path, text, verify):
    directory = commit(tmp_path / "x")
    (directory / "a.txt").write_text(text)
    with pytest.raises(UserError, match=r"a\.txt"):
        read_manifest(directory, verify=verify)


def test_content_id_does_not_depend_on_key_order():
    assert content_id({"a": 1, "b": 2}) == content_id(json.loads('{"b": 2, "a": 1}'))
    assert content_id({"a": 1}) != content_id({"a": 2})


def test_a_file_where_a_directory_is_to_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file is in the way; give a directory"), claim(path):
            pass


def test_what_is_no_committed_directory_is_not_simply_to_be_deleted(tmp_path):
    with pytest.raises(DamagedError, match=r"no such directory; correct the path"):
        read_manifest(tmp_path / "no")
    with pytest.raises(DamagedError, match=r"not a committed directory .*; correct the path, or, if that is a checkpoint"):
        read_manifest(tmp_path)
