"""Nights: the gate's decisions on planted differences, what the ledger says, and seven simulated nights end to end.

.venv/bin/pytest tests/test_nightly.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, users_environment
from prefect.logging import disable_run_logger

from gptcore.config import UserError, load_config
from gptcore.nights.gate import Decision, compare, decide
from gptcore.nights.ledger import Generation, KnownModel, Ledger, Matrix, draw_matrix, explain
from gptcore.nights.scores import Scores, load_scores, pool, save_scores
from gptcore.nights.settings import NightlySettings
from gptcore.reciting import _long_runs
from gptcore.shards import SplitTooSmall
from gptcore.store import read_json

SETTINGS = NightlySettings(resamples=500)


def scores(factor: float = 1.0, documents: int = 40, noise: float = 0.0, seed: int = 0, source: int = 0) -> Scores:
    """Two sections a document, 1,000 bytes each, about 2 bits per byte times `factor`, documents unlike each other."""
    rng = np.random.default_rng(7)
    difficulty = np.repeat(rng.normal(2.0, 0.3, documents), 2)
    own = np.random.default_rng(seed).normal(0, noise, 2 * documents)
    n_bytes = np.full(2 * documents, 1000.0)
    nats = np.log(2) * n_bytes * (difficulty * factor + own)
    return Scores(nats, n_bytes, np.repeat(np.arange(documents), 2), np.full(2 * documents, source))


# --- the gate --------------------------------------------------------------------------------------------------------------


def test_pairing_finds_what_two_separate_intervals_would_not() -> None:
    """0.5 % better on every text is certain, though texts differ by 15 %: unpaired intervals would overlap for ever."""
    comparison = compare(scores(), scores(0.995), 1000)
    assert comparison.high is not None
    assert comparison.high < 0
    assert comparison.delta == pytest.approx(-0.005 * comparison.champion_bpb)
    alone = np.quantile(scores().nats.reshape(-1, 2).sum(1) / 2000 / np.log(2), [0.025, 0.975])
    assert alone[1] - alone[0] > 20 * -comparison.delta


def test_sections_of_one_document_are_resampled_together() -> None:
    """Sections taken for independent make an interval too narrow by the square root of their number."""
    champion, challenger = scores(), scores(noise=0.05, seed=1)
    nats = challenger.nats.copy()
    nats[1::2] = champion.nats[1::2] + nats[::2] - champion.nats[::2]  # the same noise on both sections: half the evidence

    def interval(documents: np.ndarray) -> tuple[float, int]:
        both = (Scores(n, champion.bytes, documents, champion.sources) for n in (champion.nats, nats))
        comparison = compare(*both, 2000)
        return comparison.high - comparison.low, comparison.clusters

    (clustered, by_document), (narrow, by_section) = interval(champion.documents), interval(np.arange(80))
    assert (by_document, by_section) == (40, 80)
    assert clustered > 1.2 * narrow


@pytest.mark.parametrize(
    ("factor", "noise", "outcome", "words"),
    [
        (0.97, 0.0, "promoted", "better on the frozen hold-outs"),
        (0.9995, 0.0, "kept", "better by less than 0.002"),
        (1.0, 0.2, "kept", "no certain improvement"),
        (1.05, 0.0, "refused", "becomes 5.0 % worse"),
    ],
)
def test_decisions(factor: float, noise: float, outcome: str, words: str) -> None:
    decision = decide({"night-1": (scores(), scores(factor, noise=noise, seed=3))}, None, ["a"], (0, 0), SETTINGS)
    assert decision.outcome == outcome, decision.reason
    assert words in decision.reason


def test_guards_hold_against_an_average_that_hides_a_loss() -> None:
    """A model that gets much better on one source may get worse on another and still be better on average."""
    old = pool([scores(), scores(source=1, documents=20)])
    new = pool([scores(0.8), scores(1.1, source=1, documents=20)])
    decision = decide({"night-1": (old, new)}, None, ["plays", "letters"], (0, 0), SETTINGS)
    assert decision.outcome == "refused"
    assert "source letters becomes 10.0 % worse" in decision.reason
    earlier = {"night-1": (scores(), scores(0.9)), "night-2": (scores(documents=20), scores(1.05, documents=20))}
    assert "hold-out night-2 becomes 5.0 % worse" in decide(earlier, None, ["a"], (0, 0), SETTINGS).reason
    # Tonight's text is guarded too, but it cannot promote: the yardstick would move with the text.
    flat = (scores(), scores(noise=0.2, seed=3))
    assert decide({"night-1": flat}, (scores(), scores(0.5)), ["a"], (0, 0), SETTINGS).outcome == "kept"


def test_reciting_the_training_text_is_refused() -> None:
    better = {"night-1": (scores(), scores(0.9))}
    assert decide(better, None, ["a"], (0.30, 0.28), SETTINGS).outcome == "promoted"  # text that everyone recites
    decision = decide(better, None, ["a"], (0.30, 0.10), SETTINGS)
    assert decision.outcome == "refused"
    assert "recites 30.0 % of the training text" in decision.reason


def test_too_little_text_promotes_nothing() -> None:
    few = {"night-1": (scores(documents=2), scores(0.9, documents=2))}
    assert "too little held-out text" in decide(few, None, ["a"], (0, 0), SETTINGS).reason


def test_recited_runs() -> None:
    right = np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=bool)
    assert _long_runs(right, np.full(10, 2), 8) == 8  # four ids of two bytes; three are too few
    assert _long_runs(np.ones(4, dtype=bool), np.ones(4, dtype=int), 5) == 0


# --- the ledger --------------------------------------------------------------------------------------------------------------


def test_ledger_tells_drift_from_regression_and_forgetting(tmp_path: Path) -> None:
    """One number a night cannot tell them apart; that is what the matrix is for."""

    def told(*rows: list[float]) -> str:
        return " ".join(explain(Matrix(["champion 1", "tonight's"], ["night-1", "night-2"], list(rows)), 0, 1))

    assert "No data drift" in told([2.0, 2.02], [1.9, 1.95])
    assert "Neither regression nor forgetting" in told([2.0, 2.02], [1.9, 1.95])
    assert "Data drift" in told([2.0, 3.0], [2.0, 2.5])
    assert "Forgetting" in told([2.0, 3.0], [2.3, 2.5])
    assert "Regression" in told([2.0, 2.0], [2.3, 2.4])
    picture = draw_matrix(
        Matrix(["champion 1", "tonight's"], ["night-1", "night-2"], [[2.0, None], [1.9, 2.1]]), tmp_path / "m.png", 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_ledger_and_scores_come_back_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(nights=[{"night": 1}], generations=[Generation("night-1", ["a"], 5, False, "bad")], source_bytes=9)
    ledger.save(tmp_path)
    assert Ledger.load(tmp_path) == ledger
    assert ledger.known_segments == {"a"}
    assert not ledger.accepted
    save_scores(tmp_path / "x" / "night-1.npz", scores())
    assert load_scores(tmp_path / "x" / "night-1.npz").bpb == scores().bpb


@pytest.mark.integration
def test_messages_arrive_and_trouble_with_them_costs_nothing(
    home: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptloom.flows.nightly import nightly
    from gptloom.tasks.nightly import notify

    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    night = {"outcome": "promoted", "reason": "better", "champion": "3", "run": "words-1"}
    monkeypatch.setenv("NONSENSE", "nonsense://x")
    monkeypatch.setenv("RECEIVER", f"json://127.0.0.1:{server.server_port}/")
    settings = NightlySettings(notify=["NONSENSE", "NOT_SET", "RECEIVER"])
    with disable_run_logger():
        assert notify.fn(night, settings, "words") == 1
        assert notify.fn(night | {"outcome": "kept"}, settings, "words") == 0
    with pytest.raises(UserError, match="no-such"):  # a schedule whose experiment was moved away must not fail in silence
        nightly("no-such.yaml", settings=settings)
    server.shutdown()
    server.server_close()
    assert len(received) == 2
    assert received[1]["title"] == "gptloom no-such: failed"
    assert "cannot be read" in received[1]["message"]
    assert received[0]["title"] == "gptloom words: promoted"
    assert "champion: 3" in received[0]["message"]


@pytest.mark.parametrize("trouble", ["a damaged score file", "a full disk"])
def test_trouble_after_a_night_leaves_its_outcome_and_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """The alias had moved, and the ledger knew nothing of it; a damaged file did that in every night to come."""
    from gptcore.nights import page
    from gptloom.flows import nightly as flow
    from gptloom.tasks import nightly as steps
    from gptloom.tasks.records import registry

    folder, told = home / "nightly" / "words", []
    Ledger(generations=[Generation("night-1", [], 5)], models=[KnownModel("old", "1", "")]).save(folder)
    if trouble == "a full disk":
        words = "no report: [Errno 28] full"

        def write_night(*_: Any) -> None:
            assert len(Ledger.load(folder).nights) == 1
            raise OSError(28, "full")

        monkeypatch.setattr(page, "write_night", write_night)
    else:
        damaged = folder / "scores" / "old" / "night-1.npz"
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"PK")
        words = f"no drift ledger: {damaged}: damaged"
    monkeypatch.setattr(registry, "champion", lambda _: None)
    monkeypatch.setattr(steps, "retire_nights", lambda *_: {"nights": []})
    monkeypatch.setattr(steps, "notify", lambda night, *_: told.append(night["outcome"]))
    monkeypatch.setattr(flow, "work", lambda _: Decision("promoted", "planted"))
    experiment = tmp_path / "words.yaml"
    experiment.write_text("")
    night = flow.run_night(flow.Night(load_config(experiment), folder, SETTINGS), "words-nightly-1")
    assert (night["outcome"], told) == ("promoted", ["promoted"])
    (kept,) = Ledger.load(folder).nights
    assert kept["outcome"] == "promoted"
    assert words in kept["trouble"]
    if trouble != "a full disk":
        assert str(damaged) in Path(night["report"]).read_text()


def test_only_too_little_text_waits_for_more(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a message decided: any mistake that spoke of what a split has made a skipped night of a failed one."""
    from gptcore.corpus import selection
    from gptloom.flows import nightly as flow
    from gptloom.tasks import nightly as steps

    experiment = tmp_path / "words.yaml"
    experiment.write_text("")
    night = flow.Night(load_config(experiment), home / "nightly" / "words", SETTINGS)
    night.tonight = Generation("night-1", ["a"], 5)
    night.champion = flow.Version("words", "1", "run", {})
    monkeypatch.setattr(selection, "select_segments", lambda *_: tmp_path)
    for name in ("training_segments", "vocabulary_of"):
        monkeypatch.setattr(steps, name, lambda *_: tmp_path)
    monkeypatch.setattr(steps, "measure_repetition", lambda *_: 0.0)

    def fail_with(error: Exception) -> None:
        def prepare_text(*_: Any) -> None:
            raise error

        monkeypatch.setattr(steps, "prepare_text", prepare_text)

    fail_with(SplitTooSmall("too little"))
    decision = flow.prepare(night)
    assert decision is not None
    assert (decision.outcome, decision.reason) == (
        "skipped",
        "only 5 bytes of new text, too little to hold any out; it waits for more",
    )
    fail_with(UserError("the val split has a hole"))
    with pytest.raises(UserError, match="a hole"):
        flow.prepare(night)


