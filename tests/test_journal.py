"""The journal survives a kill in the middle of a line and continues as the next attempt."""

import contextlib

import pytest

from gptcore.entry import recording, short_title
from gptcore.errors import Stopped
from gptcore.journal import Journal, read_journal


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
