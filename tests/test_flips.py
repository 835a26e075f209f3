"""One flipped bit in any file that gptloom wrote and reads back: named by file, or harmless, and shown so by an equal result.

A small home is made once, with the code that makes any: a run with its steps, two segments of text, shards, checkpoints, a quantized copy,
a study's training and kept cell, a night's ledger and scores. Then one bit after the other is flipped in a copy of it, and the file is
read as a command would. `make test` flips two bits a kind, the long form twenty.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import forms

from gptcore import corpus, journal
from gptcore.checkpoint import list_checkpoints, load_model, read_tensors
from gptcore.config import DataConfig, ExperimentConfig, UserError, VocabConfig, load_config, load_written
from gptcore.corpus.download import fetch_address, verify_download
from gptcore.corpus.families import Family
from gptcore.corpus.segments import load_arrays
from gptcore.entry import StopFlag
from gptcore.journal import NoJournal, read_journal
from gptcore.nights.ledger import Generation, KnownModel, Ledger
from gptcore.nights.scores import Scores, load_scores, save_scores
from gptcore.quantize.__main__ import main as quantize_main
from gptcore.shards import Prepared, ShardSet, prepare
from gptcore.store import MANIFEST, read_json, read_manifest, verified, write_json
from gptcore.studies import engine, training
from gptcore.vocab import Vocab, build_vocab
from gptloom.flows.run import _earlier_seconds
from gptloom.tasks.records import registry
from gptloom.tasks.records.forwarding import read_tags
from gptloom.tasks.training import done_before

pytestmark = pytest.mark.integration

SOURCES = ("one.txt", "two.txt")
VERSION = "toy-1-01234567"  # a registered model, fetched


@dataclass
class World:
    """A home, and what was made of which settings in it."""

    home: Path
    golden: Path  # the home as it was made
    config: ExperimentConfig
    data: DataConfig
    grown: Prepared

    @property
    def run(self) -> Path:
        return self.home / "runs" / "real-1"

    def restore(self) -> None:
        """The home as it was made. Its files are links: whoever changes one writes another."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.golden, self.home, copy_function=os.link)

    def files(self, *patterns: str) -> list[Path]:
        """What there is of a kind, relative to the home."""
        found = (path.relative_to(self.golden) for path in sorted(self.golden.rglob("*")) if path.is_file())
        return [path for path in found if any(fnmatch(str(path), pattern) for pattern in patterns)]


