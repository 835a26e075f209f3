"""Committed directories are whole or absent."""

import contextlib
import errno
import json

import numpy as np
import pytest

from gptcore import store
from gptcore.config import UserError
from gptcore.store import (
    CHECKSUM,
    DamagedError,
    claim,
    commit_dir,
    content_id,
    is_committed,
    read_arrays,
    read_json,
    read_manifest,
    verified,
    verify_file,
    write_arrays,
    write_json,
)


def commit(directory, text="hello"):
    with commit_dir(directory, {"kind": "toy"}) as tmp:
        (tmp / "a.txt").write_text(text)
    return directory


def test_commit_lists_sizes_and_hashes(tmp_path):
    manifest = verified(commit(tmp_path / "x"))
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


@pytest.mark.parametrize(("text", "read"), [("hello!", read_manifest), ("hellO", verified)])
def test_a_changed_file_is_named(tmp_path, text, read):
    directory = commit(tmp_path / "x")
    (directory / "a.txt").write_text(text)
    with pytest.raises(UserError, match=r"a\.txt"):
        read(directory)


def test_the_marker_covers_the_manifest(tmp_path):
    """A manifest that a bit was flipped in would vouch for anything; an empty marker is what earlier versions wrote."""
    directory = commit(tmp_path / "x")
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace("toy", "toz"))
    with pytest.raises(DamagedError, match=r"manifest\.json: not what COMMITTED"):
        read_manifest(directory)
    (directory / "COMMITTED").write_bytes(b"")
    assert read_manifest(directory)["kind"] == "toz"


def test_a_file_is_read_once_in_a_process_and_again_when_it_changed(tmp_path, monkeypatch):
    directory, read = commit(tmp_path / "x"), []
    monkeypatch.setattr(store, "hash_file", lambda path, real=store.hash_file: read.append(path.name) or real(path))
    monkeypatch.setattr(store, "_known", {})
    verified(directory)
    verified(directory)
    assert read == ["a.txt"]
    (directory / "a.txt").write_text("jello")
    with pytest.raises(DamagedError, match=r"a\.txt: content differs"):
        verified(directory)
    verified(directory, [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["a.txt", "manifest.json", "COMMITTED"])
def test_what_cannot_be_read_is_not_damaged(tmp_path, refuse, name, number):
    """Whoever deletes what is damaged, or makes it again, would have deleted a file that is whole."""
    directory = commit(tmp_path / "x")
    refuse(directory / name, number)
    with pytest.raises(OSError) as raised:
        verified(directory)
    assert (raised.value.errno, raised.value.filename) == (number, str(directory / name))


@pytest.mark.parametrize("read", [read_json, read_arrays])
def test_state_that_cannot_be_read_is_not_damaged(tmp_path, refuse, read):
    write_json(tmp_path / "state", {})
    refuse(tmp_path / "state", errno.EIO)
    with pytest.raises(OSError, match="state"):
        read(tmp_path / "state")


def test_a_failing_disk_names_the_file(tmp_path, monkeypatch):
    """The number comes from read(), which knows no name."""

    class Failing:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def readinto(self, piece):
            raise OSError(errno.EIO, "Input/output error")

    directory = commit(tmp_path / "x")
    monkeypatch.setattr(store, "_known", {})
    monkeypatch.setattr(store, "open", lambda *args, **kwargs: Failing(), raising=False)
    with pytest.raises(OSError, match=r"a\.txt"):
        verified(directory)


@pytest.mark.parametrize(
    ("name", "size"), [("x", "1e999"), ("\\ud800", "1"), ("n" * 5000, "1")], ids=["inf", "surrogate", "long"]
)
def test_a_manifest_that_nothing_vouches_for_is_named(tmp_path, name, size):
    """An earlier version's marker is empty."""
    directory = commit(tmp_path / "x")
    (directory / "COMMITTED").write_bytes(b"")
    (directory / "manifest.json").write_text(f'{{"files": {{"{name}": {{"bytes": {size}, "sha256": ""}}}}}}')
    with pytest.raises(DamagedError):
        read_manifest(directory)


def test_what_is_no_file_is_not_committed_and_not_at_work(tmp_path):
    (tmp_path / "file").write_text("")
    assert not is_committed(tmp_path / ("n" * 5000))
    assert not store.is_claimed(tmp_path / "file")


def test_a_directory_under_the_name_of_another_is_not_believed(tmp_path):
    """Each of two that were exchanged is what its own manifest says."""
    names = ["0123456789abcdef", "fedcba9876543210"]
    for name in names:
        with commit_dir(tmp_path / name, {"id": name}):
            pass
    (tmp_path / names[0]).rename(tmp_path / "a copy")
    assert verified(tmp_path / "a copy")["id"] == names[0]
    (tmp_path / names[1]).rename(tmp_path / names[0])
    with pytest.raises(DamagedError, match=f"{names[0]}: holds {names[1]}"):
        read_manifest(tmp_path / names[0])


def test_one_file_of_a_directory(tmp_path):
    directory = commit(tmp_path / "x")
    (tmp_path / "alone.txt").write_text("anything")
    (directory / "later.txt").write_text("anything")
    for path in (tmp_path / "alone.txt", directory / "later.txt", directory / "a.txt"):
        verify_file(path)
    (directory / "a.txt").write_text("jello")
    with pytest.raises(DamagedError, match=r"a\.txt: content differs"):
        verify_file(directory / "a.txt")
    with pytest.raises(DamagedError, match=r"manifest\.json: does not list other\.txt"):
        verified(directory, ["other.txt"])


def test_what_json_holds_comes_back_and_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    value = {"text": "naïve \u2028", "numbers": [1, 2.5, float("inf")], "nested": {"1": None}}
    write_json(path, value)
    assert read_json(path) == value
    assert CHECKSUM in json.loads(path.read_text())
    for old, new in [("2.5", "3.5"), (CHECKSUM, "checksul"), ('"text"', '"texu"'), ("sha256:", "sha356:")]:
        write_json(path, value)
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(DamagedError, match=r"state\.json: damaged.*\(checksum\)"):
            read_json(path)
    path.write_text('{"by hand": 1}')
    assert read_json(path) == {"by hand": 1}
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("text", [b"", b"\0" * 9, b"[1]", b'{"a": 1', b"\xff{}", b"[" * 100_000], ids=repr)
def test_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text)
    with pytest.raises(DamagedError, match=r"state\.json: damaged, it holds no JSON object"):
        read_json(tmp_path / "state.json")


def test_arrays_come_back_and_a_shorter_one_is_not_believed(tmp_path):
    """The zip's own checksum is not looked at where a damaged header asks for fewer numbers than there are."""
    path = tmp_path / "arrays.npz"
    write_arrays(path, {"many": np.arange(300.0), "none": np.zeros((0, 2), dtype=np.uint64)})
    found = read_arrays(path)
    assert np.array_equal(found["many"], np.arange(300.0))
    assert found["none"].shape == (0, 2)
    np.savez(path, many=np.arange(200.0), checksum=np.load(path)["checksum"])
    with pytest.raises(DamagedError, match=r"arrays\.npz: damaged.*\(checksum\)"):
        read_arrays(path)
    np.savez(path, many=np.arange(3))  # as an earlier version wrote it
    assert read_arrays(path)["many"].tolist() == [0, 1, 2]
    path.write_bytes(b"PK")
    with pytest.raises(DamagedError, match=r"arrays\.npz: damaged"):
        read_arrays(path)


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
