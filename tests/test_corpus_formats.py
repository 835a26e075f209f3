"""What a source may look like, and what the cleaning rules do to it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcore import corpus
from gptcore.config import DataConfig, UserError, load_config
from gptcore.corpus import formats, preflight
from gptcore.corpus.containers import Kind
from gptcore.corpus.digests import DigestSet
from gptcore.corpus.formats import html_text, read_json_lines, read_text_part, read_text_parts, title_of
from gptcore.store import read_manifest


def text_of(seed: int, n_words: int = 600) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(n_words)]
    return f"document {seed}\n\n" + "\n\n".join(" ".join(words[at : at + 30]) for at in range(0, n_words, 30)) + "\n"


def build(source: Any, home: Path, **settings: Any) -> Path:
    if not isinstance(source, list):
        source = str(source)
    return corpus.build_corpus(DataConfig(source=source, **settings), home)


def documents(directory: Path) -> list[str]:
    """Every document's text, in order."""
    records = [record for split in corpus.SPLITS for record in corpus.read_records(directory, split)]
    texts: dict[int, str] = {}
    for record in sorted(records, key=lambda record: (record.document, record.section)):
        texts[record.document] = texts.get(record.document, "") + record.text
    return list(texts.values())


def tar_of(**members: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def zip_of(**members: str | bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, "zstd", asbytes=True)


def rows(*texts: str) -> bytes:
    return b"".join(json.dumps({"id": number, "text": text}).encode() + b"\n" for number, text in enumerate(texts))


def write_mixed(folder: Path) -> list[str]:
    """One text in each form a source may have; the texts in the files' order."""
    folder.mkdir()
    t = [text_of(seed) for seed in range(16)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [t[13], t[14]]}), table)
    csv = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate((t[4], t[5])))
    files = {
        "00.txt": t[0].encode(),
        "01.md": t[1].encode(),
        "02.html": b"<title>no</title><p>" + "</p><p>".join(t[2].strip().split("\n\n")).encode(),
        "03.txt.gz": gzip.compress(t[3].encode()),
        "04.csv.bz2": bz2.compress(csv.encode()),
        "06.jsonl.zst": zstd(rows(t[6], t[7])),
        "08.tar.xz": lzma.compress(tar_of(a=t[8], b=t[9])),
        "10_data.xz": lzma.compress(tar_of(c=t[10])),  # as OpenWebText has it
        "11.xz": lzma.compress(t[11].encode()),
        "12.zip": zip_of(a_txt_gz=gzip.compress(t[12].encode()), b_exe=b"MZ\0"),
        "13.parquet": table.getvalue(),
        "15.tgz": gzip.compress(tar_of(d=t[15])),
        "16.py": b"print('not read')",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    t[2] = t[2].replace("\n\n", "\n").strip()
    return t


def test_every_form_is_read(tmp_path: Path) -> None:
    """Guards `gptloom data` on a folder of mixed compressed files: each text once, in order, nothing else."""
    expected = write_mixed(tmp_path / "in")
    found = build(tmp_path / "in", tmp_path / "home")
    assert documents(found) == expected
    manifest = read_manifest(found)
    assert manifest["documents"] == 16
    assert manifest["rules"] == {"unwanted": 1}


def test_compression_changes_no_id(tmp_path: Path) -> None:
    """Guards the content id: it is the text's, not the container's."""
    text = "\n\n".join(text_of(seed) for seed in range(20)).encode()
    ids = set()
    for name, content in {
        "a.txt": text,
        "a.txt.gz": gzip.compress(text),
        "a.txt.xz": lzma.compress(text),
        "a.zip": zip_of(a_txt=text),
    }.items():
        (tmp_path / name).write_bytes(content)
        ids.add(build(tmp_path / name, tmp_path / "home").name)
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("name", "compressions", "inner", "title"),
    [
        ("a.txt", (), "txt", "a"),
        ("A.JSONL.ZST", ("zstd",), "jsonl", "A"),
        ("x/data.v2.tar.gz", ("gzip",), "tar", "data.v2"),
        ("b.tgz", ("gzip",), "tar", "b"),
        ("c.htm", (), "html", "c"),
        ("urlsf_subset00-1_data.xz", ("xz",), "", "urlsf_subset00-1_data"),
        (".hidden", (), "", ".hidden"),
        ("notes.2024 old", (), "", "notes.2024 old"),
        ("d.tsv", (), "csv", "d"),
    ],
)
def test_names_say_what_files_are(name: str, compressions: tuple[str, ...], inner: str, title: str) -> None:
    kind = Kind.of(name)
    assert (kind.compressions, kind.inner, title_of(name)) == (compressions, inner, title)