def test_arms_need_equal_tokens(home: Path, tmp_path: Path) -> None:
    from gptloom.tasks.nightly import plan_arms

    path = tmp_path / "words.yaml"
    path.write_text("train: {minutes: 5}\n")
    with pytest.raises(UserError, match=r"train.minutes=5.*train.max_steps or train.max_tokens"):
        plan_arms(load_config(path), None, SETTINGS)


@pytest.fixture
def night(mlflow_store: str, home: Path, tmp_path: Path, prefect_server: None) -> Callable[..., dict[str, Any]]:
    """Call one night on a folder of texts that needs no training to end."""
    from gptloom.flows.nightly import Night, run_night

    texts = prose(tmp_path / "inbox", 4)
    experiment = tmp_path / "words.yaml"
    experiment.write_text(f"data: {{source: {texts}}}\n")

    def call() -> dict[str, Any]:
        night = Night(load_config(experiment), home / "nightly" / "words", SETTINGS)
        return run_night(night, f"words-nightly-{len(night.ledger.nights) + 1}")

    return call


def register_champion(uri: str, folder: Path) -> str:
    """A champion whose run exists and whose weights do not matter here; returns its run's id."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("words", artifact_location=folder.as_uri())).info.run_id
    client.create_registered_model("words")
    client.create_model_version("words", f"{folder.as_uri()}/{run}/artifacts/model", run, tags={"gptloom.run": "old"})
    client.set_registered_model_alias("words", "champion", "1")
    return run


@pytest.mark.integration
def test_sources_that_are_gone_or_shrunk_leave_the_champion(
    night: Callable[..., dict[str, Any]], home: Path, tmp_path: Path, mlflow_store: str
) -> None:
    """A disk that is not mounted must not teach the model that there is no text."""
    from gptloom.tasks.records import registry

    Ledger(source_bytes=1_000_000).save(home / "nightly" / "words")
    shrunk = night()
    assert shrunk["outcome"] == "refused"
    assert "5 % of the 1,000,000 of last time; put the missing files back, or start the night with force" in shrunk["reason"]
    (tmp_path / "inbox").rename(tmp_path / "away")
    with pytest.raises(UserError, match="no such file or folder"):
        night()
    run = register_champion(mlflow_store, tmp_path / "artifacts")
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=mlflow_store).delete_run(run)
    with pytest.raises(UserError, match=rf"words/1.*was deleted.*restore --run-id {run}.*gptloom rollback words"):
        night()
    ledger = Ledger.load(home / "nightly" / "words")
    assert [record["outcome"] for record in ledger.nights] == ["refused", "failed", "failed"]
    assert registry.champion("words").version == "1"
    assert len(list((home / "nightly" / "words" / "reports").glob("*.html"))) == 3


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_new_vocabulary_that_wins_is_the_champions_from_then_on(
    home: Path, tmp_path: Path, mlflow_store: str, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered with the old vocabulary, the next nights would read their text in ids that the model does not know; and an earlier
    champion, which reads in another one, still needs its row in the ledger."""
    from gptloom.flows import nightly as flow
    from gptloom.tasks.records import registry

    texts = prose(tmp_path / "inbox", 10)
    later = [texts.joinpath(f"{i:02}.txt").rename(tmp_path / f"{i:02}.txt") for i in range(6, 10)]
    experiment = tmp_path / "words.yaml"
    experiment.write_text(f"data: {{source: {texts}}}\n")
    config = load_config(experiment, TOY)

    def night(**changes: Any) -> flow.Night:
        settings = SETTINGS.model_copy(update={"memorised_percent": 100.0, "guard_percent": 100.0} | changes)
        done = flow.Night(config, home / "nightly" / "words", settings)
        flow.run_night(done, f"words-night-{len(done.ledger.nights) + 1}")
        return done

    assert "new-vocabulary" not in night(new_vocabulary=True).arms  # the first vocabulary is new anyway
    for path in later[:2]:
        texts.joinpath(path.name).write_text(path.read_text().replace("x", "ж"), encoding="utf-8")
    with monkeypatch.context() as patch:  # a verdict as it may fall, and here would not
        patch.setattr(flow, "choose", lambda _: "new-vocabulary")
        patch.setattr(flow, "judge", lambda _: Decision("promoted", "planted"))
        second = night(new_vocabulary=True)
    assert set(second.arms) == {"warm", "scratch", "new-vocabulary"}
    now, before = registry.champion("words"), registry.find("words/1")
    assert now is not None
    assert (now.version, now.facts["run"]) == ("2", "words-night-2/new-vocabulary")
    kept = read_json(registry.checkpoint_of(now) / "tokenizer.json")
    assert "ж" in json.dumps(kept, ensure_ascii=False)
    assert read_json(home / "data" / "vocabs" / now.facts["vocab"] / "tokenizer.json") == kept
    assert before.facts["vocab"] != now.facts["vocab"]
    for path in later[2:]:
        path.rename(texts / path.name)
    third = night(new_vocabulary=True)
    assert set(third.arms) == {"warm", "scratch"}  # the text has no letter that the champion lacks
    assert (home / "nightly" / "words" / "scores" / "words-night-1-scratch" / "night-3.npz").exists()


