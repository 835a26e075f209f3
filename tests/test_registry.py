"""The model registry on a real SQLite store: aliases, the way back, and what is said when something is gone.

.venv/bin/pytest tests/test_registry.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from prefect.logging import disable_run_logger

from gptcore.checkpoint import Snapshot, load_model, save_checkpoint
from gptcore.config import UserError, check_config
from gptcore.models import build_model
from gptcore.store import home_dir, verified
from gptcore.vocab import CharVocab
from gptloom.tasks.records import registry

pytestmark = pytest.mark.integration


class Store:
    """Registers toy models as if runs had made them."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.client, self.folder, self.count = MlflowClient(tracking_uri=uri), folder, 0
        self.experiment = self.client.create_experiment("toy", artifact_location=(folder / "artifacts").as_uri())

    def register(self) -> registry.Version:
        self.count += 1
        run = self.client.create_run(self.experiment, run_name=f"toy-{self.count}").info.run_id
        facts = {"run": f"toy-{self.count}", "val_bpb": 3.0 - 0.1 * self.count}
        with disable_run_logger():
            return registry.register("toy", self.checkpoint(self.folder / str(self.count)), run, facts, "# toy\n")

    def checkpoint(self, folder: Path) -> Path:
        torch.manual_seed(self.count)
        vocab = CharVocab(["a", "b", "c", " "])
        config = check_config({"model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}})
        state = {"vocab_size": vocab.size, "vocab_fingerprint": vocab.fingerprint, "tokens_seen": 1}
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(json.dumps(vocab.to_json()))
        model = build_model(config.model, vocab.size)
        return save_checkpoint(folder, Snapshot(1, model.weights(), {}, state, config, folder / "tokenizer.json"))


@pytest.fixture
def store(mlflow_store: str, tmp_path: Path) -> Store:
    return Store(mlflow_store, tmp_path)


def test_promote_and_roll_back(store: Store) -> None:
    """A rollback that forgets the order, or that can be undone by nothing, leaves the wrong model in use."""
    for _ in range(3):
        store.register()
        registry.promote("toy")
    assert registry.champions("toy") == ["1", "2", "3"]
    assert [v.version for v in registry.rollback("toy", "worse")] == ["2", "3"]
    assert [v.version for v in registry.rollback("toy")] == ["1", "2"]
    with pytest.raises(UserError, match="no champion before it; promote another"):
        registry.rollback("toy")
    assert registry.champion("toy").version == "1"
    assert registry.promote("toy/3")[0].version == "3"  # forward again
    assert [v.version for v in registry.rollback("toy")] == ["1", "3"]
    rolled = store.client.get_model_version("toy", "3")
    assert "worse" in rolled.tags["gptloom.rolled_back"] or "on request" in rolled.tags["gptloom.rolled_back"]


def test_everything_a_model_is_called(store: Store) -> None:
    made = store.register()
    registry.promote("toy@challenger")
    for name in ("toy", "toy@champion", "toy/1", "toy-1", made.run_id):
        assert registry.find(name).label == "toy/1", name


def test_registered_model_needs_nothing_else(store: Store) -> None:
    """Without the tokenizer among its files, or with a pickle, a registered model is of no use elsewhere."""
    import mlflow

    made = store.register()
    shutil.rmtree(made.facts["checkpoint"])
    kept = registry.checkpoint_of(made)
    assert (kept / "tokenizer.json").is_file()
    assert registry.checkpoint_of(made) == kept
    (model,) = (store.folder / "artifacts").rglob("MLmodel")
    assert not list(model.parent.rglob("*.pkl"))
    loaded = mlflow.pyfunc.load_model(str(model.parent))
    first, again = (loaded.predict(["ab"], params={"max_new_tokens": 5, "seed": 3}) for _ in range(2))
    assert first == again
    assert first[0].startswith("ab")
    assert len(first[0]) > 2


def test_a_fetch_that_is_interrupted_leaves_no_torn_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker copied before the weights made half a model look whole for ever, and fit to be promoted."""
    made, copytree = store.register(), shutil.copytree
    shutil.rmtree(made.facts["checkpoint"])

    def die_early(source: Path, target: Path, **kwargs: Any) -> None:
        copytree(source, target, **kwargs)
        if (home_dir() / "registry") in Path(target).parents:
            (Path(target) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", die_early)
        with pytest.raises(KeyboardInterrupt):
            registry.checkpoint_of(made)
    fetched = registry.checkpoint_of(made)
    assert verified(fetched)["files"].keys() >= {"model.safetensors", "tokenizer.json"}
    assert load_model(fetched)[1].state["step"] == 1


def damage(directory: Path, how: str) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(raw[:-1] if how == "cut" else raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_damaged_weights_are_taken_from_mlflow_or_refused(store: Store, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """A marker says that a checkpoint was whole once. The alias moves to weights that are whole now, or not at all."""
    first, second = store.register(), store.register()
    registry.promote("toy/1")
    registry.promote("toy/2")
    damage(Path(first.facts["checkpoint"]), how)
    with caplog.at_level("WARNING"):
        assert registry.rollback("toy")[0].version == "1"
    assert "model.safetensors" in caplog.text
    fetched = registry.checkpoint_of(first)
    assert fetched.is_relative_to(home_dir() / "registry")
    assert load_model(fetched)[1].state["step"] == 1
    damage(fetched, how)  # a copy is no better than what it was made of, and fetched once more
    assert verified(registry.checkpoint_of(first))
    damage(Path(second.facts["checkpoint"]), how)
    copies = [path for path in (store.folder / "artifacts").rglob("model.safetensors") if second.run_id in str(path)]
    assert copies, "MLflow has no copy of the weights"
    for path in copies:
        damage(path.parent, how)
    with pytest.raises(
        UserError, match=r"toy/2: its checkpoint is neither at .*model\.safetensors.* nor whole among the artifacts"
    ):
        registry.promote("toy/2")
    assert registry.champion("toy").version == "1"


def test_weights_of_another_version_are_not_promoted(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Two checkpoints that were exchanged are both whole."""
    made = [store.register(), store.register()]
    places = [Path(version.facts["checkpoint"]) for version in made]
    whole = verified(places[0])["files"]
    places[0].rename(store.folder / "aside")
    places[1].rename(places[0])
    with caplog.at_level("WARNING"):
        fetched = registry.checkpoint_of(made[0])
    assert "another checkpoint than was registered as toy/1" in caplog.text
    assert verified(fetched)["files"] == whole
    shutil.rmtree(store.folder / "artifacts")
    shutil.rmtree(fetched)
    with pytest.raises(UserError, match="another checkpoint than was registered as toy/1"):
        registry.promote("toy/1")
    assert registry.champion("toy") is None


@pytest.mark.parametrize("score", ["2,x", "nan", "inf"])
def test_the_alias_does_not_move_to_a_version_whose_score_is_damaged(store: Store, score: str) -> None:
    """Promote failed at its last line, with the champion changed."""
    store.register()
    registry.promote("toy")
    store.register()
    store.client.set_model_version_tag("toy", "2", "gptloom.val_bpb", score)
    with pytest.raises(UserError, match=r"toy/2: its tag gptloom\.val_bpb is damaged"):
        registry.promote("toy/2")
    assert registry.champions("toy") == [registry.champion("toy").version] == ["1"]


def test_what_is_gone_is_said_and_the_champion_stays(store: Store) -> None:
    with pytest.raises(UserError, match=r"registry is empty.*gptloom run"):
        registry.promote("toy")
    first, second = store.register(), store.register()
    registry.promote("toy/1")
    with pytest.raises(UserError, match="no version 7; its versions: 2, 1"):
        registry.promote("toy/7")
    with pytest.raises(UserError, match="no alias 'best'"):
        registry.promote("toy@best")
    store.client.delete_run(second.run_id)
    with pytest.raises(UserError, match=rf"toy/2.*was deleted.*restore --run-id {second.run_id}"):
        registry.promote("toy")
    shutil.rmtree(first.facts["checkpoint"])
    shutil.rmtree(store.folder / "artifacts")
    with pytest.raises(UserError, match=r"toy/1: its checkpoint is neither at .*gptloom rollback toy"):
        registry.check_usable(registry.champion("toy"))
    assert registry.champion("toy").version == "1"


def test_rollback_passes_over_a_champion_that_is_gone(store: Store) -> None:
    """The version before may be unusable itself; then the one before that is the way back."""
    made = []
    for _ in range(3):
        made.append(store.register())
        registry.promote("toy")
    store.client.delete_run(made[1].run_id)
    assert [v.version for v in registry.rollback("toy")] == ["1", "3"]


def test_a_champion_that_cannot_be_read_is_not_one_that_never_was(store: Store) -> None:
    """A night would promote its model without comparison."""
    assert registry.champion("toy") is None
    store.register()
    registry.promote("toy")
    store.client.set_registered_model_tag("toy", registry.CHAMPIONS_TAG, '["1"')
    for read in (registry.champion, registry.champions, registry.rollback):
        with pytest.raises(UserError, match=r"model 'toy'.*gptloom\.champions is damaged"):
            read("toy")
    store.client.set_registered_model_tag("toy", registry.CHAMPIONS_TAG, '["1"]')
    store.register()
    store.client.delete_model_version("toy", "1")
    with pytest.raises(UserError, match=r"its champion is gone.*versions 1.*gptloom promote toy/VERSION"):
        registry.champion("toy")
    assert registry.promote("toy/2")[1] is None
    assert registry.champion("toy").version == "2"


def test_names_with_quotes(store: Store) -> None:
    for name in ("it's", 'a "toy"', 'it\'s "one"'):
        with pytest.raises(UserError, match="registry is empty"):
            registry.promote(name)
    store.client.create_registered_model("it's")
    assert registry.versions("it's") == []