@pytest.fixture(scope="module")
def world(real_run: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("flips")
    home = folder / "home"
    shutil.copytree(real_run.parents[1], home)
    config = load_config(home / "runs" / "real-1" / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTLOOM_HOME", str(home))
        patch.setattr("gptcore.corpus.families.RACY_SECONDS", -1e9)  # the source may be trusted at once
        yield _filled(World(home, folder / "golden", config, config.data, Prepared(home, home, home)), small_text, folder)


def _filled(world: World, small_text: Path, folder: Path) -> World:
    home, text = world.home, small_text.read_text(encoding="utf-8")
    # A source that grew: two segments, near-duplicates looked for, two ledgers of it.
    (folder / "texts").mkdir()
    half = text.index("\n\n", len(text) // 2)
    for name, part in zip(SOURCES, (text[:half], text[half:]), strict=True):
        (folder / "texts" / name).write_text(part, encoding="utf-8")
        settings = {"source": str(folder / "texts"), "near_duplicates": "follow"}
        config = world.config.model_copy(
            update={"data": DataConfig(**{**world.data.model_dump(exclude={"source"}), **settings})}
        )
        grown = prepare(config, home)
    world = replace(world, data=config.data, grown=grown)
    (checkpoint,) = list_checkpoints(world.run / "train" / "checkpoints")[-1:]
    quantize_main([str(checkpoint), "--method", "int8", "--out", str(home / "runs" / "int8")])
    shards = ShardSet.open(grown.shards)
    trained = training.train(_short(world.config), shards, home, NoJournal(), StopFlag())
    record = {"name": "cell", "status": "done", "rows": [{"a": 1.5}], "files": ["result.json"], "metrics": {"m": 2.5}}
    (folder / "cell").mkdir()
    for name in ("result.json", "metrics.jsonl"):
        shutil.copy(trained.folder / name, folder / "cell" / name)
    engine._keep(home / "studies" / "cells" / "0123456789abcdef", folder / "cell", record)
    out = home / "runs" / "study-1" / "cells" / "0" / "cell"
    out.mkdir(parents=True)
    (home / "runs" / "night-1" / "arms").mkdir(parents=True)
    write_json(out / engine.CELL_FILE, record)
    write_json(world.run / "timing.json", {"ingest": 1.5, "train": 2.5})
    write_json(home / "runs" / "night-1" / "arms" / "plan.json", {"champion": None, "models": [], "scores": "scores"})
    rows = np.arange(5.0)
    save_scores(
        home / "nightly" / "tiny" / "scores" / "real-1" / "night-1.npz",
        Scores(rows, rows + 1, rows.astype(int), rows.astype(int)),
    )
    generation = Generation("night-1", [path.name for path in corpus.segment_dirs(grown.corpus)], 60_000)
    ledger = Ledger(
        [{"night": 1, "made": ["x"], "outcome": "promoted"}], [generation], [KnownModel("real-1", "1", str(checkpoint))]
    )
    ledger.save(home / "nightly" / "tiny")
    # What was fetched, from the web and from MLflow.
    with _serving(folder / "texts") as address:
        fetch_address(f"{address}/{SOURCES[0]}", world.data, home)
    shutil.copytree(checkpoint, home / "registry" / VERSION)
    home.rename(world.golden)
    world.restore()
    return world


@contextmanager
def _serving(folder: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _short(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})})


# --- what a command makes of each kind ------------------------------------------------------------------------------------


def using(world: World, kind: str, part: Path) -> Path:
    """The corpus or shard set that `part` is, or belongs to."""
    if part.parent.name == kind:
        return part
    for directory in sorted((world.golden / "data" / kind).iterdir()):
        facts = json.loads((directory / MANIFEST).read_text())
        names = facts["segments"] if kind == "corpora" else [Path(tokens["directory"]).name for tokens in facts["tokens"]]
        if part.name in names:
            return world.home / directory.relative_to(world.golden)
    raise AssertionError(f"{part} is of no {kind}")


def read_corpus(world: World, path: Path) -> Any:
    directory = using(world, "corpora", path.parent)
    texts = [list(corpus.read_records(directory, split)) for split in corpus.SPLITS]
    arrays = [load_arrays(directory, name) for name in ("digests", "ngrams_train", "ngrams_val", "signatures")]
    facts = corpus.summarise(directory).to_json(), corpus.length_histogram(directory).to_json()
    return texts, [[array.tobytes() for array in some] for some in arrays], facts


def read_again(world: World, _: Path) -> Any:
    """`gptloom data`: what is damaged may be made again from the source, to the same ids."""
    made = prepare(world.config.model_copy(update={"data": world.data}), world.home)
    return made, read_corpus(world, made.corpus / MANIFEST), read_shards(world, made.shards / MANIFEST)


def read_ledger(world: World, path: Path) -> Any:
    """What it says of its corpus; nothing means that everything is read again, as `cached data` does."""
    family = Family(world.data, world.home)
    family.folder = path.parent
    notes = family.ledger(Path(path.stem.partition("-")[2]))
    return {name: (note.signature, note.digests.tobytes(), note.rules) for name, note in notes.items()}


def read_shards(world: World, path: Path) -> Any:
    shards = ShardSet.open(using(world, "shards", path.parent))
    ids = [np.asarray(shards.tokens(split)[:]).tobytes() + shards.index(split).tobytes() for split in corpus.SPLITS]
    return ids, shards.token_bytes.tobytes(), shards.manifest, Vocab.load(shards.directory).tokens


def read_vocabulary(world: World, path: Path) -> Any:
    facts = json.loads((world.golden / path.parent.relative_to(world.home) / MANIFEST).read_text())
    directory = build_vocab(VocabConfig(**facts["vocab"]), world.home / "data" / "corpora" / facts["corpus"], world.home)
    return directory, Vocab.load(directory).tokens, verified(directory)


def read_checkpoint(world: World, path: Path) -> Any:
    model, checkpoint = load_model(path.parent)
    moments = {name: tensor.numpy().tobytes() for name, tensor in read_tensors(path.parent / "optimizer.safetensors")}
    weights = {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.weights().items()
    }
    return weights, moments, checkpoint.state, checkpoint.config, Vocab.load(path.parent).tokens


def read_done(world: World, path: Path) -> Any:
    request = json.loads((world.golden / path.relative_to(world.home)).read_text())["request"]
    return done_before(path.parent, request)


def read_training(world: World, path: Path) -> Any:
    shards = ShardSet.open(world.grown.shards)
    result = training.train(_short(world.config), shards, world.home, NoJournal(), StopFlag()).result
    return {key: value for key, value in result.items() if key in ("checkpoint", "val_loss", "val_bpb", "tokens_seen")}


def read_kept(world: World, path: Path) -> Any:
    out = world.home / "taken"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    record = dict.fromkeys(("name", "arm", "factors", "seed"))
    return engine._take(path.parent, out, NoJournal(), record), (out / "result.json").read_bytes()


def read_cell(world: World, path: Path) -> Any:
    plan: Any = type("Plan", (), {"cells": [type("Cell", (), {"name": "cell", "arm": "", "factors": {}, "seed": 1})]})
    (record,) = engine.read_cells(path.parents[3], plan)
    return None if record["status"] == "not run" else record


def read_lines(world: World, path: Path) -> Any:
    """As far as they are whole: a damaged line is named and left out."""
    journal._told.clear()
    records, whole = read_journal(path)[0], read_journal(world.golden / path.relative_to(world.home))[0]
    known = {key for record in whole for key in record}
    kept = [{key: value for key, value in record.items() if key in known} for record in records]
    assert all(record in whole for record in kept), "another line than was written"
    return kept if len(kept) == len(whole) else None


def read_download(world: World, path: Path) -> Any:
    target = path.with_name(path.name.removesuffix(".json"))
    verify_download(target)
    return target.read_bytes()


def _away() -> Any:
    raise UserError("MLflow is away")


def read_fetched(world: World, path: Path) -> Any:
    """As `promote` does, with MLflow's copy gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "open_client", _away)
        return registry.checkpoint_of(registry.Version("toy", "1", VERSION.rpartition("-")[2], {}))


Read = Callable[[World, Path], Any]
KINDS: dict[str, tuple[tuple[str, ...], Read]] = {
    "corpus": (("data/corpora/*", "data/segments/*/manifest.json", "data/segments/*/COMMITTED"), read_corpus),
    "documents": (("data/segments/*/documents.parquet",), read_corpus),
    "digests and sketches": (("data/segments/*/*.npy",), read_corpus),
    "cached data": (("data/[cstv]*",), read_again),
    "ledger of a source": (("data/families/*/*.npz",), read_ledger),
    "download": (("data/downloads/*",), read_download),
    "fetched model": ((f"registry/{VERSION}/*",), read_fetched),
    "vocabulary": (("data/vocabs/*",), read_vocabulary),
    "ids": (("data/tokens/*",), read_shards),
    "shards": (("data/shards/*",), read_shards),
    "checkpoint": (("runs/*/checkpoints/step_*/*",), read_checkpoint),
    "quantized": (("runs/int8/checkpoints/step_*/*",), read_checkpoint),
    "step that was done": (("runs/*/done.json",), read_done),
    "result of a step": (("runs/*/result.json", "runs/*/plan.json"), lambda _, path: read_json(path)),
    "seconds of steps": (("runs/*/timing.json",), lambda _, path: _earlier_seconds(path.parent)),
    "tags": (("runs/*/tags.json",), lambda _, path: read_tags(path.parent)),
    "training of a study": (("studies/trainings/*/result.json",), read_training),
    "checkpoint of a study": (("studies/trainings/*/checkpoints/step_*/*",), read_checkpoint),
    "kept cell": (("studies/cells/*",), read_kept),
    "cell of a run": (("runs/study-*/cells/*/cell.json",), read_cell),
    "journal": (("*/metrics.jsonl",), read_lines),
    "settings": (("runs/*/config.yaml", "studies/trainings/*/config.yaml"), lambda _, path: load_written(path)),
    "ledger of nights": (("nightly/*/ledger.json",), lambda _, path: Ledger.load(path.parent)),
    "scores on a hold-out": (("nightly/*/scores/*.npz",), lambda _, path: vars_of(load_scores(path))),
}
# What nobody reads back to decide something: for people, for MLflow, or with a mere lock on it.
OUTPUTS = ("*/.lock", "*/lengths.png", "*/sources.json", "*/evaluation.json", "*/samples.json", "*/accumulation.json", "*.log")


def vars_of(scores: Scores) -> list[Any]:
    return [getattr(scores, name).tolist() for name in ("nats", "bytes", "documents", "sources")]


# --- the tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("GPTLOOM_HOME", str(world.home))
    monkeypatch.setattr("gptcore.corpus.families.RACY_SECONDS", -1e9)
    yield world
    world.restore()


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.unlink()  # a link: the golden home keeps its file
    path.write_bytes(raw)


_opened: list[set[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], (str, os.PathLike)):
        _opened[-1].add(os.path.normpath(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opening() -> Iterator[set[str]]:
    """The files that Python opens while the block lasts."""
    _opened.append(set())
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


@pytest.mark.parametrize("flips", forms([2], [20]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_named_or_harmless(copy: World, kind: str, flips: int, caplog: pytest.LogCaptureFixture) -> None:
    patterns, read = KINDS[kind]
    files = [path for path in copy.files(*patterns) if (copy.golden / path).stat().st_size]
    assert files, f"the home holds nothing of the kind {kind}"
    rng = random.Random(f"{kind} {flips}")
    for _ in range(flips):
        name = rng.choice(files)
        bit = rng.randrange(8 * (copy.golden / name).stat().st_size)
        check_flip(copy, name, bit, read, caplog)


@pytest.mark.parametrize("pattern", ["data/tokens/*/val_000000.bin", "data/tokens/*/val_index.npy"])
def test_flips_are_seen_where_nothing_is_verified(
    copy: World, pattern: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr("gptcore.shards.shard_set.verified", lambda directory, names=None: read_manifest(directory))
    name = copy.files(pattern)[0]
    with pytest.raises(AssertionError, match="another result, and not a word"):
        check_flip(copy, name, 8 * ((copy.golden / name).stat().st_size // 2), read_shards, caplog)


def check_flip(copy: World, name: Path, bit: int, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    whole = read(copy, copy.home / name)
    copy.restore()
    flip(copy.home / name, bit)
    caplog.clear()
    where = f"bit {bit} of {name}"
    found, error = None, ""
    with opening() as opened:
        try:
            found = read(copy, copy.home / name)
        except UserError as refusal:
            error = str(refusal)
    # `gptloom data` looks at no other source's corpora; each has a kind of its own here, too.
    assert read is read_again or str(copy.home / name) in opened, f"{where}: nobody opened the file"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    is_named = any(name.name in text for text in (error, *said))
    assert is_named or not error, f"{where}: not named: {error}"
    assert error or found == whole or (not found and is_named), f"{where}: another result, and not a word"
    copy.restore()


def test_no_file_is_forgotten(world: World) -> None:
    known = [pattern for patterns, _ in KINDS.values() for pattern in patterns]
    forgotten = set(world.files("*")) - set(world.files(*known, *OUTPUTS))
    assert not forgotten, "give these files a kind, or say why nobody reads them"
