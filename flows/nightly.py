"""Retraining by night: what is new is read, two models are trained on it, the better one replaces the champion, or not, and why.

    gptloom nightly experiments/shakespeare.yaml            # one night now; scheduled in prefect.yaml, also a form in the UI
    gptloom nightly --simulate 7                            # seven nights with planted trouble, see flows/simulation.py

Memory of an experiment's nights: $GPTLOOM_HOME/nightly/EXPERIMENT/{ledger.json, ledger.png, scores/, reports/}. A night ends
promoted, kept (the champion is still better), skipped (nothing new), refused (a guard said no) or failed; only `promoted`
moves the alias `champion`. A night that fires while the one before still runs is cancelled, however either was started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed

from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.errors import first_line
from gptcore.nights.gate import Decision, decide
from gptcore.nights.ledger import Generation, KnownModel, Ledger, Matrix, draw_matrix, explain, read_matrix
from gptcore.nights.scores import Scores, load_scores, pool, score_path
from gptcore.nights.settings import NightlySettings
from gptcore.shards import SplitTooSmall
from gptcore.store import ClaimedError, claim, content_id, home_dir, read_manifest
from gptloom.flows.forms import NO_OVERRIDES, Changes, Experiment, titled
from gptloom.flows.run import STOPS, cancelled, finish, named_by_experiment, new_run_name, open_run
from gptloom.tasks import nightly as steps
from gptloom.tasks.data import ingest
from gptloom.tasks.nightly import Text
from gptloom.tasks.records import registry
from gptloom.tasks.records.registry import Version
from gptloom.tasks.records.tracking import NOTE_TAG, check_store, find_run, keep_files
from gptloom.tasks.reporting import data_url, links
from gptloom.tasks.runtime.log import run_logger

DEFAULTS = NightlySettings()
Settings = Annotated[NightlySettings, titled("Gate, retention, messages")]
Force = Annotated[bool, titled("Train even if nothing is new")]


@flow(name="nightly", flow_run_name=named_by_experiment("nightly"), persist_result=False, result_serializer="json")
def nightly(
    experiment: Experiment = "experiments/shakespeare.yaml",
    overrides: Changes = NO_OVERRIDES,
    force: Force = False,
    settings: Settings = DEFAULTS,
) -> dict[str, Any] | State:
    """Train on what is new since the last night, and promote tonight's model if it is better.

    Args:
        experiment: Path of an experiment file (YAML), as seen from the repository's folder.
        overrides: What differs from that file.
        force: Train also when nothing is new, and whatever the sources' size.
        settings: When a model is promoted, what is kept, who is told.
    """
    name = flow_run.get_name() if FlowRunContext.get() else None
    with ExitStack() as stack:
        try:
            config = load_config(experiment, overrides.as_list())
            check_store()
            folder = home_dir() / "nightly" / config.name
            stack.enter_context(claim(folder))
            # Only now: what the ledger holds before is not what another night leaves in it.
            night = Night(config, folder, settings, force)
        except ClaimedError as error:
            return Cancelled(message=f"another night of {config.name} is at work ({error})")
        except UserError as error:
            tell_failure(Path(experiment).stem, error, settings)
            raise
        try:
            result = run_night(night, name or new_run_name(f"{config.name}-nightly"))
        except STOPS as stop:
            return cancelled(stop)
    return Completed(name=result["outcome"].capitalize(), message=result["reason"], data=result)


def tell_failure(name: str, error: UserError, settings: NightlySettings) -> None:
    """The message of a night that could not even begin, and so has no record."""
    steps.notify({"outcome": "failed", "reason": str(error), "champion": "as before", "run": "none"}, settings, name)


@dataclass
class Night:
    """One night of one experiment: what it was told, and what its steps have found so far."""

    config: ExperimentConfig
    folder: Path  # ledger, scores, reports
    settings: NightlySettings
    force: bool = False
    name: str = ""
    home: Path = field(default_factory=home_dir)
    ledger: Ledger = field(init=False)
    champion: Version | None = None
    source_bytes: int = 0
    corpus: Path = Path()
    tonight: Generation | None = None  # the new text; None when a forced night has none
    text: Text = field(init=False)
    plan: dict[str, tuple[ExperimentConfig, Path]] = field(default_factory=dict)  # arm → config, what it learns from
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # what became of each
    winner: str = ""
    decision: Decision | None = None
    made: list[str] = field(default_factory=list)
    error: str | None = None  # what is wrong with the input, where a guard found it

    def __post_init__(self) -> None:
        self.ledger = Ledger.load(self.folder)
        self.number = len(self.ledger.nights) + 1

    @property
    def key(self) -> str | None:
        """The run of tonight's model, once it is chosen."""
        return f"{self.name}/{self.winner}" if self.winner else None

    @property
    def val_bpb(self) -> float | None:
        return self.arms[self.winner]["val_bpb"] if self.winner else None


