"""The corpus: what is read, what is refused, and what goes to which side of the split."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gptcore.config import DataConfig, UserError
from gptcore.corpus import build_corpus, download, locate_corpus, package_index, read_documents, read_records
from gptcore.corpus.sections import cut_sections, hash_document, section_key
from gptcore.store import is_committed, read_manifest, verified


def prose(seed: int, n_bytes: int) -> str:
    """Distinct paragraphs of made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(400)]
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < n_bytes:
        paragraphs.append(" ".join(rng.choices(words, k=rng.randint(5, 80))) + ".\n\n")
    return "".join(paragraphs)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def build(source: Path | str, home: Path, **settings: object) -> Path:
    return build_corpus(DataConfig(source=str(source), **settings), home)  # type: ignore[arg-type]


def texts(corpus: Path) -> dict[str, list[str]]:
    return {split: list(read_documents(corpus, split)) for split in ("train", "val")}


def key_of(rule: str, record: bytes) -> int:
    return section_key(record) if rule == "section" else hash_document(record)[1]


def whole_text(corpus: Path) -> str:
    """Every record of both sides, put back in the source's order."""
    records = [record for split in ("train", "val") for record in read_records(corpus, split)]
    return "".join(record.text for record in sorted(records, key=lambda record: (record.document, record.section)))


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["document", "section", "tail"])
def test_no_text_is_lost_or_moved(tmp_path: Path, split: str) -> None:
    """Guards against a cut that drops or repeats bytes: the records joined are the source."""
    folder = tmp_path / "texts"
    originals = [prose(seed, 20_000) + "é漢𝄞" * 50 for seed in range(6)]
    for number, text in enumerate(originals):
        write(folder / f"{number}.txt", text)
    corpus = build(folder, tmp_path, split=split, val_fraction=0.2)
    assert whole_text(corpus) == "".join(originals)
    manifest = verified(corpus)
    assert manifest["split"] == split
    assert manifest["bytes"] == len("".join(originals).encode())
    for side, records in texts(corpus).items():
        assert manifest["splits"][side]["bytes"] == len("".join(records).encode()) > 0
        assert manifest["splits"][side]["characters"] == len("".join(records))
        assert manifest["splits"][side]["sections"] == len(records)


def test_folder_is_sorted_and_links_out_of_it_are_ignored(tmp_path: Path) -> None:
    """Guards against reading a file the user never put there, and against an order that depends on the disk."""
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.txt", "a.txt", "notes.md"):
        write(folder / name, f"{name}\n" + prose(len(name) + ord(name[0]), 3000))
    secret = write(tmp_path / "secret.txt", "secret" + prose(9, 3000))
    (folder / "leak.txt").symlink_to(secret)
    (folder / "loop").symlink_to(folder)
    first_lines = [text.partition("\n")[0] for text in whole_text(build(folder, tmp_path)).split("\n\n")]
    assert [line for line in first_lines if line.endswith(".txt")] == ["a.txt", "a/z.txt", "b.txt"]
    assert "secret" not in whole_text(build(folder, tmp_path))


