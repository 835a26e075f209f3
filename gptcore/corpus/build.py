"""From settings to a committed corpus: what is new is read, split, and added as one segment.

A source that grew keeps its segments and its split; only untouched files' documents are not even read again. A source
that lost or changed a document starts afresh, with the same split as far as its hashes say.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.config import DataConfig, UserError, hide_password
from gptcore.corpus import package_index
from gptcore.corpus.download import verify_download
from gptcore.corpus.families import NO_DIGESTS, Family, Note
from gptcore.corpus.ingest import Base, Pass
from gptcore.corpus.pool import read_units
from gptcore.corpus.preflight import estimate_files, refuse_impossible
from gptcore.corpus.records import Batch, CleanText, batch_texts, read_texts
from gptcore.corpus.sections import SplitPlan, is_balanced, plan_hash_split, plan_tail_split
from gptcore.corpus.segments import FORMAT, SPLITS, add_up, corpus_dir_of, overlap_of
from gptcore.corpus.sources import SourceFile, list_files, plan_units, sign
from gptcore.leftovers import hold, sweep
from gptcore.parallel import count_cores
from gptcore.store import DamagedError, commit_dir, is_committed, read_manifest, verified

logger = logging.getLogger(__name__)

AUTO_DOCUMENTS = 1000  # from here on data.split=auto holds out whole documents
SMALL_BYTES = 16 << 20  # files of so much together are read once, into memory
MAX_TOLD = 10  # files named in the log for what is left out of them
SMALL_TEXT = 64 << 20  # unless they become more than this

Batches = Callable[[SplitPlan], Iterator[Batch]]


@dataclass
class Located:
    """A corpus by its id: committed already, or what it takes to commit it."""

    directory: Path
    segment: dict[str, Any] | None = None  # the new segment's manifest
    folder: Path | None = None  # and its files
    manifest: dict[str, Any] | None = None


class Build:
    """One look at a source. `locate` learns the corpus' id; `commit` makes it, if `write` was set."""

    def __init__(self, data: DataConfig, home: Path, write: bool) -> None:
        self.data, self.home, self.write = data, home, write
        self.weights = [source.weight for source in data.sources]
        self.started = time.time()
        self.files, self.facts = list_files(data, home)
        self.family = Family(data, home)
        newest = self.family.newest()
        # Its split must not depend on the end of the text, and equal documents must be one, to be added to.
        self.base_dir = newest if data.split != "tail" and data.drop_duplicates else None
        self.ledger = self.family.ledger(newest) if newest else None
        self.newest = newest
        self.folders: dict[Path, int] = {}  # of segments being written, each with the lock that keeps it from being swept

    def unchanged(self) -> Path | None:
        """The newest corpus, if every file is untouched since and none is gone. Opens no file of the source."""
        if self.newest is None or self.ledger is None or len(self.ledger) != len(self.files):
            return None
        if any(self.ledger.note_on(file) is None for file in self.files):
            return None
        weights = [source["weight"] for source in read_manifest(self.newest)["sources"]]
        return self.newest if weights == self.weights else None

    def locate(self) -> Located:
        """Raises UserError for a source that is missing, empty, unreachable, not text, or cannot be split."""
        found = self.unchanged()
        return Located(found) if found else self._added() or self._fresh()

    def close(self) -> None:
        for folder, hold_fd in self.folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            os.close(hold_fd)

    # --- what a source that grew adds ---------------------------------------------------------------------------

    def _added(self) -> Located | None:
        """The base corpus and one more segment; None if there is no base, or the source lost something of it."""
        if self.base_dir is None or self.ledger is None:
            return None
        base = Base.open(self.base_dir)
        if base.plan.rule == "tail":
            return None
        todo = []
        for number, file in enumerate(self.files):
            note = self.ledger.note_on(file)
            if note is None:
                todo.append((number, file))
            else:
                base.meet(note.digests)
        size = sum(file.size for _, file in todo)
        batches, _ = self._batches(todo)
        done = self._pass(base.plan, batches, size, base=base)
        if base.lost:
            logger.warning(
                "corpus %s: %d of its documents are gone from the source, or changed; starting afresh",
                base.directory.name,
                base.lost,
            )
            done.abort()
            return None
        segment = done.finish() if done.documents else None
        return self._describe(done, base, segment)

    # --- a source that is new, or lost something ------------------------------------------------------------------

    def _fresh(self) -> Located:
        files = list(enumerate(self.files))
        size = sum(file.size for file in self.files)
        batches, distinct = self._batches(files)
        inherited = SplitPlan.restore(read_manifest(self.base_dir)) if self.base_dir else None
        if distinct is not None:
            rules = self._rules(distinct, inherited)
        else:
            estimate = estimate_files(self.files, self.data, self.home)
            logger.info("%s", estimate)
            refuse_impossible(estimate)
            rules = self._rules(estimate.documents, inherited)
            if rules[0] != "tail":
                done = self._pass(_start(rules[0], self.data, inherited), batches, size)
                rules = self._rules(done.documents, inherited)
                if done.plan.rule == rules[0] and is_balanced(done.splits["val"]["bytes"], done.bytes, self.data.val_fraction):
                    return self._describe(done, None, done.finish())
                done.abort()
                logger.info("the estimate was not good enough for the split; reading once more")
        for rule in rules:
            plan, counted = self._plan(rule, batches, size, inherited)
            if plan is not None:
                done = self._pass(plan, batches, size) if self.write or plan is not counted.plan else counted
                return self._describe(done, None, done.finish())
        raise self._unsplittable(counted, rules)

    def _rules(self, documents: int, inherited: SplitPlan | None) -> list[str]:
        """The split rules to try, in order; an explicit data.split has no second choice."""
        if self.data.split != "auto":
            return [self.data.split]
        if inherited is not None and inherited.rule != "tail":
            return [inherited.rule, "tail"] if inherited.rule == "section" else ["document", "section", "tail"]
        return ["document", "section", "tail"] if documents >= AUTO_DOCUMENTS else ["section", "tail"]

    def _plan(self, rule: str, batches: Batches, size: int, inherited: SplitPlan | None) -> tuple[SplitPlan | None, Pass]:
        """The split by one rule, None if that cannot be; and the pass that counted for it."""
        start = _start(rule, self.data, inherited)
        counted = Pass(self.data, start, collect=True).run(batches(start), size)
        if not counted.documents:
            raise self._nothing(counted)
        if rule == "tail":
            plan = plan_tail_split(counted.bytes, self.data.val_fraction)
            if plan is not None and self.data.split == "auto":
                logger.warning(
                    "the text has too few distinct sections to hold some out by content: the last %g of its bytes "
                    "are the validation split, which may repeat the training text",
                    self.data.val_fraction,
                )
            return plan, counted
        assert counted.collected is not None
        keys, sizes = (np.concatenate(column) for column in zip(*counted.collected, strict=True))
        return plan_hash_split(start, keys, sizes), counted

    # --- reading -------------------------------------------------------------------------------------------------

    def _batches(self, files: list[tuple[int, SourceFile]]) -> tuple[Batches, int | None]:
        """How to go through the files' documents, as often as asked; with little text, from memory.

        Also the number of distinct documents where that is known. Raises DamagedError for a download that is not what was fetched.
        """
        for _, file in files:
            if Path(file.path).is_relative_to(self.home / "data" / "downloads"):
                verify_download(Path(file.path))
        size = sum(file.size for _, file in files)
        if size <= SMALL_BYTES:
            counts: dict[int, Counter[str]] = {number: Counter() for number, _ in files}
            texts: list[CleanText] = []
            held = 0
            entries = [entry for unit in plan_units(files, self.data) for entry in unit]
            for text in read_texts(entries, self.data, counts):
                texts.append(text)
                held += len(text.utf8)
                if held > SMALL_TEXT:
                    break
            else:
                self._log_left_out(counts)
                distinct = len({hashlib.sha256(text.utf8).digest() for text in texts})
                return lambda plan: batch_texts(texts, counts, self.data, plan, size), distinct
        processes = self.data.processes or count_cores()
        return lambda plan: read_units(plan_units(files, self.data), self.data, plan, processes), None

    def _log_left_out(self, counts: dict[int, Counter[str]]) -> None:
        left = {number: [f"{rules[rule]} {rule}" for rule in rules if rule in LEFT_OUT] for number, rules in counts.items()}
        told = [number for number in left if left[number]]
        for number in told[:MAX_TOLD]:
            logger.warning("%s: left out: %s", self.files[number].name, ", ".join(left[number]))
        if len(told) > MAX_TOLD:
            logger.warning(
                "and %d files more of which something is left out; the manifest has the counts", len(told) - MAX_TOLD
            )

    def _pass(self, plan: SplitPlan, batches: Batches, size: int, base: Base | None = None) -> Pass:
        folder = None
        if self.write:
            folder = self.home / "data" / "segments" / f".{uuid.uuid4().hex[:16]}.tmp"
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent)
            folder.mkdir()
            self.folders[folder] = hold(folder)
        return Pass(self.data, plan, base, folder).run(batches(plan), size)

    # --- what it comes to ------------------------------------------------------------------------------------------

    def _describe(self, done: Pass, base: Base | None, segment: dict[str, Any] | None) -> Located:
        """The corpus of the base's segments and the new one. A file that changed meanwhile is refused."""
        self._check_untouched()
        self.remembered = self._notes(done, base)
        before = base.manifest["segments"] if base else []
        parts = [read_manifest(self.home / "data" / "segments" / name) for name in before] + ([segment] if segment else [])
        if not parts:
            raise self._nothing(done)
        directory = corpus_dir_of([part["id"] for part in parts], self.weights, self.home)
        return Located(directory, segment, done.folder, self._manifest(directory.name, parts, done.plan))

    def _notes(self, done: Pass, base: Base | None) -> list[Note]:
        notes = []
        for number, file in enumerate(self.files):
            note = self.ledger.note_on(file) if base and self.ledger else None
            if note is None:
                parts = done.notes.digests.get(number, [NO_DIGESTS])
                digests = parts[0] if len(parts) == 1 else np.concatenate(parts)
                note = Note(file.signature, digests, dict(done.notes.rules.get(number, {})))
            notes.append(note)
        return notes

    def _check_untouched(self) -> None:
        for file in self.files:
            try:
                touched = sign(file.path) != file.signature
            except OSError:
                touched = True
            if touched:
                raise UserError(f"data.source: {file.path} changed while it was read; run again when nothing writes to it")

    def describe_source(self, number: int) -> dict[str, str]:
        """Title and licence: what the settings say, else what the source itself does."""
        source = self.data.sources[number].source
        package = [file for file in self.files if file.source == number and file.package]
        known = package_index.describe(Path(package[0].path), package_index.PackageSource.parse(source)) if package else {}
        return known | self.facts[number]

    def _manifest(self, name: str, parts: list[dict[str, Any]], plan: SplitPlan) -> dict[str, Any]:
        rules: list[Counter[str]] = [Counter() for _ in self.data.sources]
        read = [0] * len(rules)
        for file, note in zip(self.files, self.remembered, strict=True):
            rules[file.source].update(note.rules)
            read[file.source] += len(note.digests)
        counts = add_up(parts)
        sources = [
            {"source": hide_password(source.source), "weight": source.weight}
            | self.describe_source(number)
            | counts["sources"][number]
            | {"files": sum(file.source == number for file in self.files)}
            | {"read": read[number], "rules": dict(sorted(rules[number].items()))}
            for number, source in enumerate(self.data.sources)
        ]
        total: Counter[str] = sum(rules, Counter())
        manifest = {"kind": "corpus", "id": name, "format": FORMAT, "segments": [part["id"] for part in parts]}
        manifest |= {
            "source": self.data.source_name,
            **counts,
            "sources": sources,
            "duplicates": sum(read) - counts["documents"],
        }
        manifest |= {"skipped": sum(total[rule] for rule in LEFT_OUT), "rules": dict(sorted(total.items()))}
        return manifest | plan.as_json() | {"section_bytes": self.data.section_bytes}

    def _nothing(self, done: Pass) -> UserError:
        skipped = sum(count for rules in done.notes.rules.values() for rule, count in rules.items() if rule in LEFT_OUT)
        return UserError(
            f"data.source={self.data.source_name!r}: no text in it ({skipped} empty or skipped files); "
            "give a UTF-8 text file or a folder of them with data.source=PATH"
        )

    def _unsplittable(self, done: Pass, rules: list[str]) -> UserError:
        return UserError(
            f"data.split={self.data.split}: the source has too little distinct text ({done.documents} documents, "
            f"{done.bytes} bytes) for a training and a validation side at data.val_fraction={self.data.val_fraction:g}; "
            "give more text, " + ("or a larger data.val_fraction" if "tail" in rules else "or use data.split=tail")
        )