def run_night(night: Night, name: str) -> dict[str, Any]:
    """The record of the night: night, run, outcome, reason, champion, val_bpb, …; raises what made it fail, recorded too.

    Record, report and artifacts are left behind whatever happens.
    """
    night.name = name
    failure: BaseException | None = None
    try:
        night.champion = registry.champion(night.config.name)
        decision = work(night)
    except BaseException as error:
        failure = error
        reason = first_line(error)
        # What the gate had said before is on the page all the same.
        decision = replace(night.decision or Decision("failed", reason), outcome="failed", reason=reason)
    night.decision = decision
    record = {
        "night": night.number,
        "run": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "outcome": decision.outcome,
        "reason": decision.reason,
        "champion": champion_now(night),
        "val_bpb": night.val_bpb,
        "made": night.made,
    } | ({"error": night.error} if night.error else {})
    night.ledger.nights.append(record)
    try:
        # Before all that may break: the alias may have moved, and the next night has to know.
        night.ledger.save(night.folder)
    finally:
        tell(night, record)
    if failure is not None:
        raise failure
    return record


def work(night: Night) -> Decision:
    """The night's steps in order; each ends it by a decision, or leaves it to the next."""
    if (decision := look(night) or read(night)) is not None:
        return decision
    decision = prepare(night) or train_and_judge(night)
    night.ledger.source_bytes, night.ledger.settings = night.source_bytes, settings_id(night)
    return decision


# --- look, ingest, prepare -----------------------------------------------------------------------------------------------


def look(night: Night) -> Decision | None:
    """Is there room, is the champion usable, are the sources there?"""
    steps.check_disk(night.home, night.settings)
    if night.champion is not None:
        registry.check_usable(night.champion)
        if "run" not in night.champion.facts:
            raise UserError(
                f"model {night.champion.label}: its tag gptloom.run is gone, by which its scores are found; set it in MLflow"
            )
    size, before = steps.look_at_sources(night.config.data, night.home), night.ledger.source_bytes
    night.source_bytes = size
    if night.force or size >= night.settings.shrink_percent / 100 * before:
        return None
    night.error = (
        f"the sources hold {size:,} bytes, {100 * size / before:.0f} % of the {before:,} of last time; put the missing "
        "files back, or start the night with force if that is how it should be"
    )
    return Decision("refused", night.error)


def settings_id(night: Night) -> str:
    return content_id(night.config.model_dump(mode="json"))


def read(night: Night) -> Decision | None:
    """Ingest, and find what no night has seen."""
    night.corpus = finish(ingest, night.config.data, night.home)
    steps.seed_ledger(night.ledger, night.champion, night.corpus, night.home)
    night.tonight = steps.find_new_text(night.corpus, night.ledger, night.home)
    is_changed = night.ledger.settings not in ("", settings_id(night))
    if night.tonight or night.champion is None or is_changed or night.force:
        return None
    night.ledger.source_bytes = night.source_bytes
    return Decision("skipped", f"no new text in corpus {night.corpus.name}: whatever was added is there already")


