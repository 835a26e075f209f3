"""The data part of the pipeline alone, as a flow: source → corpus → vocabulary → shards.

gptloom data experiments/shakespeare.yaml data.source=my-texts/        # or from the Prefect UI
"""

from __future__ import annotations

import time
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext

from gptcore.config import load_config
from gptcore.markdown import markdown_table
from gptcore.shards import ShardSet
from gptcore.store import home_dir, read_manifest
from gptloom.flows.forms import NO_OVERRIDES, Changes, Experiment
from gptloom.flows.run import STOPS, cancelled, named_by_experiment, prepare_data


@flow(name="data", flow_run_name=named_by_experiment("data"), persist_result=False)
def data(experiment: Experiment = "experiments/shakespeare.yaml", overrides: Changes = NO_OVERRIDES) -> dict[str, Any]:
    """From raw text to shards; what is there already is found, not made again.

    Args:
        experiment: Path of an experiment file (YAML), as seen from the repository's folder.
        overrides: What differs from that file.
    """
    start = time.perf_counter()
    config, home = load_config(experiment, overrides.as_list()), home_dir()
    try:
        corpus, vocab, shards = prepare_data(config, home)
    except STOPS as stop:
        return cancelled(stop)
    manifest, tokens = read_manifest(corpus), ShardSet.open(shards).n_tokens
    if FlowRunContext.get() is not None:
        said = f"{manifest['documents']:,} documents: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out"
        rows = [["corpus", f"`{corpus}`"], ["vocabulary", f"`{vocab}`"], ["shards", f"`{shards}`"]]
        text = f"{said}; {manifest['skipped']:,} files were left out.\n\n{markdown_table(rows, ['made', 'where'])}\n"
        create_markdown_artifact(text, key="data", description=said)
    return {
        "corpus": str(corpus),
        "vocab": str(vocab),
        "shards": str(shards),
        "documents": manifest["documents"],
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "skipped": manifest["skipped"],
        "seconds": round(time.perf_counter() - start, 3),
    }
