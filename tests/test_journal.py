"""The journal survives a kill in the middle of a line and continues as the next attempt."""

import contextlib
from pathlib import Path

import pytest

from gptcore.entry import recording, short_title
from gptcore.errors import Stopped
from gptcore.journal import Journal, describe_damage, last_record, read_journal


def test_lines_come_back_in_order_and_offsets_continue(tmp_path):
    journal = Journal(tmp_path)
    journal.open("toy")
    journal.metrics({"train/loss": 2.5}, tokens_seen=10, step=1)
    records, offset = read_journal(journal.path)
    assert [r["kind"] for r in records] == ["open", "metrics"]
    assert records[1] | {"time_ms": 0} == {
        "seq": 1,
        "attempt": 0,
        "time_ms": 0,
        "kind": "metrics",
        "step": 1,
        "tokens_seen": 10,
        "values": {"train/loss": 2.5},
    }
    journal.close()
    records, _ = read_journal(journal.path, offset)
    assert [r["status"] for r in records] == ["FINISHED"]


def test_half_a_line_is_not_read_and_is_cut_on_reopening(tmp_path):
    Journal(tmp_path).open("toy")
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"seq": 1, "kind": "met')
    assert len(read_journal(path)[0]) == 1
    again = Journal(tmp_path)
    again.metrics({"x": 1.0}, tokens_seen=5)
    records, _ = read_journal(path)
    assert [(r["seq"], r["attempt"]) for r in records] == [(0, 0), (1, 1)]


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="never a number"):
        Journal(tmp_path).metrics({"loss": float("nan")}, tokens_seen=0)


def test_a_missing_journal_has_no_lines(tmp_path):
    assert read_journal(tmp_path / "none") == ([], 0)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("x"), "FAILED"), (Stopped("s"), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_recording_always_closes(tmp_path, error, status):
    with contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(type(error)))
        stack.enter_context(recording(tmp_path / "step", "run/step", "run"))
        if error is not None:
            raise error
    records, _ = read_journal(tmp_path / "step" / "metrics.jsonl")
    assert (records[0]["run"], records[0]["parent"], records[-1]["status"]) == ("run/step", "run", status)


def test_steps_of_two_runs_have_names_of_their_own():
    """Two rows `train` in a comparison, and nothing that says which is which."""
    assert short_title("smoke-20261126-222109-05f3") == "smoke-20261126-222109-05f3"
    assert short_title("smoke-20261126-222109-05f3/train") == "train 05f3"
    assert short_title("smoke-20261126-222109-05f3/evaluate/samples") == "samples 05f3"


# --- what is damaged is named, and the rest is read -------------------------------------------------------------------------


def toy(folder: Path) -> Path:
    journal = Journal(folder)
    journal.open("toy")
    journal.metrics({"train/loss": 2.5}, tokens_seen=10, step=1)
    journal.close()
    return journal.path


def test_no_flipped_bit_goes_unseen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is named by file and line, or it has changed nothing that is read. (In the checksum's own name it only adds a word.)"""
    path = toy(tmp_path)
    content, whole = path.read_bytes(), read_journal(path)[0]
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        other = tmp_path / f"{bit}.jsonl"
        other.write_bytes(flipped)
        caplog.clear()
        records = read_journal(other)[0]
        if not any(f"{other}: line" in message for message in caplog.messages):
            assert [{key: got.get(key) for key in record} for got, record in zip(records, whole, strict=True)] == whole, bit


def test_damage_is_said_once_and_left_out_wherever_it_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = toy(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 5000 + b"\n" + lines[1] + lines[2] + b"garbage\n" + b"\0" * 100_000)
    for _ in range(2):
        assert [record["kind"] for record in read_journal(path)[0]] == ["open", "metrics", "close"]
    assert caplog.messages == [f"{path}: lines 2, 5, 6 are damaged and left out; the rest is used"]
    assert (last_record(path) or {})["kind"] == "close"
    assert describe_damage(path) == "lines 2, 5, 6 are damaged"
    again = Journal(tmp_path)
    again.metrics({"x": 1.0}, tokens_seen=11)
    assert [(r["seq"], r["attempt"]) for r in read_journal(path)[0]][-2:] == [(2, 0), (3, 1)]
    assert (last_record(path) or {})["seq"] == 3


def test_a_journal_of_nothing_but_zeros_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 200_000)
    assert last_record(tmp_path / "metrics.jsonl") is None
    Journal(tmp_path).open("toy")
    assert [record["run"] for record in read_journal(tmp_path / "metrics.jsonl")[0]] == ["toy"]


def test_lines_without_checksum_are_read(tmp_path: Path) -> None:
    """Those of older versions; one that lacks what readers rely on counts as damaged."""
    path = tmp_path / "metrics.jsonl"
    line = '{"seq": 0, "attempt": 0, "time_ms": 1, "kind": "tags", "%s": {"a": "b"}}\n'
    path.write_text(line % "values" + line % "valuds")
    assert [record["values"] for record in read_journal(path)[0]] == [{"a": "b"}]