def prepare(night: Night) -> Decision | None:
    """The text as shards, and the arms that learn from it."""
    from gptcore.corpus.selection import select_segments

    config, champion, tonight, home = night.config, night.champion, night.tonight, night.home
    repeated = steps.measure_repetition(night.ledger, tonight, home) if tonight else 0.0
    if repeated > night.settings.memorised_percent:
        return refuse_text(
            night, f"memorisation guard: {repeated:.0f} % of the frozen hold-outs stand in tonight's text, almost word for word"
        )
    chosen = select_segments(night.corpus, steps.training_segments(night.corpus, night.ledger, tonight), home)
    vocab = steps.vocabulary_of(champion, config.vocab, chosen, home)
    try:
        text = night.text = steps.prepare_text(config, night.corpus, vocab, night.ledger, tonight, home)
    except SplitTooSmall:
        if tonight is None or champion is None:
            raise
        return Decision("skipped", f"only {tonight.bytes:,} bytes of new text, too little to hold any out; it waits for more")
    night.made = [text.training.name]
    if champion is not None and text.unknown_percent > night.settings.corrupt_percent:
        return refuse_text(night, f"unreadable text: {text.unknown_percent:.0f} % of it is unknown to the vocabulary")
    configs = steps.plan_arms(config, champion, night.settings)
    night.plan = {key: (arm, text.training) for key, arm in configs.items()}
    if night.settings.new_vocabulary and champion is not None:
        plan_new_vocabulary(night, chosen, configs["scratch"])
    steps.add_earlier_vocabularies(text, config, night.corpus, night.ledger, home)
    return None


def plan_new_vocabulary(night: Night, chosen: Path, config: ExperimentConfig) -> None:
    """The arm whose vocabulary is learnt afresh, with hold-outs in it. None where the text has taught nothing new: that would be
    `scratch` once more.
    """
    text = night.text
    vocab = steps.vocabulary_of(None, night.config.vocab, chosen, night.home)
    if read_manifest(vocab)["fingerprint"] == read_manifest(text.vocab)["fingerprint"]:
        run_logger().info("no arm with a new vocabulary: all text so far gives the champion's again")
        return
    try:
        other = steps.prepare_text(night.config, night.corpus, vocab, night.ledger, text.tonight, night.home)
    except UserError as error:
        run_logger().info("no arm with a new vocabulary: %s", error)
        return
    for name, shards in other.holdouts.items():
        text.holdouts[name] |= shards
    night.made.append(other.training.name)
    night.plan["new-vocabulary"] = (config, other.training)


def refuse_text(night: Night, reason: str) -> Decision:
    """No model learns from tonight's text, neither now nor later; it is no yardstick either."""
    if night.tonight is not None:
        night.tonight.is_accepted, night.tonight.reason = False, reason
        night.ledger.generations.append(night.tonight)
    return Decision("refused", f"{reason}; tonight's text is left out from now on")


# --- train, judge, register ----------------------------------------------------------------------------------------------


def train_and_judge(night: Night) -> Decision:
    """The part of the night that is a run in MLflow, and then the registry."""
    with open_run(night.config, night.home / "runs" / night.name) as run:
        run.journal.tags({"gptloom.step": "nightly"})
        run.describe_data(night.text.corpus)
        decision = train(night, run.directory / "arms")
        if decision is not None:
            run.journal.tags({"gptloom.outcome": decision.outcome})
            return decision
        night.winner = choose(night)
        trained = night.arms[night.winner]
        run.compare(trained, trained)
        if night.tonight is not None:
            night.ledger.generations.append(night.tonight)
        decision = night.decision = judge(night)
        note = f"**{decision.outcome}**: {decision.reason}"
        run.journal.tags({"gptloom.outcome": decision.outcome, "gptloom.arm": night.winner, NOTE_TAG: note})
    if decision.outcome != "refused":
        register(night, decision)
    return decision


