"""The steps of a night as tasks: look at the sources, put text and arms together, run the device process, clean up, tell people.

flows/nightly.py calls them in order; each takes and returns paths and small values.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from gptcore.config import (
    DataConfig,
    ExperimentConfig,
    UserError,
    VocabConfig,
    hide_password,
    load_written,
    with_changes,
    write_yaml,
)
from gptcore.errors import first_line
from gptcore.nights.ledger import Generation, Ledger
from gptcore.nights.settings import NightlySettings
from gptcore.store import DamagedError, is_committed, read_json, read_manifest, verified, write_json
from gptloom.tasks.records import registry
from gptloom.tasks.records.tracking import common_tags
from gptloom.tasks.runtime.log import run_logger
from gptloom.tasks.runtime.process import run_device_process

if TYPE_CHECKING:
    from gptcore.shards import ShardSet


@dataclass(frozen=True)
class Text:
    """Tonight's data. `tonight` is None when a forced night has nothing new."""

    training: Path  # shard set both arms learn from
    corpus: Path  # its corpus
    vocab: Path
    tonight: Generation | None
    holdouts: dict[str, dict[str, str]]  # name → vocabulary fingerprint → shard set
    entropy: float | None  # bits per byte of tonight's text by byte frequencies
    unknown_percent: float = 0.0


@task(task_run_name="look at the sources", persist_result=False)
def look_at_sources(data: DataConfig, home: Path) -> int:
    """Bytes that the sources hold on disk now; fetches what is fetched. Raises UserError when a source is gone."""
    from gptcore.corpus.sources import list_files

    return sum(file.size for file in list_files(data, home)[0])


@task(task_run_name="which text is new", persist_result=False)
def find_new_text(corpus: Path, ledger: Ledger, home: Path) -> Generation | None:
    """The segments of `corpus` that no night has seen, as tonight's generation; None when there are none."""
    segments = [name for name in read_manifest(corpus)["segments"] if name not in ledger.known_segments]
    if not segments:
        return None
    n_bytes = sum(read_manifest(home / "data" / "segments" / name)["bytes"] for name in segments)
    return Generation(f"night-{len(ledger.nights) + 1}", segments, n_bytes)


def seed_ledger(ledger: Ledger, champion: registry.Version | None, corpus: Path, home: Path) -> None:
    """A champion that was not made at night brings its own hold-out: the segments it was trained on, where they are known."""
    if champion is None or ledger.generations:
        return
    directory = home / "data" / "corpora" / champion.facts.get("corpus", "-")
    if not is_committed(directory):
        return
    now, then = read_manifest(corpus)["segments"], read_manifest(directory)["segments"]
    segments = [name for name in then if name in now]
    if segments:
        n_bytes = sum(read_manifest(home / "data" / "segments" / name)["bytes"] for name in segments)
        ledger.generations.append(Generation("base", segments, n_bytes))


@task(task_run_name="measure what tonight's text repeats", persist_result=False)
def measure_repetition(ledger: Ledger, tonight: Generation, home: Path) -> float:
    """Per cent of the earlier hold-outs' 48-byte sequences that stand in tonight's training text."""
    from gptcore.corpus.segments import overlap_of

    folder = home / "data" / "segments"
    old = [folder / name for generation in ledger.accepted for name in generation.segments]
    return 100 * overlap_of(old, [folder / name for name in tonight.segments]) if old else 0.0


def training_segments(corpus: Path, ledger: Ledger, tonight: Generation | None) -> list[str]:
    """What tonight's models learn from: everything accepted and everything new, without what was refused.

    A source that lost text starts a new corpus; then that is the text, and older segments serve as hold-outs only.
    """
    now = read_manifest(corpus)["segments"]
    refused = {name for g in ledger.generations if not g.is_accepted for name in g.segments}
    return [name for name in now if name not in refused] or list(tonight.segments if tonight else now)


def vocabulary_of(champion: registry.Version | None, config: VocabConfig, corpus: Path, home: Path) -> Path:
    """The champion's vocabulary; without a champion, one learnt from the corpus."""
    from gptcore.vocab import build_vocab

    if champion is None:
        return build_vocab(config, corpus, home)
    directory = home / "data" / "vocabs" / champion.facts.get("vocab", "-")
    if is_committed(directory):
        verified(directory)
        return directory
    return take_vocabulary(registry.checkpoint_of(champion), corpus, home)


def take_vocabulary(checkpoint: Path, corpus: Path, home: Path) -> Path:
    """The vocabulary that a model brings along."""
    from gptcore.vocab import build_vocab

    return build_vocab(VocabConfig(source=str(checkpoint / "tokenizer.json")), corpus, home)


