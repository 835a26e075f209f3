"""The data plane on a Dask cluster: two workers on this machine, and the same bytes as without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcore.config import DataConfig, UserError, VocabConfig
from gptcore.corpus import build_corpus, records, segments
from gptcore.corpus.chunks import list_chunks
from gptcore.shards import ShardSet, write_shards
from gptcore.store import read_manifest
from gptcore.vocab import build_vocab
from gptloom.tasks import data as tasks_data

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(prefect_server: None) -> Iterator[str]:
    """The address of a scheduler with two workers, processes of their own that import gptcore from this checkout."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None) as made:
        yield made.scheduler_address


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve small chunks, so that both workers get some."""
    monkeypatch.setattr(segments, "ROW_GROUP_BYTES", 20_000)
    monkeypatch.setattr(records, "BATCH_BYTES", 10_000)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(240):
        (folder / f"{number:03d}.txt").write_text(f"text {number} " * (50 + number) + "ö\n", encoding="utf-8")
    settings = DataConfig(source=str(folder), split="document", val_fraction=0.2, processes=1)
    return build_corpus(settings, tmp_path / "home")


def hashes(directory: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in read_manifest(directory)["files"].items()}


@pytest.mark.parametrize("kind", [{"kind": "char"}, {"kind": "bpe", "size": 300}])
def test_a_cluster_writes_the_same_bytes(cluster: str, corpus: Path, tmp_path: Path, kind: dict[str, object]) -> None:
    """Guards "the same tasks, many machines": ids, index and vocabulary must not depend on who worked."""
    assert len(list_chunks(corpus)) > 8
    settings = VocabConfig(**kind)  # type: ignore[arg-type]
    made = []
    for home, chunk_map in (("here", tasks_data.chunk_map_of(None)), ("there", tasks_data.chunk_map_of(cluster))):
        vocab = build_vocab(settings, corpus, tmp_path / home, chunk_map)
        made.append((hashes(vocab), write_shards(corpus, vocab, tmp_path / home, 16, chunk_map)))
    (here_vocab, here), (there_vocab, there) = made
    assert here_vocab == there_vocab
    assert here.name == there.name
    pairs = zip(ShardSet.open(here).token_dirs, ShardSet.open(there).token_dirs, strict=True)
    assert all(hashes(a) == hashes(b) for a, b in pairs)
    assert hashes(here) == hashes(there)


def test_no_cluster_is_a_sentence(prefect_server: None, corpus: Path, tmp_path: Path) -> None:
    """Guards against a stack trace, or a wait without end, for a wrong address."""
    with pytest.raises(UserError, match=r"data\.dask_address=tcp://127\.0\.0\.1:9"):
        list(tasks_data.chunk_map_of("tcp://127.0.0.1:9")(str, [1, 2]))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask is for who has a cluster; the others do not install it."""
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(UserError, match=r"pip install 'gptloom\[dask\]'"):
        tasks_data.chunk_map_of("tcp://127.0.0.1:8786")
