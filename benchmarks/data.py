"""Megabytes a second from raw text to shards, and the memory it takes; Hugging Face `tokenizers` beside it.

    .venv/bin/python benchmarks/data.py                       # 1 GB: minutes, and 4 GB of disk
    .venv/bin/python benchmarks/data.py --megabytes 100       # a quick look

The text is what lies on this machine: sources, headers, documentation and web pages, every file once. Where that is less
than asked for, copies with other vowels fill it up, and the figures say how much. End to end means: read, hash, clean,
drop duplicates, split, write Parquet, encode with a vocabulary learnt before, write shards. The peer only encodes, texts in
its memory; so ours find theirs in the page cache: every file is read once before the clock starts.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import figure, print_figures, say

from gptcore.config import DataConfig, VocabConfig
from gptcore.parallel import run_apart

ROOTS = (sys.prefix, sys.base_prefix, "/usr", "/opt")
TEXTS = {".md", ".rst", ".txt", ".html", ".css", ".json", ".xml", ".yaml", ".yml", ".svg"}
SOURCES = {".py", ".pyi", ".js", ".ts", ".pl", ".pm", ".tcl", ".sh", ".cmake", ".java", ".rb", ".rs", ".go"}
KINDS = TEXTS | SOURCES | {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh"}
LARGEST = 4 << 20  # larger files are data, not text
VOCAB_SIZE = 32_000
TRAIN_BYTES, PEER_BYTES = 150_000_000, 30_000_000
VOWELS = "aeiouAEIOU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="text of the large run; the small one has a quarter")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the large size; the median counts")
    parser.add_argument("--work", type=Path, help="folder for text and results (default: a temporary one)")
    parser.add_argument("--worker", nargs=4, metavar=("SOURCE", "HOME", "KIND", "VOCAB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(prepare_once(*args.worker)))
        return
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-", dir=args.work) as folder:
        figures, text = measure_all(Path(folder), args.megabytes * 1_000_000, args.repeats)
    print_figures(figures, text=text)


def measure_all(folder: Path, n_bytes: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    text = gather(folder / "large", n_bytes)
    gather(folder / "small", n_bytes // 4)
    say(f"text: {text}")
    training, vocab = measure_training(folder, repeats)
    peer = measure_peer(folder, vocab)
    say(f"peer: {peer / 1e6:.2f} MB/s")
    large = [measure_prepare(folder, "large", "bpe", vocab) for _ in range(repeats)]
    small = [measure_prepare(folder, "small", "bpe", vocab) for _ in range(repeats)]
    chars = [measure_prepare(folder, "large", "char", vocab) for _ in range(repeats)]
    speed = speeds(large, "all")
    memory = [run["peak_mib"] for run in large]
    growth = statistics.median(memory) / statistics.median(run["peak_mib"] for run in small) - 1
    against = {"peer": [peer / 1e6], "goal": 10.0, "goal_is": "at least", "of": "ratio"}
    of_median: dict[str, Any] = {"goal_is": "at least", "of": "median"}
    figures = [
        figure("raw text to BPE shards", "MB/s", speed, goal=60.0, **of_median),
        figure("raw text to BPE shards, against tokenizers encoding only", "MB/s", speed, **against),
        figure("peak memory of all processes", "MiB", memory, goal=round(1e9 / 2**20, 3), of="median"),
        figure("peak memory, growth from a quarter of the text", "share", [growth], goal=0.2),
        figure("encode and write BPE shards", "MB/s", speeds(large, "shards")),
        figure("raw text to character shards", "MB/s", speeds(chars, "all")),
        figure("learn, encode and write characters", "MB/s", speeds(chars, "vocab", "shards"), goal=100.0, **of_median),
        training,
    ]
    return figures, text


def speeds(runs: list[dict[str, Any]], *rooms: str) -> list[float]:
    """MB/s of these rooms together, one figure a run."""
    return [run["bytes"] / sum(run["seconds"][room] for room in rooms) / 1e6 for run in runs]


# --- the text -----------------------------------------------------------------------------------------------------------


def gather(folder: Path, n_bytes: int) -> dict[str, Any]:
    """Distinct texts of this machine as files below `folder`, in an order that mixes their kinds; what was found."""
    folder.mkdir(parents=True)
    paths = sorted(set(find_texts()), key=lambda path: hashlib.blake2b(os.fsencode(path)).digest())
    seen: set[bytes] = set()
    facts = {"bytes": 0, "files": 0, "varied_bytes": 0}
    for vowels in [VOWELS, *(VOWELS[i:5] + VOWELS[:i] + VOWELS[5 + i :] + VOWELS[5 : 5 + i] for i in range(1, 5))]:
        swap = bytes.maketrans(VOWELS.encode(), vowels.encode())
        for path in paths:
            raw = read_text(path).translate(swap)
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            if not raw or digest in seen:
                continue
            seen.add(digest)
            target = folder / f"{facts['files'] // 1000:03d}" / f"{facts['files']:06d}.txt"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(raw)
            facts["files"] += 1
            facts["bytes"] += len(raw)
            facts["varied_bytes"] += len(raw) if vowels != VOWELS else 0
            if facts["bytes"] >= n_bytes:
                return facts
    return facts


def find_texts() -> Iterator[str]:
    for root in dict.fromkeys(ROOTS):
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.splitext(name)[1].lower() in KINDS and not os.path.islink(path):
                    yield path


def read_text(path: str) -> bytes:
    """A file's bytes; none where it is large, unreadable or not UTF-8 text."""
    try:
        if os.path.getsize(path) > LARGEST:
            return b""
        raw = Path(path).read_bytes()
        raw.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if b"\0" in raw else raw