@task(task_run_name="write shards", persist_result=False)
def prepare_text(
    config: ExperimentConfig, corpus: Path, vocab: Path, ledger: Ledger, tonight: Generation | None, home: Path
) -> Text:
    """Shards of the training text, and of each night's hold-out, in a vocabulary.

    Raises SplitTooSmall when tonight's text is too little to hold one window of it out.
    """
    from gptcore.corpus.selection import byte_entropy, select_segments
    from gptcore.shards import write_shards

    chosen = select_segments(corpus, training_segments(corpus, ledger, tonight), home)
    holdouts = _write_holdouts(config, corpus, vocab, ledger, tonight, home)
    unknown, entropy = 0.0, None
    if tonight:
        new = holdouts[tonight.name]
        unknown = 100 * sum(new.manifest["n_unknown"].values()) / max(sum(new.n_tokens.values()), 1)
        entropy = byte_entropy(select_segments(corpus, tonight.segments, home))
    training = write_shards(chosen, vocab, home, config.model.block_size)
    named = {name: {shards.fingerprint: str(shards.directory)} for name, shards in holdouts.items()}
    return Text(training, chosen, vocab, tonight, named, entropy, unknown)


def _write_holdouts(
    config: ExperimentConfig, corpus: Path, vocab: Path, ledger: Ledger, tonight: Generation | None, home: Path
) -> dict[str, ShardSet]:
    """Each night's hold-out in a vocabulary, by the night's name."""
    from gptcore.corpus.selection import select_segments
    from gptcore.shards import ShardSet, write_shards

    T = config.model.block_size
    return {
        generation.name: ShardSet.open(write_shards(select_segments(corpus, generation.segments, home), vocab, home, T))
        for generation in [*ledger.accepted, *([tonight] if tonight else [])]
    }


def add_earlier_vocabularies(text: Text, config: ExperimentConfig, corpus: Path, ledger: Ledger, home: Path) -> None:
    """Hold-outs also in the vocabulary of each earlier champion that has another one: the ledger measures these models too.

    Where a hold-out is too little text in it, that model's row keeps a gap.
    """
    for model in ledger.models:
        checkpoint = Path(model.checkpoint)
        if not _is_whole(checkpoint):
            continue
        fingerprint = read_json(checkpoint / "state.json")["vocab_fingerprint"]
        if all(fingerprint in shards for shards in text.holdouts.values()):
            continue
        vocab = take_vocabulary(checkpoint, text.corpus, home)
        try:
            written = _write_holdouts(config, corpus, vocab, ledger, text.tonight, home)
        except UserError as error:
            run_logger().info("champion %s is not measured tonight: %s", model.version, error)
            continue
        for name, shards in written.items():
            text.holdouts[name][shards.fingerprint] = str(shards.directory)


def _is_whole(checkpoint: Path) -> bool:
    """Is an earlier champion's checkpoint there and as it was written? A damaged one is told, and leaves a gap in the ledger's page."""
    if not is_committed(checkpoint):
        return False
    try:
        verified(checkpoint)
    except DamagedError as error:
        run_logger().warning("not measured tonight: %s", error)
        return False
    return True


def plan_arms(
    config: ExperimentConfig, champion: registry.Version | None, settings: NightlySettings
) -> dict[str, ExperimentConfig]:
    """Configs by arm, all of equal tokens: `scratch`, and `warm` where the champion has the experiment's shape."""
    if config.train.count_steps(config.model.block_size) is None:
        raise UserError(
            f"train.minutes={config.train.minutes:g} alone ends this experiment, and nightly arms are compared at equal tokens; "
            "give train.max_steps or train.max_tokens"
        )
    scratch = with_changes(config, train={"minutes": None, "patience": 0, "init_from": None})
    arms = {"scratch": scratch}
    if champion is None:
        return arms
    checkpoint = registry.checkpoint_of(champion)
    if load_written(checkpoint / "config.yaml").model != config.model:
        run_logger().info("no warm arm: champion %s has another model section than the experiment", champion.label)
        return arms
    share = settings.warm_lr
    changes = {
        "init_from": str(checkpoint),
        "lr": config.train.lr * share,
        "adamw_lr": config.train.adamw_lr * share,
        "min_lr": config.train.min_lr * share,
    }
    return {"warm": with_changes(scratch, train=changes), **arms}


