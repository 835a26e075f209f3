"""A corpus that grows: what is there stays as it is, and no text ever changes sides."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcore import corpus
from gptcore.config import DataConfig
from gptcore.corpus import families, records
from gptcore.corpus.sections import SplitPlan, cut_sections, hash_document, section_key
from gptcore.store import read_manifest


def text_of(seed: int, n_words: int = 120) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(n_words)]
    return f"document {seed}\n\n" + "\n\n".join(" ".join(words[at : at + 30]) for at in range(0, n_words, 30)) + "\n"


def fill(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:04}.txt").write_text(text_of(number))


def sides(directory: Path) -> dict[str, str]:
    """Each record's text and the side it is on."""
    return {record.text: split for split in corpus.SPLITS for record in corpus.read_records(directory, split)}


def snapshot(home: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a home: its time and content."""
    files = [path for path in home.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this very moment count as old: tests have no two seconds to wait."""
    monkeypatch.setattr(families, "RACY_SECONDS", -60.0)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from now on."""
    names: list[str] = []
    real = records._read_entry

    def note(entry: Any, *args: Any) -> Any:
        names.append(entry.name)
        return real(entry, *args)

    monkeypatch.setattr(records, "_read_entry", note)
    return names


@pytest.mark.usefixtures("trusting")
def test_one_more_document_is_one_more_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a thousand documents' segment: its bytes and times stay, only the new file is read, nobody changes sides."""
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(1000))
    data = DataConfig(source=str(folder))
    first = corpus.build_corpus(data, home)
    before, old = snapshot(home), sides(first)
    opened = count_reads(monkeypatch)
    fill(folder, range(1000, 1001))
    second = corpus.build_corpus(data, home)
    assert set(opened) == {"1000.txt"}
    after = snapshot(home)
    assert {path: after[path] for path in before} == before
    segments = read_manifest(second)["segments"]
    assert segments[:1] == read_manifest(first)["segments"]
    assert len(segments) == 2
    assert read_manifest(home / "data" / "segments" / segments[1])["documents"] == 1
    assert {text: side for text, side in sides(second).items() if text in old} == old
    assert len(sides(second)) == len(old) + 1
    manifest = read_manifest(second)
    assert (manifest["documents"], manifest["split"]) == (1001, "document")
    numbers = [record.document for split in corpus.SPLITS for record in corpus.read_records(second, split)]
    assert sorted(set(numbers)) == list(range(1001))


@pytest.mark.usefixtures("trusting")
def test_untouched_source_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(20))
    data = DataConfig(source=str(folder))
    assert corpus.find_corpus(data, home) is None
    first = corpus.build_corpus(data, home)
    opened = count_reads(monkeypatch)
    assert corpus.build_corpus(data, home) == corpus.locate_corpus(data, home) == corpus.find_corpus(data, home) == first
    monkeypatch.chdir(tmp_path)
    assert corpus.find_corpus(data.model_copy(update={"source": "in", "processes": 7}), home) == first
    assert opened == []


@pytest.mark.usefixtures("trusting")
def test_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    """Guards the ledger against `touch -d`: the change time cannot be set back."""
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(20))
    data = DataConfig(source=str(folder))
    first = corpus.build_corpus(data, home)
    victim = folder / "0007.txt"
    times = victim.stat()
    victim.write_text(victim.read_text().replace("document", "DOCUMENT"))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert corpus.find_corpus(data, home) is None
    assert corpus.build_corpus(data, home) != first


def test_file_just_written_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a second write within the clock's resolution; what is read again gives the same corpus and counts."""
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(20))
    (folder / "empty.txt").write_text("")
    (folder / "same.txt").write_text(text_of(3))
    data = DataConfig(source=str(folder))
    first = corpus.build_corpus(data, home)
    opened = count_reads(monkeypatch)
    assert corpus.find_corpus(data, home) is None
    assert corpus.build_corpus(data, home) == first
    assert len(opened) == 22
    assert len(list((home / "data" / "families").rglob("*.npz"))) == 1, "a second look replaces the first one's ledger"
    fill(folder, range(20, 21))
    manifest = read_manifest(corpus.build_corpus(data, home))
    assert (manifest["documents"], manifest["duplicates"], manifest["skipped"]) == (21, 1, 1)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", None])
@pytest.mark.usefixtures("trusting")
def test_damaged_ledger_costs_time_only(tmp_path: Path, content: bytes | None) -> None:
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(20))
    data = DataConfig(source=str(folder))
    first = corpus.build_corpus(data, home)
    (ledger,) = (home / "data" / "families").rglob("*.npz")
    if content is None:
        ledger.unlink()
    else:
        ledger.write_bytes(content)
    assert corpus.find_corpus(data, home) is None
    assert corpus.build_corpus(data, home) == first
    assert corpus.find_corpus(data, home) == first