def train(night: Night, directory: Path) -> Decision | None:
    """The night's device process: the arms, and every model's scores on every hold-out."""
    scores = night.folder / "scores"
    result = steps.run_arms(night.plan, night.text, night.champion, night.ledger, night.settings, night.name, directory, scores)
    night.arms = result["arms"]
    if night.arms:
        return None
    return refuse_text(
        night,
        f"unreadable text: in {result['unreadable_percent']:.0f} % of it the order of the characters means nothing to the champion; "
        "is it damaged, or in another language?",
    )


def yardstick(night: Night) -> list[str]:
    """The hold-outs that decide: those frozen before tonight; without any, tonight's."""
    tonight = night.tonight.name if night.tonight else None
    return [name for name in night.text.holdouts if name != tonight] or list(night.text.holdouts)


def scores_of(night: Night, key: str, names: Iterable[str]) -> dict[str, Scores]:
    """What a model made of these hold-outs."""
    return {name: load_scores(score_path(night.folder / "scores", key, name)) for name in names}


def choose(night: Night) -> str:
    """The arm with the fewest bits per byte on the yardstick."""
    for key, arm in night.arms.items():
        arm["frozen_bpb"] = pool(list(scores_of(night, f"{night.name}/{key}", yardstick(night)).values())).bpb
    return min(night.arms, key=lambda key: night.arms[key]["frozen_bpb"])


def judge(night: Night) -> Decision:
    """The winner against the champion; the first one against byte frequencies."""
    text, trained = night.text, night.arms[night.winner]
    if night.champion is None:
        bpb = trained["val_bpb"]
        if text.entropy is not None and bpb >= text.entropy:
            return Decision(
                "refused",
                f"no champion yet, and {bpb:.3f} bits per byte are no better than byte frequencies "
                f"({text.entropy:.3f}); train longer (train.max_steps)",
            )
        return Decision("promoted", f"the first model, {bpb:.4f} bits per byte")
    assert night.key is not None
    old, new = (scores_of(night, key, text.holdouts) for key in (night.champion.facts["run"], night.key))
    pairs = {name: (old[name], new[name]) for name in text.holdouts}
    names = yardstick(night)
    tonight = pairs.get(night.tonight.name) if night.tonight and night.tonight.name not in names else None
    sources = [source.source for source in night.config.data.sources]
    frozen = {name: pairs[name] for name in names}
    decision = decide(frozen, tonight, sources, tuple(trained["recited"]), night.settings, len(night.arms))
    arms = ", ".join(f"{key} {arm['frozen_bpb']:.4f}" for key, arm in night.arms.items())
    return replace(decision, reason=f"{decision.reason}; arm {night.winner} won ({arms})")


def register(night: Night, decision: Decision) -> None:
    """The winner becomes the challenger; the champion when the gate said so."""
    trained, key, name = night.arms[night.winner], f"{night.name}/{night.winner}", night.config.name
    shards = night.plan[night.winner][1]
    run_id = find_run(name, key)
    if run_id is None:
        raise RuntimeError(f"MLflow does not have run {key}; the champion stays, and the next night tries again")
    facts = {
        "run": key,
        "corpus": night.text.corpus.name,
        "vocab": read_manifest(shards)["vocab"],
        "shards": shards.name,
        "val_bpb": trained["val_bpb"],
        "parameters": trained["parameters"],
        "night": night.number,
        "arm": night.winner,
    }
    card = registry.model_card(f"{name}, night {night.number}", facts, f"{decision.outcome}: {decision.reason}.")
    version = registry.register(name, Path(trained["checkpoint"]), run_id, facts, card)
    run_logger().info("registered %s, val_bpb %s", version.label, trained["val_bpb"])
    if decision.outcome == "promoted":
        registry.promote(version.label, decision.reason)
        night.ledger.models.append(KnownModel(key, version.version, trained["checkpoint"]))


# --- tell ------------------------------------------------------------------------------------------------------------------


def champion_now(night: Night) -> str | None:
    try:
        now = registry.champion(night.config.name)
    except Exception:  # the store is away: that is why the night failed
        now = night.champion
    return now.version if now else None