@task(task_run_name="train and measure on the device", persist_result=False)
def run_arms(
    arms: dict[str, tuple[ExperimentConfig, Path]],
    text: Text,
    champion: registry.Version | None,
    ledger: Ledger,
    settings: NightlySettings,
    run: str,
    directory: Path,
    scores: Path,
) -> dict[str, Any]:
    """The night's one device process: `gptcore.nights`. arms: key → (config, shard set). Returns its result."""
    directory.mkdir(parents=True, exist_ok=True)
    planned = []
    for key, (config, shards) in arms.items():
        path = directory / f"{key}.yaml"
        write_yaml(config, path)
        planned.append({"key": key, "config": str(path), "shards": str(shards)})
    now = None
    if champion is not None:
        now = {"key": champion.facts["run"], "checkpoint": str(registry.checkpoint_of(champion))}
    known = [asdict(m) for m in ledger.models if _is_whole(Path(m.checkpoint)) and (not now or m.key != now["key"])]
    plan = {
        "champion": now,
        "judge": {"holdout": text.tonight.name, "percent": settings.corrupt_percent} if text.tonight else None,
        "models": known,
        "arms": planned,
        "holdouts": [{"name": name, "shards": shards} for name, shards in text.holdouts.items()],
        "scores": str(scores),
    }
    write_json(directory / "plan.json", plan)
    first = next(iter(arms.values()))[0]
    return run_device_process(
        ["gptcore.nights", str(directory / "plan.json"), "--out", str(directory), "--run", run],
        directory,
        experiment=first.name,
        tags=common_tags() | {"gptloom.step": "arm"},
    )


# --- afterwards --------------------------------------------------------------------------------------------------------


@task(task_run_name="keep and clean up", persist_result=False)
def retire_nights(name: str, ledger: Ledger, settings: NightlySettings, home: Path) -> dict[str, Any]:
    """Delete what older nights left, by policy: {"nights": names, "freed_mib"}. Nothing an alias, a rollback or the ledger needs.

    Of nights before the last `keep_nights`: their checkpoints, their runs in MLflow and their versions, unless one of these is
    champion or challenger, or a rollback may need it; shard sets that strung together an older training text. Segments, their ids and all
    scores and reports stay.
    """
    from gptloom.tasks.records.tracking import delete_runs

    protected = registry.protected_versions(name)
    needed = {version.facts.get("run", "").partition("/")[0] for version in protected}
    kept_shards = {shards for night in ledger.nights[-settings.keep_nights :] for shards in night.get("made", [])}
    freed, gone = 0, []
    for night in ledger.nights[: -settings.keep_nights]:
        if night.get("retired"):
            continue
        for made in night.get("made", []):
            if made not in kept_shards:
                freed += _remove(home / "data" / "shards" / made)
        if night["run"] in needed:  # asked again every night: a challenger is so for a while only
            continue
        for folder in (home / "runs" / night["run"]).glob("arms/*/checkpoints"):
            freed += _remove(folder)
        delete_runs(name, night["run"])
        for version in registry.versions(name):
            if version.facts.get("run", "").startswith(f"{night['run']}/"):
                registry.delete_version(version)
        gone.append(night["run"])
    return {"nights": gone, "freed_mib": round(freed / 2**20, 1)}


def check_disk(home: Path, settings: NightlySettings) -> None:
    """Raises UserError when the home is above its budget."""
    used = sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink()) / 2**30
    if used > settings.disk_budget_gib:
        raise UserError(
            f"{home} holds {used:.1f} GiB, more than disk_budget_gib={settings.disk_budget_gib:g}; raise it, lower keep_nights, or "
            "delete old runs below runs/"
        )


def _remove(folder: Path) -> int:
    """Delete a folder; the bytes it held."""
    if not folder.is_dir():
        return 0
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return size


@task(task_run_name="notify", persist_result=False)
def notify(night: dict[str, Any], settings: NightlySettings, name: str) -> int:
    """Tell everyone in `settings.notify` how the night ended; how many took the message. Trouble here never fails a night."""
    if night["outcome"] not in settings.notify_on:
        return 0
    subject = f"gptloom {name}: {night['outcome']}"
    body = f"{night['reason']}\nchampion: {night['champion'] or 'none'}; run: {night['run']}; report: {night.get('report', '')}"
    sent = 0
    for receiver in settings.notify:
        try:
            _send(receiver, subject, body)
            sent += 1
        except Exception as error:
            run_logger().warning("no message through %s: %s", receiver, hide_password(first_line(error)))
    return sent


def _send(receiver: str, subject: str, body: str) -> None:
    """receiver: an environment variable that holds Apprise URLs, or a Prefect block."""
    if "/" not in receiver:
        import apprise

        client = apprise.Apprise()
        if not os.environ.get(receiver):
            raise ValueError("the environment of this process has no such variable")
        if not client.add(os.environ[receiver]):
            raise ValueError("it holds no address that Apprise knows")
        if not client.notify(body=body, title=subject):
            raise OSError("the receiver did not take it")
        return
    from prefect.blocks.core import Block

    block: Any = Block.load(receiver)
    block.notify(body=body, subject=subject)