def read_some(folder: Path, n_bytes: int) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*.txt")):
        raw = path.read_bytes()
        yield raw
        n_bytes -= len(raw)
        if n_bytes <= 0:
            return


# --- the measurements ---------------------------------------------------------------------------------------------------


def measure_training(folder: Path, repeats: int) -> tuple[dict[str, Any], Path]:
    """Learning 32,000 byte pairs, ours and by `tokenizers` in turn, on the same records; the vocabulary's file."""
    from gptcore.vocab.engines import default_engine
    from gptcore.vocab.kinds import byte_pair_tree
    from gptcore.vocab.learning import SEPARATOR, trainer_name

    sample = folder / "sample"
    sample.write_bytes(b"".join(raw + SEPARATOR for raw in read_some(folder / "large", TRAIN_BYTES)))
    ours = trainer_name().partition(" ")[0]
    speeds: dict[str, list[float]] = {ours: [], "tokenizers": []}
    learnt = {}
    for _ in range(repeats):
        for trainer, values in speeds.items():
            learnt[trainer], seconds = run_apart(train_once, str(sample), trainer)
            values.append(sample.stat().st_size / seconds / 1e6)
            say(f"{trainer} learns at {values[-1]:.1f} MB/s")
    assert learnt[ours] == learnt["tokenizers"], "both trainers must learn the same merges"
    sample.unlink()
    vocab = folder / "tokenizer.json"
    vocab.write_text(json.dumps(byte_pair_tree(learnt[ours], default_engine())), encoding="utf-8")
    goals: dict[str, Any] = {"goal": 4.0, "goal_is": "at least", "of": "ratio"}
    return figure(f"learn {VOCAB_SIZE} byte pairs", "MB/s", speeds[ours], peer=speeds["tokenizers"], **goals), vocab


def train_once(sample: str, trainer: str) -> tuple[list[tuple[bytes, bytes]], float]:
    """The merges that a trainer learns, and the seconds it took."""
    from gptcore.vocab.learning import train_byte_pairs

    start = time.perf_counter()
    merges = train_byte_pairs(sample, VOCAB_SIZE, trainer)
    return merges, time.perf_counter() - start


def measure_peer(folder: Path, vocab: Path) -> float:
    """Bytes a second of `tokenizers` encoding on all cores, texts already in memory."""
    import tokenizers

    texts = [raw.decode() for raw in read_some(folder / "large", PEER_BYTES)]
    tokenizer = tokenizers.Tokenizer.from_file(str(vocab))
    tokenizer.encode_batch_fast(texts[:100])
    start = time.perf_counter()
    tokenizer.encode_batch_fast(texts)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - start)


def measure_prepare(folder: Path, size: str, kind: str, vocab: Path) -> dict[str, Any]:
    """One run from raw text to shards in a process of its own and an empty home, with the memory of all its processes."""
    for path in (folder / size).rglob("*.txt"):
        path.read_bytes()
    home = folder / "home"
    command = [sys.executable, __file__, "--worker", str(folder / size), str(home), kind, str(vocab)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, done = [0.0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peak, done))
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    shutil.rmtree(home, ignore_errors=True)
    if process.returncode:
        raise SystemExit(f"the measured process failed with code {process.returncode}")
    result = json.loads(output.splitlines()[-1]) | {"peak_mib": round(peak[0] / 2**20, 1)}
    say(f"{size} {kind}: {result['bytes'] / result['seconds']['all'] / 1e6:.1f} MB/s, {result}")
    return result


def watch_memory(pid: int, peak: list[float], done: threading.Event) -> None:
    """Four times a second: the memory of a process and all below it, pages that several share counted once."""
    import psutil

    while not done.wait(0.25):
        try:
            processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.Error:
            return
        peak[0] = max(peak[0], sum(map(memory_of, processes)))


def memory_of(process: Any) -> int:
    """Bytes of one process, its share of what it shares; where the system does not say, its resident set."""
    import psutil

    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except (OSError, psutil.Error):
        return 0


def prepare_once(source: str, home: str, kind: str, vocab: str) -> dict[str, Any]:
    """Raw text to shards; seconds by room, and the bytes of text."""
    from gptcore import corpus, shards
    from gptcore.store import read_manifest
    from gptcore.vocab import build_vocab

    settings = VocabConfig(source=vocab) if kind == "bpe" else VocabConfig(kind="char")
    seconds = {}
    start = time.perf_counter()
    corpus_dir = corpus.build_corpus(DataConfig(source=source, invalid_text="skip"), Path(home))
    seconds["corpus"] = time.perf_counter() - start
    vocab_dir = build_vocab(settings, corpus_dir, Path(home))
    seconds["vocab"] = time.perf_counter() - start - seconds["corpus"]
    shard_dir = shards.write_shards(corpus_dir, vocab_dir, Path(home), 1024)
    seconds["all"] = time.perf_counter() - start
    seconds["shards"] = seconds["all"] - seconds["corpus"] - seconds["vocab"]
    n_bytes = read_manifest(corpus_dir)["bytes"]
    assert sum(shards.ShardSet.open(shard_dir).n_bytes.values()) == n_bytes, "every byte of the corpus must be in the shards"
    return {"bytes": n_bytes, "seconds": {name: round(value, 3) for name, value in seconds.items()}}


if __name__ == "__main__":
    main()