@pytest.mark.integration
def test_old_nights_go_and_what_is_needed_stays(mlflow_store: str, home: Path, prefect_server: None) -> None:
    """Retention that deletes a champion's checkpoint, or keeps everything for ever."""
    from gptloom.tasks.nightly import retire_nights
    from gptloom.tasks.records import registry

    nights = [{"run": f"words-{i}", "made": [f"shards-{i}"]} for i in range(4)]
    for i in range(4):
        (home / "runs" / f"words-{i}" / "arms" / "warm" / "checkpoints" / "step_1").mkdir(parents=True)
        (home / "data" / "shards" / f"shards-{i}").mkdir(parents=True)
    register_champion(mlflow_store, home)
    registry.open_client().set_model_version_tag("words", "1", "gptloom.run", "words-1/warm")
    settings = NightlySettings(keep_nights=1)
    retired = retire_nights("words", Ledger(nights=nights), settings, home)
    assert retired["nights"] == ["words-0", "words-2"]
    left = sorted(path.parent.parent.parent.name for path in (home / "runs").glob("*/arms/*/checkpoints"))
    assert left == ["words-1", "words-3"]  # the champion's, and last night's
    assert [path.name for path in (home / "data" / "shards").iterdir()] == ["shards-3"]
    registry.open_client().delete_registered_model_alias("words", "champion")
    nights = [night | {"retired": night["run"] in retired["nights"]} for night in nights]
    assert retire_nights("words", Ledger(nights=nights), settings, home)["nights"] == ["words-1"], "needed no more"
    assert not (home / "runs" / "words-1" / "arms" / "warm" / "checkpoints").exists()