def tell(night: Night, record: dict[str, Any]) -> None:
    """Picture, report, artifacts, clean-up, messages. Trouble is told and changes no outcome."""
    from gptcore.nights.page import write_night

    matrix: Matrix | None = None
    sentences: list[str] = []
    row: int | None = None
    with going_on(record, "drift ledger"):
        matrix, sentences, row = drift(night)
    report = night.folder / "reports" / f"{night.name}.html"
    record["report"] = str(report)
    shown = {key: value for key, value in record.items() if key not in ("made", "report", "error")}
    shown["val_bpb"] = None if night.val_bpb is None else f"{night.val_bpb:.4f}"
    with going_on(record, "report"):
        report.parent.mkdir(parents=True, exist_ok=True)
        write_night(report, shown, night.ledger.nights, night.arms, night.decision, matrix, sentences)
    with going_on(record, "artifacts"):
        leave_artifacts(night, record, matrix, sentences, row)
    with going_on(record, "clean-up"):
        retired = steps.retire_nights(night.config.name, night.ledger, night.settings, night.home)
        if retired["nights"]:
            for old in night.ledger.nights:
                old["retired"] = old.get("retired", False) or old["run"] in retired["nights"]
            run_logger().info("retired %s: %s MiB freed", ", ".join(retired["nights"]), retired["freed_mib"])
    with going_on(record, "messages"):
        steps.notify(record, night.settings, night.config.name)
    with going_on(record, "trouble and clean-up in the ledger"):
        night.ledger.save(night.folder)


@contextmanager
def going_on(record: dict[str, Any], what: str) -> Iterator[None]:
    """Whatever breaks in the block is said in the log, in the night's record and on its page; the night goes on."""
    try:
        yield
    except Exception as error:
        trouble = f"no {what}: {first_line(error)}"
        record["trouble"] = f"{record['trouble']}; {trouble}" if "trouble" in record else trouble
        run_logger().warning("after the night: %s", trouble)


def drift(night: Night) -> tuple[Matrix | None, list[str], int | None]:
    """The ledger's matrix, what it says, and the champion's row."""
    models = {model.key: f"champion {model.version}" for model in night.ledger.models}
    if night.champion is not None:
        models.setdefault(night.champion.facts["run"], f"champion {night.champion.version}")
    keys = list(models)
    before = keys.index(night.champion.facts["run"]) if night.champion else None
    if night.key and night.key not in models:
        models[night.key] = "tonight's"
    holdouts = [generation.name for generation in night.ledger.accepted]
    if not models or not holdouts:
        return None, [], None
    matrix = read_matrix(night.folder / "scores", models, holdouts)
    sentences: list[str] = []
    if night.key and before is not None:
        sentences = explain(matrix, before, list(models).index(night.key))
    now = f"champion {champion_now(night)}"
    return matrix, sentences, matrix.models.index(now) if now in matrix.models else None


def leave_artifacts(night: Night, record: dict[str, Any], matrix: Matrix | None, sentences: list[str], row: int | None) -> None:
    files = [Path(record["report"])]
    if matrix is not None:
        files.append(draw_matrix(matrix, night.folder / "ledger.png", row))
    if night.key:
        keep_files(night.config.name, night.name, files)
    if FlowRunContext.get() is None:
        return
    bpb = f"{record['val_bpb']:.4f}" if record["val_bpb"] is not None else "–"
    create_markdown_artifact(
        key="nightly",
        markdown=f"**{record['outcome'].capitalize()}** (night {record['night']}): {record['reason']}\n\n"
        f"champion: version {record['champion'] or 'none'}; tonight's bits per byte: {bpb}; "
        f"{links(Path(record['report']), find_run(night.config.name, night.name) if night.key else None)}\n\n"
        + "\n".join(f"- {text}" for text in sentences),
        description="What the night did, and why",
    )
    if matrix is not None:
        create_image_artifact(image_url=data_url(files[-1]), key="drift-ledger", description=" ".join(sentences))