def test_text_is_normalised_and_duplicates_are_dropped(tmp_path: Path) -> None:
    """Guards against one text counted twice because of a byte order mark or Windows line ends."""
    text = prose(1, 8000)
    folder = tmp_path / "texts"
    write(folder / "1.txt", text)
    write(folder / "2.txt", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    write(folder / "3.txt", prose(2, 8000))
    write(folder / "empty.txt", "")
    corpus = build(folder, tmp_path)
    manifest = read_manifest(corpus)
    assert (manifest["documents"], manifest["duplicates"], manifest["skipped"]) == (2, 1, 1)
    assert whole_text(corpus) == text + prose(2, 8000)


def test_id_follows_content_and_settings_not_the_path(tmp_path: Path) -> None:
    """Guards the cache: a moved file must be found again, a changed one must not."""
    one = write(tmp_path / "one.txt", prose(1, 9000))
    two = write(tmp_path / "else" / "where.txt", prose(1, 9000))
    data = DataConfig(source=str(one))
    found = locate_corpus(data, tmp_path)
    assert not is_committed(found)
    assert found == build(one, tmp_path) == build(two, tmp_path) == build(two.parent, tmp_path)
    assert found != locate_corpus(data.model_copy(update={"val_fraction": 0.2}), tmp_path)
    write(one, prose(1, 9000) + "!")
    assert found != locate_corpus(data, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "no text"),
        (b"\x89PNG\r\n\x1a\n\0\0", "byte 8 is NUL"),
        ("caf\xe9 au lait".encode("latin-1"), "byte 3 is 0xe9"),
        ("text".encode("utf-16"), "UTF-16"),
        ("x", "too little distinct text"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, content: bytes | str | None, words: str) -> None:
    """Guards against a traceback, and against a half-written corpus, for a mistake of the user's."""
    source = tmp_path / "in.txt"
    if content is not None:
        write(source, content)
    with pytest.raises(UserError, match=words) as caught:
        build(source, tmp_path / "home")
    assert "data." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of data\.formats"):
        build(tmp_path, tmp_path / "home")
    write(tmp_path / "a.txt", "")
    with pytest.raises(UserError, match="no text in it"):
        build(tmp_path, tmp_path / "home")


def test_invalid_text_policies(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "bad.txt", b"caf\xe9\0" + prose(1, 6000).encode())
    write(folder / "good.txt", prose(2, 6000))
    replaced = build(folder, tmp_path, invalid_text="replace")
    assert whole_text(replaced).startswith("caf\ufffd\ufffd")
    skipped = build(folder, tmp_path, invalid_text="skip")
    assert whole_text(skipped) == prose(2, 6000)
    assert read_manifest(skipped)["skipped"] == 1
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 text"):
        build(folder, tmp_path)


# --- the split -----------------------------------------------------------------------------------------------------


def test_sections_have_their_size_and_survive_added_text() -> None:
    """Guards the split's stability: text put in front must not re-cut, or re-assign, what follows."""
    text = prose(1, 400_000).encode()
    sections = cut_sections(text, 4096)
    assert b"".join(sections) == text
    assert 2048 < len(text) / len(sections) < 8192
    assert max(map(len, sections)) <= 4 * 4096
    assert all(section.endswith(b"\n\n") for section in sections)
    shifted = cut_sections(prose(2, 10_000).encode() + text, 4096)
    assert len(set(sections) & set(shifted)) >= len(sections) - 4


@pytest.mark.parametrize("text", ["漢字𝄞" * 9000, "word " * 9000 + "\nnext\n", "\n" * 40_000, "a\n" * 30_000])
def test_overlong_paragraphs_are_cut_between_characters(text: str) -> None:
    sections = cut_sections(text.encode(), 1024)
    assert "".join(section.decode() for section in sections) == text
    assert max(map(len, sections)) <= 4 * 1024


@pytest.mark.parametrize("split", ["document", "section"])
def test_sides_share_no_text(tmp_path: Path, split: str) -> None:
    """Guards against validating on training text: equal records, repeated anywhere, are all on one side."""
    folder = tmp_path / "texts"
    common = prose(99, 30_000)
    for number in range(8):
        write(folder / f"{number}.txt", prose(number, 10_000) + common)
    sides = texts(build(folder, tmp_path, split=split, val_fraction=0.3))
    hashes = {side: {key_of(split, text.encode()) for text in records} for side, records in sides.items()}
    assert hashes["val"]
    assert hashes["train"]
    assert not hashes["val"] & hashes["train"]


def test_added_documents_move_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for number in range(60):
        write(folder / f"{number:02}.txt", prose(number, 2000))
    before = texts(build(folder, tmp_path, split="document", val_fraction=0.2))
    for number in range(60, 80):
        write(folder / f"00{number}.txt", prose(number, 2000))
    after = texts(build(folder, tmp_path, split="document", val_fraction=0.2))
    assert set(before["val"]) < set(after["val"])
    assert set(before["train"]) < set(after["train"])


def test_auto_holds_out_documents_from_a_thousand_on(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for number in range(999):
        write(folder / f"{number}.txt", f"text number {number}, which is short\n")
    assert read_manifest(build(folder, tmp_path, section_bytes=256))["split"] == "section"
    write(folder / "999.txt", "one more\n")
    manifest = read_manifest(build(folder, tmp_path))
    assert (manifest["split"], manifest["selection"]) == ("document", "threshold")
    assert 0.02 < manifest["splits"]["val"]["bytes"] / manifest["bytes"] < 0.1


def test_small_corpus_still_gets_a_validation_side(tmp_path: Path) -> None:
    """Guards `gptloom run` on one's own 50 kB: chance must not leave validation empty."""
    selections = set()
    for seed in range(12):
        corpus = build(write(tmp_path / f"{seed}.txt", prose(seed, 50_000)), tmp_path)
        manifest = read_manifest(corpus)
        selections.add(manifest["selection"])
        assert 0.025 <= manifest["splits"]["val"]["bytes"] / manifest["bytes"] <= 0.525
    assert selections == {"threshold", "smallest"}


def test_repeated_line_falls_back_to_the_tail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "line.txt", "all work and no play\n" * 3000)
    manifest = read_manifest(build(source, tmp_path))
    assert manifest["split"] == "tail"
    assert "may repeat the training text" in caplog.text
    with pytest.raises(UserError, match=r"data\.split=section"):
        build(source, tmp_path, split="section")


def test_tail_is_the_end_of_the_text(tmp_path: Path) -> None:
    text = "日本語" * 5000
    sides = texts(build(write(tmp_path / "a.txt", text), tmp_path, split="tail", val_fraction=0.1))
    (train,), (val,) = sides["train"], sides["val"]
    assert train + val == text
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.001)