@pytest.mark.parametrize("pattern", ["segments/*/documents.parquet", "segments/*/manifest.json", "corpora/*/manifest.json"])
def test_text_that_cannot_be_read_stays(tmp_path: Path, refuse: Callable[[Path, int], None], pattern: str) -> None:
    """A segment on a disk that failed for a moment was deleted, to be made again."""
    home, data = tmp_path / "home", DataConfig(source=str(tmp_path / "source"))
    fill(tmp_path / "source", range(12))
    corpus.build_corpus(data, home)
    (path,) = (home / "data").glob(pattern)
    for damage in (errno.EIO, errno.EMFILE):
        refuse(path, damage)
        with pytest.raises(OSError, match=path.name):
            corpus.build_corpus(data, home)
        assert path.exists()


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("change", ["lost", "changed"])
def test_source_that_lost_a_document_starts_afresh(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against keeping text that its owner took back; the log says why all is made again."""
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(40))
    data = DataConfig(source=str(folder), split="document", val_fraction=0.2)
    first = corpus.build_corpus(data, home)
    old = sides(first)
    if change == "lost":
        (folder / "0011.txt").unlink()
    else:
        (folder / "0011.txt").write_text(text_of(999))
    caplog.set_level(logging.INFO)
    second = corpus.build_corpus(data, home)
    assert "1 of its documents are gone from the source, or changed; starting afresh" in caplog.text
    assert text_of(11) not in sides(second)
    assert len(read_manifest(second)["segments"]) == 1
    assert {text: side for text, side in sides(second).items() if text in old}.items() <= old.items()
    (folder / "0011.txt").write_text(text_of(11))
    third = corpus.build_corpus(data, home)
    assert {text: side for text, side in sides(third).items() if text in old} == old


def test_moved_home_is_read(tmp_path: Path) -> None:
    """Guards the relative way from a corpus to its segments."""
    folder, home = tmp_path / "in", tmp_path / "home"
    fill(folder, range(20))
    found = corpus.build_corpus(DataConfig(source=str(folder)), home)
    expected = sides(found)
    home.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / found.relative_to(home)
    assert sides(moved) == expected


def test_a_section_that_comes_back_follows_the_first(tmp_path: Path) -> None:
    """Guards small corpora, whose split has exceptions: old text in a new document goes where it was."""
    home = tmp_path / "home"
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(text_of(number, 4000))
    data = DataConfig(source=str(folder), split="section")
    first = corpus.build_corpus(data, home)
    manifest = read_manifest(first)
    old = sides(first)
    (folder / "9.txt").write_text(text_of(77, 3000) + "\n" + text_of(2, 4000))
    second = corpus.build_corpus(data, home)
    assert read_manifest(second)["segments"][:-1] == manifest["segments"]
    new = {r.text: s for s in corpus.SPLITS for r in corpus.read_records(second, s) if r.document == 6}
    assert len(set(new) & set(old)) >= 3
    assert all(old[text] == side for text, side in new.items() if text in old)


# --- properties --------------------------------------------------------------------------------------------------------

PARAGRAPHS = st.lists(st.text(alphabet="ab é\t\r日", min_size=0, max_size=60), max_size=40)


@given(PARAGRAPHS, st.sampled_from(["\n\n", "\n", "\n \t\n", "\r\n\r\n"]), st.integers(8, 200))
@settings(max_examples=150, deadline=None)
def test_sections_are_the_text(paragraphs: list[str], separator: str, mean_bytes: int) -> None:
    """Guards every byte: sections joined are the text, each a valid text, none much longer than asked for."""
    text = separator.join(paragraphs).encode()
    sections = cut_sections(text, mean_bytes)
    assert b"".join(sections) == text
    for section in sections:
        section.decode()
        assert 0 < len(section) <= 4 * mean_bytes + len(separator)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.lists(st.integers(0, 300), max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_records_side_is_its_own_affair(today: list[int], tomorrow: list[int]) -> None:
    """Guards split stability at its root: the side depends on the record's text, on nothing beside it."""
    import numpy as np

    plan = SplitPlan("document", "threshold", 0.3)

    def decide(seeds: list[int]) -> dict[int, bool]:
        keys = np.array([hash_document(text_of(seed, 20).encode())[1] for seed in seeds], dtype=np.uint64)
        return dict(zip(seeds, plan.is_val(keys).tolist(), strict=True))

    before, after = decide(today), decide(tomorrow + today)
    assert {seed: after[seed] for seed in before} == before


@given(st.lists(st.text(alphabet="abc ", min_size=1, max_size=12), min_size=1, max_size=12), st.randoms())
@settings(max_examples=100, deadline=None)
def test_section_key_sees_lines_only(lines: list[str], rng: random.Random) -> None:
    """Guards against a leak through trivia: order, repetition and white space of lines move a section nowhere."""
    again = [f"  {line}\t" for line in lines] + [rng.choice(lines)]
    rng.shuffle(again)
    assert section_key("\n".join(lines).encode()) == section_key(("\n".join(again) + "\n\n").encode().replace(b"\n\n", b"\n"))


@given(
    start=st.sets(st.integers(0, 60), min_size=12, max_size=30),
    additions=st.lists(st.sets(st.integers(0, 200), max_size=12), max_size=3),
    split=st.sampled_from(["auto", "document", "section"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_growing_moves_nothing_between_splits(
    tmp_path_factory: pytest.TempPathFactory, start: set[int], additions: list[set[int]], split: str
) -> None:
    """Guards the promise over whole histories: tomorrow's validation set never contains today's training text."""
    tmp_path = tmp_path_factory.mktemp("growth")
    folder, home = tmp_path / "in", tmp_path / "home"
    folder.mkdir()
    data = DataConfig(source=str(folder), split=split, val_fraction=0.25, section_bytes=512)
    known: dict[str, str] = {}
    for added in [start, *additions]:
        for number in added:
            (folder / f"{number:04}.txt").write_text(text_of(number))
        now = sides(corpus.build_corpus(data, home))
        assert {text: side for text, side in now.items() if text in known} == known
        known = now


def test_split_is_the_same_in_every_version() -> None:
    """Guards against a new release that sends yesterday's training text to validation: cuts and keys are pinned."""
    text = text_of(1, 3000).encode()
    sections = cut_sections(text, 1024)
    assert [len(section) for section in sections[:8]] == [650, 570, 1170, 783, 1524, 1184, 720, 1766]
    assert section_key(sections[0]) == 0x6122850E1717682E
    assert hash_document(text)[1] == hash_document(text + b"\n \n")[1] == 0x4893C8C320250628