# --- whole nights ------------------------------------------------------------------------------------------------------------

TOY = [
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "train.device=cpu",
    "train.max_steps=50",
    "train.global_batch_size=16",
    "train.warmup_steps=5",
    "train.eval_tokens=512",
    "evaluate.bootstrap=0",
    "data.val_fraction=0.15",
    "data.section_bytes=1024",
]


def prose(folder: Path, documents: int = 24, size: int = 12_000) -> Path:
    """English that every Python brings along: the docstrings of its library, in files of `size` characters."""
    sources = (path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py")))
    found = (text for source in sources for text in re.findall(r'"""(.{80,}?)"""', source, re.DOTALL) if text.isascii())
    text = "\n\n".join(islice(found, 2000))
    assert len(text) >= documents * size, len(text)
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number:02}.txt").write_text(text[number * size : (number + 1) * size], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Seven nights by the real command, in a new home: (home, its JSON, stderr)."""
    folder = tmp_path_factory.mktemp("nights")
    command = [
        sys.executable,
        "-m",
        "gptloom.flows.command.cli",
        "nightly",
        "--simulate",
        "7",
        f"data.source={prose(folder / 'texts')}",
        *TOY,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=users_environment(folder / "home"), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "home", json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.integration
def test_simulated_nights_end_as_their_data_says(simulated: tuple[Path, dict[str, Any], str]) -> None:
    """Whatever was planted, the outcome must come from the text: copies skipped, shuffled letters refused, better models promoted."""
    _, result, err = simulated
    nights = result["nights"]
    assert [night["night"] for night in nights] == list(range(1, 8)), err[-2000:]
    by_plan = {night["planted"]: night for night in reversed(nights)}
    assert nights[0]["outcome"] == "promoted", nights[0]
    assert nights[1]["outcome"] == "promoted", nights[1]  # twice the training, on more text
    assert by_plan["duplicates"]["outcome"] == "skipped"
    assert by_plan["corrupted"]["outcome"] == "refused"
    assert "unreadable text" in by_plan["corrupted"]["reason"]
    assert by_plan["another author"]["outcome"] in ("promoted", "kept", "refused")
    assert "unreadable" not in by_plan["another author"]["reason"]
    for before, now in pairwise(nights):
        moved = now["champion"] != before["champion"]
        assert moved == (now["outcome"] == "promoted"), now
    assert result["rollback"]["seconds"] < 60


@pytest.mark.integration
def test_simulated_nights_leave_a_ledger_and_reports(simulated: tuple[Path, dict[str, Any], str]) -> None:
    _, result, _ = simulated
    folder = Path(result["ledger"]).parent
    ledger = Ledger.load(folder)
    refused = [generation for generation in ledger.generations if not generation.is_accepted]
    assert [generation.name for generation in refused] == ["night-4"]
    assert Path(result["ledger"]).read_bytes().startswith(b"\x89PNG")
    page = Path(result["report"]).read_text()
    assert "Drift ledger" in page
    assert "Nights so far" in page
    assert len(list((folder / "reports").glob("*.html"))) == 7
    first = folder / "scores" / ledger.models[0].key.replace("/", "-")
    # An earlier champion on tonight's text is a row of the ledger: without it nobody tells drift from regression.
    assert (first / "night-7.npz").exists() or ledger.nights[-1]["outcome"] == "skipped"


@pytest.mark.integration
def test_rollback_and_registry_after_the_nights(simulated: tuple[Path, dict[str, Any], str]) -> None:
    from mlflow import MlflowClient

    home, result, _ = simulated
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    model = client.get_registered_model("nights-simulated")
    assert str(model.aliases["champion"]) == result["rollback"]["to"]
    version = client.get_model_version("nights-simulated", model.aliases["champion"])
    assert client.get_run(version.run_id).info.status == "FINISHED"
    assert "bits per byte" in version.description or "promoted" in version.description