# --- a package from an index ---------------------------------------------------------------------------------------

SETUP = b"raise SystemExit('setup code was run')"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A simple package index on 127.0.0.1, known to pip's configuration; yields its folder."""
    root = tmp_path / "index"
    (root / "simple" / "tiny-texts").mkdir(parents=True)
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0, 0.0))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    handler = partial(_QuietHandler, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://user:hunter2@127.0.0.1:{server.server_port}/simple/")
        yield root
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def publish(root: Path, files: dict[str, bytes]) -> str:
    """Put an sdist on the index; its sha256."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tiny_texts-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("tiny_texts-1.0/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    write(root / "files" / "tiny_texts-1.0.tar.gz", buffer.getvalue())
    write(
        root / "simple" / "tiny-texts" / "index.html", '<a href="../../files/tiny_texts-1.0.tar.gz">tiny_texts-1.0.tar.gz</a>'
    )
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_an_empty_setting_of_pip_counts_as_not_set(monkeypatch):
    """As for pip itself; a shell that exports PIP_INDEX_URL= made the address of the index empty."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "")
    monkeypatch.setenv("PIP_CERT", "/etc/some.pem")
    assert "index-url" not in package_index.pip_settings()
    assert package_index.pip_settings()["cert"] == "/etc/some.pem"


def test_package_is_fetched_verified_and_reused_without_network(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the default source: only files of the glob, nothing executed, no network the second time."""
    b, a = prose(1, 9000), prose(2, 9000)
    sha256 = publish(
        index, {"setup.py": SETUP, "data/b.txt": b.encode(), "data/a.txt": a.encode(), "data/deep/c.txt": b"no", "d.txt": b"no"}
    )
    source = f"package:tiny-texts==1.0/data/*.txt#sha256={sha256}"
    corpus = build(source, tmp_path)
    assert whole_text(corpus) == a + b
    assert read_manifest(corpus)["source"] == source
    assert len(list((tmp_path / "data" / "downloads").iterdir())) == 1
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert build(source, tmp_path) == corpus


def test_package_with_another_hash_is_refused(tmp_path: Path, index: Path) -> None:
    found = publish(index, {"data/a.txt": b"not what was pinned"})
    with pytest.raises(UserError, match=found):
        build(f"package:tiny-texts==1.0/data/*.txt#sha256={'0' * 64}", tmp_path)
    assert not list((tmp_path / "data" / "downloads").iterdir())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:tiny-texts==1.0/data/*.md#sha256=HEX", "no file of package tiny-texts 1.0 matches"),
        ("package:tiny-texts==2.0/data/*.txt#sha256=HEX", "no source archive of package tiny-texts 2.0"),
        ("package:nowhere==1.0/data/*.txt#sha256=HEX", "no package 'nowhere'"),
        ("package:tiny-texts==1.0/data/*.txt", "expected package:NAME==VERSION/GLOB#sha256=HEX"),
    ],
)
def test_wrong_package_sources_are_refused(tmp_path: Path, index: Path, source: str, words: str) -> None:
    sha256 = publish(index, {"data/a.txt": b"text"})
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        build(source.replace("HEX", sha256), tmp_path)


def test_unreachable_index_says_what_to_do_and_hides_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback without network, and against a password in a log."""
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(package_index, "pip_settings", lambda: {"index-url": "http://user:hunter2@127.0.0.1:9/simple"})
    with pytest.raises(UserError, match=r"index at 127\.0\.0\.1 cannot be reached .*data\.source=PATH") as caught:
        build(f"package:tiny-texts==1.0/data/*.txt#sha256={'0' * 64}", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_passing_failure_is_retried(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = publish(index, {"data/a.txt": prose(1, 9000).encode()})
    answers = iter([503, 503])
    real = _QuietHandler.do_GET

    def flaky(self: _QuietHandler) -> None:
        status = next(answers, None)
        if status is None:
            real(self)
        else:
            self.send_error(status)

    monkeypatch.setattr(_QuietHandler, "do_GET", flaky)
    assert whole_text(build(f"package:tiny-texts==1.0/data/*.txt#sha256={sha256}", tmp_path)) == prose(1, 9000)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_command_prints_the_manifest_and_exits_2_on_a_mistake(tmp_path: Path) -> None:
    """Guards the contract of `python -m gptcore.corpus`: one JSON object last on stdout, also after an error."""
    config = write(tmp_path / "c.yaml", "data: {split: tail}\n")
    source = write(tmp_path / "text.txt", prose(1, 5000))

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gptcore.corpus", str(config), f"data.source={path}"]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"GPTLOOM_HOME": str(tmp_path / "home")}, check=False
        )

    done = run(source)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["split"] == "tail"
    failed = run(tmp_path / "missing.txt")
    assert failed.returncode == 2
    assert "no such file" in json.loads(failed.stdout.splitlines()[-1])["error"]
    assert "Traceback" not in failed.stderr