LEFT_OUT = ("empty", "short", "invalid", "damaged", "unsafe")


def find_corpus(data: DataConfig, home: Path) -> Path | None:
    """The committed corpus of a source whose files are untouched since; None if there is something to read.

    Of the source it looks at names, sizes and times only (an address is asked whether it changed); the corpus is verified.
    """
    return Build(data, home, write=False).unchanged()


def locate_corpus(data: DataConfig, home: Path) -> Path:
    """The directory this source and these settings belong to, committed yet or not. Reads what it has to, writes nothing.

    Raises UserError for a source that is missing, empty, unreachable or not text.
    """
    with closing(Build(data, home, write=False)) as build:
        return build.locate().directory


def build_corpus(data: DataConfig, home: Path) -> Path:
    """Read, clean, deduplicate and split what is new in the source; return the committed directory. Early return when nothing is.

    Raises UserError as `locate_corpus` does, and for a text that cannot be split.
    """
    with closing(Build(data, home, write=True)) as build:
        return commit(build, build.locate())


def commit(build: Build, located: Located) -> Path:
    """Make what `locate` found, segment first; remember it for the next time."""
    if located.manifest is None:
        logger.info("corpus %s: reused", located.directory.name)
        return located.directory
    if located.segment is not None:
        directory = build.home / "data" / "segments" / located.segment["id"]
        if not _is_whole(directory):
            assert located.folder is not None
            with commit_dir(directory, located.segment) as tmp:
                for path in located.folder.iterdir():
                    path.rename(tmp / path.name)
    if _is_whole(located.directory):
        logger.info("corpus %s: reused", located.directory.name)
    else:
        manifest = located.manifest
        _add_overlap(build, manifest)
        with commit_dir(located.directory, manifest):
            pass
        sizes = {split: manifest["splits"][split]["bytes"] for split in SPLITS}
        logger.info(
            "corpus %(id)s: %(documents)d documents in %(n_segments)d segments (%(duplicates)d duplicates dropped, %(skipped)d "
            "skipped), split by %(split)s, train %(train)d bytes, val %(val)d bytes, overlap %(overlap).3g",
            manifest | sizes | {"n_segments": len(manifest["segments"])},
        )
    build.family.remember(located.directory, build.files, build.remembered, build.started)
    return located.directory