@pytest.mark.parametrize("end", [b"\n\n", b"\n", b"\r\n\r\n", b" "])
def test_long_text_has_the_same_parts_from_a_stream_and_alone(end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards parallel reading: a part read by seeking is the part a compressed copy would give."""
    monkeypatch.setattr(formats, "PART_BYTES", 1000)
    monkeypatch.setattr(formats, "PART_WINDOW", 200)
    rng = random.Random(3)
    for size in (0, 1, 999, 1000, 1001, 1199, 1200, 1201, 2500, 9000):
        raw = b""
        while len(raw) < size:
            raw += "é".encode() * rng.randint(1, 300) + end
        raw = raw[:size].decode(errors="ignore").encode()
        streamed = [text for _, text in read_text_parts("t", io.BytesIO(raw))]
        count = max(-(-len(raw) // 1000), 1)
        alone = [read_text_part("t", io.BytesIO(raw), number)[1] for number in range(count)]
        assert b"".join(streamed) == raw
        assert [text for text in alone if text] == [text for text in streamed if text]
        if b"\r" not in end:
            for text in streamed:
                text.decode()


def test_json_lines_are_the_same_whole_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PART_BYTES", 500)
    data = DataConfig(max_document_bytes=1200)
    rng = random.Random(4)
    for _ in range(30):
        raw = rows(*("x" * rng.choice((0, 3, 200, 480, 900, 1500)) for _ in range(rng.randint(1, 12))))
        whole = [str(row) for row in read_json_lines("a", io.BytesIO(raw), None, "text", data)]
        parts = range(-(-len(raw) // 500))
        split = [str(row) for part in parts for row in read_json_lines("a", io.BytesIO(raw), part, "text", data)]
        assert split == whole


def test_html_is_what_a_reader_sees() -> None:
    page = b"""<html><head><title>T</title><style>a{}</style></head><body><h1>Head &amp; shoulders</h1>
    <p>One <b>bold</b> <a href=x>link</a>.</p><ul><li>a<li>b</ul>line<br>line<script>x()</script></body></html>"""
    assert html_text(page).decode() == "Head & shoulders\nOne bold link.\na\nb\nline\nline"
    assert html_text(b"") == b""


def test_named_file_and_glob_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.py").write_text(text_of(number))
    assert documents(build(tmp_path / "1.py", tmp_path / "home")) == [text_of(1)]
    assert documents(build(tmp_path / "*.py", tmp_path / "home")) == [text_of(number) for number in range(3)]
    assert documents(build(tmp_path, tmp_path / "home", formats=["py"])) == [text_of(number) for number in range(3)]


def test_text_column_is_chosen_per_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text_of(1)}) + "\n")
    pq.write_table(pa.table({"content": pa.array([text_of(2)]).dictionary_encode()}), tmp_path / "b.parquet")
    (tmp_path / "c.tsv").write_text("text\tid\n" + text_of(3).replace("\n", " ") + "\t1\n")
    found = build(
        [
            {"source": str(tmp_path / "a.jsonl"), "text_column": "body"},
            {"source": str(tmp_path / "b.parquet"), "text_column": "content"},
            str(tmp_path / "c.tsv"),
        ],
        tmp_path / "home",
    )
    assert documents(found) == [text_of(1), text_of(2), text_of(3).replace("\n", " ")]


# --- cleaning --------------------------------------------------------------------------------------------------------


def test_gutenberg_keeps_the_book_only(tmp_path: Path) -> None:
    body = text_of(1)
    book = (
        "The Project Gutenberg eBook of X\r\n\r\nTitle: A Book\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***\r\n"
        + body.replace("\n", "\r\n")
        + "\r\n*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\r\nlicence, licence"
    )
    (tmp_path / "pg1.txt").write_bytes(book.encode())
    found = build(tmp_path / "pg1.txt", tmp_path / "home")
    assert documents(found) == [body]
    assert {title for batch in corpus.read_batches(found, None, ["title"]) for title in batch["title"].to_pylist()} == {
        "A Book"
    }
    assert read_manifest(found)["rules"] == {"gutenberg": 1}
    kept = build(tmp_path / "pg1.txt", tmp_path / "home", strip_gutenberg=False)
    assert documents(kept) == [book.replace("\r\n", "\n")]


def test_cleaning_rules_and_their_counts(tmp_path: Path) -> None:
    """Guards each rule, and the counts a user judges them by."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("  Cafe\u0301 \ufb01ne  \t\n\n\n\n" + text_of(1))
    (folder / "b.txt").write_text("tiny")
    (folder / "c.txt").write_text("")
    (folder / "d.txt").write_text(text_of(2))
    settings: dict[str, Any] = {"min_bytes": 10, "unicode_form": "nfc"}
    trimmed = build(folder, tmp_path / "home", whitespace="trim", **settings)
    assert documents(trimmed)[0] == "  Caf\u00e9 \ufb01ne\n\n" + text_of(1)
    assert read_manifest(trimmed)["rules"] == {"empty": 1, "normalised": 1, "short": 1, "whitespace": 2}
    assert read_manifest(trimmed)["skipped"] == 2
    collapsed = build(folder, tmp_path / "home", whitespace="collapse", **settings | {"unicode_form": "nfkc"})
    assert documents(collapsed)[0] == "Caf\u00e9 fine\n\n" + text_of(1)
    long_line = folder / "d.txt"
    long_line.write_text(" " * 300_000 + "x\n" + text_of(3))
    build(folder, tmp_path / "home", whitespace="trim", **settings)  # a regular expression would take minutes


def test_duplicates_may_stay(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows(text_of(1), text_of(2), text_of(1)))
    once = build(tmp_path / "a.jsonl", tmp_path / "home")
    assert documents(once) == [text_of(1), text_of(2)]
    assert read_manifest(once)["duplicates"] == 1
    twice = build(tmp_path / "a.jsonl", tmp_path / "home", drop_duplicates=False)
    assert documents(twice) == [text_of(1), text_of(2), text_of(1)]
    assert read_manifest(twice)["duplicates"] == 0


@pytest.mark.parametrize("policy", ["follow", "drop"])
def test_near_duplicates_follow_the_first(tmp_path: Path, policy: str) -> None:
    """Guards the split against copies with a word changed: both on one side, or only the first."""
    firsts = [text_of(seed) for seed in range(40)]
    copies = [text.replace("document", "copy", 1) for text in firsts]
    (tmp_path / "a.jsonl").write_bytes(rows(*firsts, *copies))
    found = build(tmp_path / "a.jsonl", tmp_path / "home", split="document", val_fraction=0.3, near_duplicates=policy)
    assert read_manifest(found)["near_duplicates"] == 40
    sides = {split: [r.text for r in corpus.read_records(found, split)] for split in corpus.SPLITS}
    if policy == "drop":
        assert sorted(sides["train"] + sides["val"]) == sorted(firsts)
    else:
        for texts in sides.values():
            held = {text for text in texts if text.startswith("document")}
            assert {text.replace("copy", "document", 1) for text in texts if text.startswith("copy")} == held


# --- sources, numbers, reports ---------------------------------------------------------------------------------------


def test_weighted_sources_are_numbered_and_kept_in_the_manifest(tmp_path: Path) -> None:
    for name, seeds in (("a", range(5)), ("b", range(3, 9))):
        (tmp_path / f"{name}.jsonl").write_bytes(rows(*map(text_of, seeds)))
    sources: list[Any] = [
        str(tmp_path / "a.jsonl"),
        {"source": str(tmp_path / "b.jsonl"), "weight": 3, "title": "B", "licence": "CC0"},
    ]
    found = build(sources, tmp_path / "home")
    first, second = read_manifest(found)["sources"]
    assert (first["documents"], second["documents"], second["read"]) == (5, 4, 6)
    assert (first["weight"], second["weight"], second["title"], second["licence"]) == (1, 3, "B", "CC0")
    by_source = {record.source for split in corpus.SPLITS for record in corpus.read_records(found, split)}
    assert by_source == {0, 1}
    assert corpus.summarise(found)["duplicates"].tolist() == [0, 2]
    sources[1]["weight"] = 5
    reweighted = build(sources, tmp_path / "home")
    assert reweighted != found
    assert read_manifest(reweighted)["segments"] == read_manifest(found)["segments"]


def test_sources_on_the_command_line(tmp_path: Path) -> None:
    """Guards `data.source=[…]`, and a file whose name looks like YAML."""
    experiment = tmp_path / "e.yaml"
    experiment.write_text("{}")
    both = load_config(experiment, ["data.source=[a.txt, {source: b/*.txt, weight: 2}]", "data.text_column=2024"]).data
    assert [(source.source, source.weight) for source in both.sources] == [("a.txt", 1), ("b/*.txt", 2)]
    assert both.text_column == "2024"
    assert load_config(experiment, ["data.source=2024-01-01"]).data.source == "2024-01-01"
    for wrong, words in (
        ("[]", "at least 1"),
        ("[{source: a, wait: 2}]", "did you mean 'weight'"),
        ("[3]", r"data\.source\.0=3"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(experiment, [f"data.source={wrong}"])


def test_overlap_is_measured_and_alarmed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards the headline number: validation text that also stands in the training text is said aloud."""
    apart = "\n\n".join(text_of(seed) for seed in range(60))
    (tmp_path / "apart.txt").write_text(apart)
    (tmp_path / "twice.txt").write_text(apart + "\n\n" + apart)
    honest = build(tmp_path / "apart.txt", tmp_path / "home", split="tail", val_fraction=0.3)
    assert read_manifest(honest)["overlap"] < 0.02
    assert not read_manifest(honest)["overlap_alarm"]
    copied = build(tmp_path / "twice.txt", tmp_path / "home", split="tail", val_fraction=0.3)
    assert read_manifest(copied)["overlap"] > 0.95
    assert read_manifest(copied)["overlap_alarm"]
    assert "data.max_overlap=0.1" in caplog.text


def test_reports(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows(*map(text_of, range(30))))
    found = build(tmp_path / "a.jsonl", tmp_path / "home", val_fraction=0.2)
    table = corpus.summarise(found)
    manifest = read_manifest(found)
    assert table.loc[0, "bytes"] == manifest["bytes"] == sum(len(text_of(seed)) for seed in range(30))
    assert 0 < table.loc[0, "val_share"] < 1
    assert corpus.length_histogram(found)["documents"].sum() == 30
    batches = list(corpus.read_batches(found, "train", ["text", "source"]))
    assert sum(batch.num_rows for batch in batches) == manifest["splits"]["train"]["sections"]


def test_estimate_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against hours of work that end in a full disk: the numbers come first, and what cannot be is refused."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.txt").write_text(text_of(number))
    data = DataConfig(source=str(folder))
    found = corpus.estimate(data, tmp_path / "home")
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert found.files == 300
    assert found.documents == pytest.approx(300, rel=0.05)
    assert found.text_bytes == pytest.approx(total, rel=0.1)
    assert found.disk_bytes > 2 * found.text_bytes
    assert 0 < found.seconds < 60
    small = preflight.Estimate(**vars(found) | {"disk_free": 1000})
    with pytest.raises(UserError, match=r"not enough disk: 300 files.*1,000 bytes free"):
        preflight.refuse_impossible(small)
    tight = preflight.Estimate(**vars(found) | {"memory_free": 1000})
    with pytest.raises(UserError, match="not enough memory"):
        preflight.refuse_impossible(tight)
    monkeypatch.setattr("gptcore.corpus.build.SMALL_BYTES", 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="not enough disk"):
        corpus.build_corpus(data.model_copy(update={"processes": 1}), tmp_path / "home")


def test_deduplication_needs_at_most_100_bytes_a_document() -> None:
    """Guards the memory of exact deduplication, at its worst moment: while the table doubles."""
    rng = np.random.default_rng(0)
    known = DigestSet()
    worst = 0.0
    for _ in range(120):
        before = known.table.nbytes
        digests = rng.integers(0, 1 << 63, (1000, 2), dtype=np.uint64)
        assert known.add(digests).all()
        assert not known.add(digests[::2]).any()
        grown = known.table.nbytes + (before if known.table.nbytes > before else 0)
        worst = max(worst, grown / len(known)) if len(known) >= 5000 else worst
    assert worst <= 100
    assert (known.find(digests) >= 0).all()
    assert (known.find(digests + np.uint64(1)) < 0).all()


def test_digest_set_agrees_with_a_python_set() -> None:
    rng = np.random.default_rng(1)
    known, expected = DigestSet(4), set()
    for _ in range(40):
        digests = rng.integers(0, 40, (60, 2)).astype(np.uint64)
        for row, new in zip(map(tuple, digests.tolist()), known.add(digests), strict=True):
            row = row if any(row) else (0, 1)
            assert new == (row not in expected)
            expected.add(row)
    assert len(known) == len(expected)


@pytest.mark.integration
def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order: three processes that finish as they like give the files that one gives, byte for byte."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text("\n\n".join(text_of(seed) for seed in range(number, number + 40)))
        (folder / f"{number:02}.jsonl").write_bytes(rows(*map(text_of, range(number, number + 9))))
    monkeypatch.setattr("gptcore.corpus.build.SMALL_BYTES", 1000)
    built = [build(folder, tmp_path / f"home{n}", processes=n, val_fraction=0.2) for n in (1, 3)]
    assert built[0].name == built[1].name
    hashes = [[read_manifest(segment)["files"] for segment in corpus.segment_dirs(directory)] for directory in built]
    assert hashes[0] == hashes[1]
    monkeypatch.undo()
    small = build(folder, tmp_path / "home", val_fraction=0.2)  # from memory
    assert small.name == built[0].name


@pytest.mark.integration
def test_an_error_in_a_worker_is_the_users_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, and a hang, where one of several processes meets a bad file."""
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(text_of(number) * 20)
    (tmp_path / "20.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr("gptcore.corpus.build.SMALL_BYTES", 1000)
    monkeypatch.setattr("gptcore.corpus.preflight.MAX_FILES", 1)
    with pytest.raises(UserError, match=r"20\.txt: not UTF-8 text"):
        build(tmp_path, tmp_path / "home", processes=3)
    assert not list((tmp_path / "home").rglob("*.parquet"))
