"""Retraining by night: what is new is read, two models are trained on it, the better one replaces the champion, or not, and why.

    gptloom nightly experiments/shakespeare.yaml            # one night now; scheduled in prefect.yaml, also a form in the UI
    gptloom nightly --simulate 7                            # seven nights with planted trouble, see flows/simulation.py

Memory of an experiment's nights: $GPTLOOM_HOME/nightly/EXPERIMENT/{ledger.json, ledger.png, scores/, reports/}. A night ends
promoted, kept (the champion is still better), skipped (nothing new), refused (a guard said no) or failed; only `promoted`
moves the alias `champion`. A night that fires while the one before still runs is cancelled (prefect.yaml).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Completed

from gptcore.config import ExperimentConfig, UserError, load_config
from gptcore.nights.settings import NightlySettings
from gptcore.store import content_id, home_dir, read_manifest
from gptloom.flows.forms import NO_OVERRIDES, Changes, Experiment, titled
from gptloom.flows.run import STOPS, cancelled, finish, named_by_experiment, new_run_name, open_run
from gptloom.tasks.data import ingest
from gptloom.tasks.records.tracking import NOTE_TAG, check_store, find_run, first_line
from gptloom.tasks.reporting import data_url, links
from gptloom.tasks.runtime.log import run_logger

if TYPE_CHECKING:
    from gptcore.nights.gate import Decision
    from gptcore.nights.ledger import Generation, Ledger, Matrix
    from gptloom.tasks.records.registry import Version

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
    try:
        config = load_config(experiment, overrides.as_list())
        check_store()
    except UserError as error:
        tell_failure(Path(experiment).stem, error, settings)
        raise
    name = flow_run.get_name() if FlowRunContext.get() else None
    night = Night(config, home_dir() / "nightly" / config.name, settings, force)
    try:
        result = night.run(name or new_run_name(f"{config.name}-nightly"))
    except STOPS as stop:
        return cancelled(stop)
    return Completed(name=result["outcome"].capitalize(), message=result["reason"], data=result)


def tell_failure(name: str, error: UserError, settings: NightlySettings) -> None:
    """The message of a night that could not even begin, and so has no record."""
    from gptloom.tasks import nightly as steps

    steps.notify({"outcome": "failed", "reason": str(error), "champion": "as before", "run": "none"}, settings, name)


class Night:
    """One night of one experiment. `run` does it and leaves its record, report and artifacts, whatever happens."""

    def __init__(self, config: ExperimentConfig, folder: Path, settings: NightlySettings, force: bool = False) -> None:
        from gptcore.nights.ledger import Ledger

        self.config, self.folder, self.settings, self.force = config, folder, settings, force
        self.home = home_dir()
        self.ledger: Ledger = Ledger.load(folder)
        self.champion: Version | None = None
        self.arms: dict[str, dict[str, Any]] = {}
        self.decision: Decision | None = None
        self.val_bpb: float | None = None
        self.tonight_key: str | None = None
        self.made: list[str] = []
        self.shards: dict[str, Path] = {}  # what each arm learns from
        self.error: str | None = None  # what is wrong with the input, where a guard found it

    def run(self, name: str) -> dict[str, Any]:
        """The record of the night: night, run, outcome, reason, champion, val_bpb, …; raises what made it fail, recorded too."""
        from gptloom.tasks.records import registry

        self.name, self.number = name, len(self.ledger.nights) + 1
        failure: BaseException | None = None
        try:
            self.champion = registry.champion(self.config.name)
            outcome, reason = self._work()
        except BaseException as error:
            failure, outcome, reason = error, "failed", (str(error).splitlines() or [type(error).__name__])[0]
        night = {
            "night": self.number,
            "run": name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "outcome": outcome,
            "reason": reason,
            "champion": self._champion_now(),
            "val_bpb": self.val_bpb,
            "made": self.made,
        } | ({"error": self.error} if self.error else {})
        self.ledger.nights.append(night)
        self._finish(night)
        if failure is not None:
            raise failure
        return night

    # --- what is done, in order -----------------------------------------------------------------------------------------

    def _work(self) -> tuple[str, str]:
        from gptloom.tasks import nightly as steps
        from gptloom.tasks.records import registry

        steps.check_disk(self.home, self.settings)
        if self.champion is not None:
            registry.check_usable(self.champion)
        size, before = steps.look_at_sources(self.config.data, self.home), self.ledger.source_bytes
        if not self.force and size < self.settings.shrink_percent / 100 * before:
            self.error = (
                f"the sources hold {size:,} bytes, {100 * size / before:.0f} % of the {before:,} of last time; put the missing "
                "files back, or start the night with force if that is how it should be"
            )
            return "refused", self.error
        corpus = finish(ingest, self.config.data, self.home)
        steps.seed_ledger(self.ledger, self.champion, corpus, self.home)
        tonight = steps.find_new_text(corpus, self.ledger, self.home)
        settings_id = content_id(self.config.model_dump(mode="json"))
        changed = bool(self.ledger.settings) and settings_id != self.ledger.settings
        if tonight is None and self.champion is not None and not changed and not self.force:
            self.ledger.source_bytes = size
            return "skipped", f"no new text in corpus {corpus.name}: whatever was added is there already"
        outcome = self._train(corpus, tonight)
        self.ledger.source_bytes, self.ledger.settings = size, settings_id
        return outcome

    def _train(self, corpus: Path, tonight: Generation | None) -> tuple[str, str]:
        from gptcore.corpus.selection import select_segments
        from gptloom.tasks import nightly as steps

        if (
            tonight
            and (repeated := steps.measure_repetition(self.ledger, tonight, self.home)) > self.settings.memorised_percent
        ):
            return self._refuse_text(
                tonight,
                f"memorisation guard: {repeated:.0f} % of the frozen hold-outs stand in tonight's text, almost word for word",
            )
        chosen = select_segments(corpus, steps.training_segments(corpus, self.ledger, tonight), self.home)
        vocab = steps.vocabulary_of(self.champion, self.config.vocab, chosen, self.home)
        try:
            text = steps.prepare_text(self.config, corpus, vocab, self.ledger, tonight, self.home)
        except UserError as error:
            if tonight is None or self.champion is None or "split has" not in str(error):
                raise
            return "skipped", f"only {tonight.bytes:,} bytes of new text, too little to hold any out; it waits for more"
        self.made = [text.training.name]
        if self.champion is not None and text.unknown_percent > self.settings.corrupt_percent:
            return self._refuse_text(
                tonight, f"unreadable text: {text.unknown_percent:.0f} % of it is unknown to the vocabulary"
            )
        configs = steps.plan_arms(self.config, self.champion, self.settings)
        arms = {key: (config, text.training) for key, config in configs.items()}
        if self.settings.new_vocabulary and self.champion is not None:
            arms |= self._new_vocabulary(corpus, chosen, text, configs["scratch"])
        steps.add_earlier_vocabularies(text, self.config, corpus, self.ledger, self.home)
        self.shards = {key: shards for key, (_, shards) in arms.items()}
        with open_run(self.config, self.home / "runs" / self.name) as run:
            run.journal.tags({"gptloom.step": "nightly"})
            run.describe_data(text.corpus)
            directory, scores = run.directory / "arms", self.folder / "scores"
            result = steps.run_arms(arms, text, self.champion, self.ledger, self.settings, self.name, directory, scores)
            unreadable = result["unreadable_percent"]
            if not result["arms"]:
                outcome = self._refuse_text(
                    tonight,
                    f"unreadable text: in {unreadable:.0f} % of it the order of the characters means nothing to the champion; is it "
                    "damaged, or in another language?",
                )
                run.journal.tags({"gptloom.outcome": outcome[0]})
                return outcome
            self.arms = result["arms"]
            winner = self._choose(text)
            trained = self.arms[winner]
            self.val_bpb, self.tonight_key = trained["val_bpb"], f"{self.name}/{winner}"
            run.compare(trained, trained)
            if tonight is not None:
                self.ledger.generations.append(tonight)
            outcome = self._decide(text, winner)
            run.journal.tags(
                {"gptloom.outcome": outcome[0], "gptloom.arm": winner, NOTE_TAG: f"**{outcome[0]}**: {outcome[1]}"}
            )
        if outcome[0] != "refused":
            self._register(text, winner, outcome)
        return outcome

    def _new_vocabulary(
        self, corpus: Path, chosen: Path, text: Any, config: ExperimentConfig
    ) -> dict[str, tuple[ExperimentConfig, Path]]:
        """The arm whose vocabulary is learnt afresh, by its key, its hold-outs added to those of `text`. None where the text has
        taught nothing new: that would be `scratch` once more.
        """
        from gptloom.tasks import nightly as steps

        vocab = steps.vocabulary_of(None, self.config.vocab, chosen, self.home)
        if read_manifest(vocab)["fingerprint"] == read_manifest(text.vocab)["fingerprint"]:
            run_logger().info("no arm with a new vocabulary: all text so far gives the champion's again")
            return {}
        try:
            other = steps.prepare_text(self.config, corpus, vocab, self.ledger, text.tonight, self.home)
        except UserError as error:
            run_logger().info("no arm with a new vocabulary: %s", error)
            return {}
        for name, shards in other.holdouts.items():
            text.holdouts[name] |= shards
        self.made.append(other.training.name)
        return {"new-vocabulary": (config, other.training)}

    def _refuse_text(self, tonight: Generation | None, reason: str) -> tuple[str, str]:
        """No model learns from tonight's text, neither now nor later; it is no yardstick either."""
        if tonight is not None:
            tonight.is_accepted, tonight.reason = False, reason
            self.ledger.generations.append(tonight)
        return "refused", f"{reason}; tonight's text is left out from now on"

    def _pairs(self, key: str, names: list[str]) -> dict[str, tuple[Any, Any]]:
        """(champion's, the other model's) scores on hold-outs."""
        from gptcore.nights.scores import load_scores, score_path

        assert self.champion is not None
        both = (self.champion.facts["run"], key)
        return {name: tuple(load_scores(score_path(self.folder / "scores", k, name)) for k in both) for name in names}  # type: ignore[misc]

    def _yardstick(self, text: Any) -> list[str]:
        """The hold-outs that decide: those frozen before tonight; without any, tonight's."""
        tonight = text.tonight.name if text.tonight else None
        return [name for name in text.holdouts if name != tonight] or list(text.holdouts)

    def _choose(self, text: Any) -> str:
        """The arm with the fewest bits per byte on the yardstick."""
        from gptcore.nights.scores import load_scores, pool, score_path

        for key, arm in self.arms.items():
            paths = [score_path(self.folder / "scores", f"{self.name}/{key}", name) for name in self._yardstick(text)]
            arm["frozen_bpb"] = pool([load_scores(path) for path in paths]).bpb
        return min(self.arms, key=lambda key: self.arms[key]["frozen_bpb"])

    def _decide(self, text: Any, winner: str) -> tuple[str, str]:
        from gptcore.nights.gate import decide

        trained = self.arms[winner]
        arms = ", ".join(f"{key} {arm['frozen_bpb']:.4f}" for key, arm in self.arms.items())
        if self.champion is None:
            if text.entropy is not None and trained["val_bpb"] >= text.entropy:
                return "refused", (
                    f"no champion yet, and {trained['val_bpb']:.3f} bits per byte are no better than byte frequencies "
                    f"({text.entropy:.3f}); train longer (train.max_steps)"
                )
            return "promoted", f"the first model, {trained['val_bpb']:.4f} bits per byte"
        names = self._yardstick(text)
        pairs = self._pairs(f"{self.name}/{winner}", list(text.holdouts))
        tonight = pairs.get(text.tonight.name) if text.tonight and text.tonight.name not in names else None
        sources = [source.source for source in self.config.data.sources]
        self.decision = decide(
            {name: pairs[name] for name in names}, tonight, sources, tuple(trained["recited"]), self.settings, len(self.arms)
        )
        return self.decision.outcome, f"{self.decision.reason}; arm {winner} won ({arms})"

    def _register(self, text: Any, winner: str, outcome: tuple[str, str]) -> None:
        """The winner becomes the challenger; the champion when the gate said so."""
        from gptcore.nights.ledger import KnownModel
        from gptloom.tasks.records import registry

        trained, key = self.arms[winner], f"{self.name}/{winner}"
        run_id = find_run(self.config.name, key)
        if run_id is None:
            raise RuntimeError(f"MLflow does not have run {key}; the champion stays, and the next night tries again")
        facts = {
            "run": key,
            "corpus": text.corpus.name,
            "vocab": read_manifest(self.shards[winner])["vocab"],
            "shards": self.shards[winner].name,
            "val_bpb": trained["val_bpb"],
            "parameters": trained["parameters"],
            "night": self.number,
            "arm": winner,
        }
        card = registry.model_card(f"{self.config.name}, night {self.number}", facts, f"{outcome[0]}: {outcome[1]}.")
        version = registry.register(self.config.name, Path(trained["checkpoint"]), run_id, facts, card)
        run_logger().info("registered %s, val_bpb %s", version.label, trained["val_bpb"])
        if outcome[0] == "promoted":
            registry.promote(version.label, outcome[1])
            self.ledger.models.append(KnownModel(key, version.version, trained["checkpoint"]))

    # --- what is left behind ----------------------------------------------------------------------------------------------

    def _champion_now(self) -> str | None:
        from gptloom.tasks.records import registry

        try:
            now = registry.champion(self.config.name)
        except Exception:  # the store is away: that is why the night failed
            now = self.champion
        return now.version if now else None

    def _finish(self, night: dict[str, Any]) -> None:
        """Ledger, picture, report, artifacts, clean-up, messages. Trouble after the ledger is told and changes no outcome."""
        try:
            # Before all that may break: the alias may have moved, and the next night has to know.
            self.ledger.save(self.folder)
        finally:
            self._tell(night)

    def _tell(self, night: dict[str, Any]) -> None:
        from gptcore.nights.page import write_night
        from gptloom.tasks import nightly as steps

        matrix: Matrix | None = None
        sentences: list[str] = []
        row: int | None = None
        with self._going_on(night, "drift ledger"):
            matrix, sentences, row = self._matrix()
        report = self.folder / "reports" / f"{self.name}.html"
        night["report"] = str(report)
        shown = {key: value for key, value in night.items() if key not in ("made", "report", "error")}
        shown["val_bpb"] = None if self.val_bpb is None else f"{self.val_bpb:.4f}"
        with self._going_on(night, "report"):
            report.parent.mkdir(parents=True, exist_ok=True)
            write_night(report, shown, self.ledger.nights, self.arms, self.decision, matrix, sentences)
        with self._going_on(night, "artifacts"):
            self._leave_artifacts(night, matrix, sentences, row)
        with self._going_on(night, "clean-up"):
            retired = steps.retire_nights(self.config.name, self.ledger, self.settings, self.home)
            if retired["nights"]:
                for old in self.ledger.nights:
                    old["retired"] = old.get("retired", False) or old["run"] in retired["nights"]
                run_logger().info("retired %s: %s MiB freed", ", ".join(retired["nights"]), retired["freed_mib"])
        with self._going_on(night, "messages"):
            steps.notify(night, self.settings, self.config.name)
        with self._going_on(night, "trouble and clean-up in the ledger"):
            self.ledger.save(self.folder)

    @contextmanager
    def _going_on(self, night: dict[str, Any], what: str) -> Iterator[None]:
        """Whatever breaks in the block is said in the log, in the night's record and on its page; the night goes on."""
        try:
            yield
        except Exception as error:
            trouble = f"no {what}: {first_line(error)}"
            night["trouble"] = f"{night['trouble']}; {trouble}" if "trouble" in night else trouble
            run_logger().warning("after the night: %s", trouble)

    def _matrix(self) -> tuple[Matrix | None, list[str], int | None]:
        """The ledger's matrix, what it says, and the champion's row."""
        from gptcore.nights.ledger import explain, read_matrix

        models = {model.key: f"champion {model.version}" for model in self.ledger.models}
        if self.champion is not None:
            models.setdefault(self.champion.facts["run"], f"champion {self.champion.version}")
        keys = list(models)
        before = keys.index(self.champion.facts["run"]) if self.champion else None
        if self.tonight_key and self.tonight_key not in models:
            models[self.tonight_key] = "tonight's"
        holdouts = [generation.name for generation in self.ledger.accepted]
        if not models or not holdouts:
            return None, [], None
        matrix = read_matrix(self.folder / "scores", models, holdouts)
        sentences: list[str] = []
        if self.tonight_key and before is not None:
            sentences = explain(matrix, before, list(models).index(self.tonight_key))
        now = f"champion {self._champion_now()}"
        return matrix, sentences, matrix.models.index(now) if now in matrix.models else None

    def _leave_artifacts(self, night: dict[str, Any], matrix: Any, sentences: list[str], row: int | None) -> None:
        from gptcore.nights.ledger import draw_matrix
        from gptloom.tasks.records.tracking import keep_files

        files = [Path(night["report"])]
        if matrix is not None:
            files.append(draw_matrix(matrix, self.folder / "ledger.png", row))
        if self.tonight_key:
            keep_files(self.config.name, self.name, files)
        if FlowRunContext.get() is None:
            return
        bpb = f"{night['val_bpb']:.4f}" if night["val_bpb"] is not None else "–"
        create_markdown_artifact(
            key="nightly",
            markdown=f"**{night['outcome'].capitalize()}** (night {night['night']}): {night['reason']}\n\n"
            f"champion: version {night['champion'] or 'none'}; tonight's bits per byte: {bpb}; "
            f"{links(Path(night['report']), find_run(self.config.name, self.name) if self.tonight_key else None)}\n\n"
            + "\n".join(f"- {text}" for text in sentences),
            description="What the night did, and why",
        )
        if matrix is not None:
            create_image_artifact(image_url=data_url(files[-1]), key="drift-ledger", description=" ".join(sentences))