def _is_whole(directory: Path) -> bool:
    """Committed, with every file as it was written; a damaged one is removed, to be made again. Raises OSError for one that cannot be read."""
    if not is_committed(directory):
        return False
    try:
        verified(directory)
    except DamagedError as error:
        logger.warning("%s; it is made again", str(error).partition(";")[0])
        shutil.rmtree(directory)
        return False
    return True


def _start(rule: str, data: DataConfig, inherited: SplitPlan | None) -> SplitPlan:
    """The plan by threshold, with the exceptions that an earlier corpus of this source needed."""
    if inherited is not None and inherited.rule == rule:
        return inherited
    return SplitPlan(rule if rule != "tail" else "document", "threshold", data.val_fraction)


def _add_overlap(build: Build, manifest: dict[str, Any]) -> None:
    folders = [build.home / "data" / "segments" / name for name in manifest["segments"]]
    overlap, limit = overlap_of(folders, folders), build.data.max_overlap
    manifest |= {"overlap": round(overlap, 6), "overlap_alarm": overlap > limit}
    if manifest["overlap_alarm"]:
        logger.warning(
            "corpus %s: %.1f %% of the validation text's 48-byte sequences stand in the training text, more than "
            "data.max_overlap=%g; its loss will look better than on new text",
            manifest["id"],
            100 * overlap,
            limit,
        )
