"""Nights in minutes, for tests and demos: text is dealt out to an inbox night by night, with trouble planted on purpose.

    gptloom nightly --simulate 7                                       # experiments/nights.yaml on its default corpus
    gptloom nightly my.yaml --simulate 7 data.source=my_folder/

What a night brings is planted; what becomes of it follows from the data, by the same code as every real night:

    1  the first texts          3  copies of texts that are there      5  another author's texts (Python's own manual)
    2  more of the same         4  texts with their letters shuffled   6, 7, …  more of the same; then again from 3 on

A simulation has a home of its own, $GPTLOOM_HOME/simulations/RUN (inbox, ledger, reports), and a registered model of its own,
EXPERIMENT-simulated, which is made anew. It ends with a rollback.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from gptcore.config import DataConfig, ExperimentConfig, UserError, load_config, with_changes
from gptcore.nights.settings import NightlySettings
from gptcore.store import home_dir
from gptloom.flows.forms import Experiment, Overrides
from gptloom.flows.nightly import DEFAULTS, Night, run_night
from gptloom.flows.run import STOPS, cancelled, named_by_experiment, new_run_name
from gptloom.tasks.records.tracking import check_store
from gptloom.tasks.runtime.log import run_logger

PLANTED = ("good", "good", "duplicates", "corrupted", "another author", "good", "good")
FIRST_SHARE = 0.4  # of the texts, on the first night
FEWEST_TEXTS = 20  # a source of fewer documents is cut into so many texts
TOLD = ("night", "outcome", "reason", "champion", "val_bpb")
LEAST_BYTES = 50_000


@flow(name="nightly-simulation", flow_run_name=named_by_experiment("simulated"), persist_result=False)
def simulate_nights(
    experiment: Experiment = "experiments/nights.yaml",
    overrides: Overrides | None = None,
    nights: int = 7,
    settings: NightlySettings = DEFAULTS,
) -> dict[str, Any]:
    """Several nights in a row with planted trouble, and a rollback at the end.

    Args:
        experiment: Path of an experiment file (YAML); its source is dealt out over the nights.
        overrides: What differs from that file.
        nights: How many.
        settings: When a model is promoted, what is kept, who is told.
    """
    from gptloom.tasks.records import registry

    config, plan = load_config(experiment, (overrides or Overrides()).as_list()), plan_nights(nights)
    check_store()
    try:
        texts = read_texts(config.data)
        run = flow_run.get_name() or new_run_name(f"{config.name}-simulated")
        folder = home_dir() / "simulations" / run
        inbox = folder / "inbox"
        inbox.mkdir(parents=True)
        simulated = with_changes(simulated_name(config), data={"source": str(inbox), "formats": ["txt"]})
        registry.forget_model(simulated.name)
        records = []
        for number, planted in enumerate(plan, 1):
            deliver(inbox, number, planted, texts, nights)
            run_logger().info("night %d: %s", number, planted)
            night = Night(simulated, folder, settings)
            try:
                run_night(night, f"{run}-night-{number}")
            except Exception as error:
                run_logger().warning("night %d failed: %s", number, error)
            records.append({"planted": planted} | {key: night.ledger.nights[-1][key] for key in TOLD})
    except STOPS as stop:
        return cancelled(stop)
    return {
        "run": run,
        "nights": records,
        "rollback": roll_back_once(simulated.name),
        "ledger": str(folder / "ledger.png"),
        "report": night.ledger.nights[-1]["report"],
    }


def simulated_name(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"name": f"{config.name[:54]}-simulated"})


def plan_nights(nights: int) -> list[str]:
    """What each night brings; after the seventh, trouble comes again."""
    if nights < 1:
        raise UserError(f"--simulate {nights}: at least one night, please")
    return [PLANTED[i] if i < len(PLANTED) else PLANTED[2 + (i - 2) % 5] for i in range(nights)]


def roll_back_once(name: str) -> dict[str, Any] | None:
    """Give the champion before its alias back, with the time that took; None where there was only one."""
    from gptloom.tasks.records import registry

    if len(registry.champions(name)) < 2:
        return None
    start = time.perf_counter()
    now, before = registry.rollback(name, "the end of a simulation")
    return {"from": before.version, "to": now.version, "seconds": round(time.perf_counter() - start, 3)}


# --- texts -------------------------------------------------------------------------------------------------------------


def read_texts(data: DataConfig) -> list[str]:
    """The source's documents, cleaned and without duplicates; a source of few is cut at blank lines."""
    from gptcore.corpus import build_corpus, read_batches

    documents: dict[int, list[tuple[int, str]]] = {}
    for batch in read_batches(build_corpus(data, home_dir()), None, ["document", "section", "text"]):
        for row in batch.to_pylist():
            documents.setdefault(row["document"], []).append((row["section"], row["text"]))
    texts = ["".join(text for _, text in sorted(parts)) for _, parts in sorted(documents.items())]
    if sum(map(len, texts)) < LEAST_BYTES:
        raise UserError(
            f"data.source={data.source_name!r}: {sum(map(len, texts)):,} characters are too few to deal out over several nights; "
            f"give {LEAST_BYTES:,} or more"
        )
    return texts if len(texts) >= FEWEST_TEXTS else list(cut("\n\n".join(texts), FEWEST_TEXTS))


def cut(text: str, parts: int) -> Iterator[str]:
    """A text in about `parts` pieces, at blank lines."""
    paragraphs = re.split(r"(?<=\n)\n+", text)
    piece, size = [], 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size >= len(text) / parts:
            yield "\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n".join(piece)


def deliver(inbox: Path, number: int, planted: str, texts: list[str], nights: int) -> None:
    """Put the night's texts into the inbox, a file each."""
    for index, text in enumerate(_texts_of(number, planted, texts, nights)):
        (inbox / f"night-{number}-{index:02}.txt").write_text(text, encoding="utf-8")


def _texts_of(number: int, planted: str, texts: list[str], nights: int) -> list[str]:
    plan = plan_nights(nights)
    good = [i for i, what in enumerate(plan, 1) if what == "good"]
    first = max(1, round(FIRST_SHARE * len(texts)))
    share = max(1, (len(texts) - first) // max(len(good) - 1, 1))
    if planted == "good":
        begin = 0 if number == 1 else first + (good.index(number) - 1) * share
        return texts[begin : first if number == 1 else begin + share]
    rng = random.Random(number)
    if planted == "duplicates":
        return texts[: max(1, first // 2)]
    some = texts[:share]
    if planted == "corrupted":
        return ["".join(rng.sample(text, len(text))) for text in some]
    return another_author(sum(map(len, some)), start=number)


def another_author(characters: int, start: int = 0) -> list[str]:
    """About so much English prose that no playwright wrote: topics of Python's manual, which every Python brings along."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    chosen: list[str] = []
    for i in range(len(names)):
        text = topics[names[(i + 37 * start) % len(names)]]
        if len(text) < 2000:
            continue
        chosen.append(text)
        if sum(map(len, chosen)) >= characters:
            break
    return chosen
