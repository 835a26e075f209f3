"""The model registry: which trained model is in use, which one waits, and the way back. Records are MLflow's.

    version = register("shakespeare", checkpoint, mlflow_run_id, facts, card)    # becomes `challenger`
    promote("shakespeare")                                                # challenger → champion
    rollback("shakespeare")                                               # the champion before it

A registered model has the experiment's name. Its alias `champion` is the model in use, `challenger` the newest one. The
champions so far stand, oldest first, in the registered model's tag `gptloom.champions`: that is what a rollback reads.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptcore.config import UserError, hide_password
from gptcore.errors import first_line
from gptcore.markdown import markdown_table
from gptcore.store import MANIFEST, MARKER, DamagedError, commit_dir, content_id, home_dir, is_committed, verified
from gptloom.tasks.records.tracking import is_answer, open_client, quoted, save_servable, tracking_uri

log = logging.getLogger("gptloom.registry")

CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPIONS_TAG = "gptloom.champions"
FILES_FACT = "checkpoint_files"  # stands for the hashes of all its files; earlier versions have none
CODE = Path(__file__).with_name("servable.py")
REQUIREMENTS = ["gptloom"]  # it pins the rest


@dataclass(frozen=True)
class Version:
    """One version of a registered model. `facts` are its tags without the prefix `gptloom.`."""

    name: str
    version: str
    run_id: str
    facts: dict[str, str]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def val_bpb(self) -> float:
        """Bits per byte on the validation split of its own training, as registered. Raises UserError where that is no finite number."""
        try:
            value = float(self.facts["val_bpb"])
        except (LookupError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(
                f"model {self.label}: its tag gptloom.val_bpb is damaged ({self.facts.get('val_bpb')!r}); set it in MLflow"
            )
        return value


# --- write -------------------------------------------------------------------------------------------------------------


def register(name: str, checkpoint: Path, mlflow_run_id: str, facts: Mapping[str, Any], card: str) -> Version:
    """A new version of model `name` from a committed checkpoint of an MLflow run; it becomes the challenger.

    facts: what a reader needs to know or to find (run, corpus, vocab, shards, val_bpb, …), kept as tags. card: Markdown,
    the version's description. Raises UserError when the checkpoint is not whole.
    """
    files = verified(checkpoint)["files"]
    client = open_client()
    if _registered(name) is None:
        client.create_registered_model(name, description=f"Language models trained by the experiment `{name}`.")
    run = client.get_run(mlflow_run_id)
    with tempfile.TemporaryDirectory(prefix="gptloom-model-") as folder:
        bare = Path(folder) / checkpoint.name
        shutil.copytree(checkpoint, bare)
        save_servable(Path(folder) / "model", bare, CODE, REQUIREMENTS)
        (Path(folder) / "model" / "card.md").write_text(card, encoding="utf-8")
        client.log_artifacts(mlflow_run_id, str(Path(folder) / "model"), "model")
    tags = {
        f"gptloom.{key}": str(value)
        for key, value in {**facts, "checkpoint": checkpoint, FILES_FACT: content_id(files)}.items()
    }
    made = client.create_model_version(name, f"{run.info.artifact_uri}/model", mlflow_run_id, tags=tags, description=card)
    client.set_registered_model_alias(name, CHALLENGER, made.version)
    return _read(made)


def promote(what: str, reason: str = "on request") -> tuple[Version, Version | None]:
    """Make a version the champion: (it, the champion before). `what`: NAME (its challenger), NAME@ALIAS, NAME/VERSION, or a run.

    The alias moves in one step, after everything that can be wrong with the version has been looked at. Raises UserError.
    """
    version = find(what, CHALLENGER)
    check_usable(version)
    try:
        before = champion(version.name)
    except UserError:  # gone: this is the way out
        before = None
    history = [v for v in champions(version.name) if v != version.version]
    client = open_client()
    client.set_model_version_tag(version.name, version.version, "gptloom.promoted", f"{_now()}: {reason}"[:5000])
    client.set_registered_model_tag(version.name, CHAMPIONS_TAG, json.dumps([*history, version.version]))
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return version, before


def rollback(name: str, reason: str = "on request") -> tuple[Version, Version]:
    """Give the alias back to the newest earlier champion that still can be used: (it, the one that was replaced).

    Raises UserError, with the alias untouched, when there is no champion or none before it.
    """
    _require_model(name)
    now = champion(name)
    if now is None:
        raise UserError(f"model {name!r} has no champion to roll back from; `gptloom promote {name}` makes one")
    history = champions(name)
    earlier = history[: history.index(now.version)] if now.version in history else history
    client, troubles = open_client(), []
    for number in reversed(earlier):
        try:
            version = find(f"{name}/{number}")
            check_usable(version)
        except UserError as error:
            troubles.append(str(error).partition(";")[0])
            continue
        client.set_model_version_tag(name, now.version, "gptloom.rolled_back", f"{_now()}: {reason}"[:5000])
        client.set_registered_model_alias(name, CHAMPION, number)
        client.set_registered_model_tag(
            name, CHAMPIONS_TAG, json.dumps([v for v in history if v in earlier[: earlier.index(number) + 1]])
        )
        return version, now
    why = f" that can be used ({'; '.join(troubles)})" if troubles else ""
    raise UserError(
        f"model {name!r}: version {now.version} has no champion before it{why}; promote another version with "
        f"`gptloom promote {name}/VERSION`"
    )


def delete_version(version: Version) -> None:
    """Take a version out of the registry; its run stays."""
    open_client().delete_model_version(version.name, version.version)


def forget_model(name: str) -> None:
    """Delete a registered model with all versions (their runs stay); for simulations, which start from nothing."""
    if _registered(name) is not None:
        open_client().delete_registered_model(name)


# --- read --------------------------------------------------------------------------------------------------------------


def champion(name: str) -> Version | None:
    """The model in use; None where there never was one. Raises UserError where there was, and what it was cannot be read any more."""
    model = _registered(name)
    before = _history(model) if model else []
    found = _aliased(name, CHAMPION)
    if found is None and before:
        raise UserError(
            f"model {name!r}: its champion is gone (champions so far: versions {', '.join(before)}); `gptloom promote {name}/VERSION` names "
            "another one"
        )
    return found


def challenger(name: str) -> Version | None:
    return _aliased(name, CHALLENGER)


def champions(name: str) -> list[str]:
    """Version numbers of the champions so far, oldest first. Raises UserError when the tag that lists them is damaged."""
    model = _registered(name)
    return _history(model) if model else []


def protected_versions(name: str) -> list[Version]:
    """Versions that an alias or a rollback may need: champion, challenger, and the champions before."""
    model = _registered(name)
    if model is None:
        return []
    wanted = {str(v) for v in model.aliases.values()} | set(champions(name))
    return [version for version in versions(name) if version.version in wanted]


def versions(name: str) -> list[Version]:
    """All versions, newest first."""
    found = open_client().search_model_versions(f"name={quoted(name)}")
    return sorted(map(_read, found), key=lambda version: -int(version.version))


def find(what: str, alias: str = CHAMPION) -> Version:
    """NAME (with `alias`), NAME@ALIAS, NAME/VERSION, the name of a run, or its id in MLflow. Raises UserError that names what there is."""
    name, _, wanted = what.partition("@")
    if wanted:
        model = _require_model(name)
        return _aliased(name, wanted) or _no_alias(name, wanted, model)
    name, _, number = what.partition("/")
    if number.isdigit():
        _require_model(name)
        match = [version for version in versions(name) if version.version == number]
        if not match:
            known = ", ".join(version.version for version in versions(name)) or "none"
            raise UserError(f"model {name!r} has no version {number}; its versions: {known}")
        return match[0]
    if model := _registered(what):
        return _aliased(what, alias) or _no_alias(what, alias, model)
    of_run = [found for found in open_client().search_model_versions() if what in (found.run_id, found.tags.get("gptloom.run"))]
    if of_run:
        return _read(of_run[0])
    _require_model(what)
    raise AssertionError("unreachable: _require_model raised")


def check_usable(version: Version) -> None:
    """Raises UserError when the run behind a version is deleted, its weights are nowhere whole, or its score is no number."""
    client = open_client()
    try:
        stage = client.get_run(version.run_id).info.lifecycle_stage
    except Exception as error:
        raise UserError(
            f"model {version.label}: its run {version.run_id} is not in MLflow ({first_line(error)}); {_way_out(version)}"
        ) from None
    if stage == "deleted":
        raise UserError(
            f"model {version.label}: its run {version.run_id} was deleted; bring it back with `MLFLOW_TRACKING_URI={hide_password(tracking_uri())} "
            f"mlflow runs restore --run-id {version.run_id}`, or {_way_out(version)}"
        )
    checkpoint_of(version)
    assert math.isfinite(version.val_bpb), "or it has raised"  # whoever tells of the change reads it when the alias has moved


def checkpoint_of(version: Version) -> Path:
    """The version's checkpoint directory on this machine, every byte verified; fetched from MLflow where it is missing or damaged.

    Raises UserError, which names what is damaged.
    """
    fetched = home_dir() / "registry" / f"{version.name}-{version.version}-{version.run_id[:8]}"
    stated = version.facts.get("checkpoint", "")
    troubles = []
    for place in ([Path(stated)] if stated else []) + [fetched]:
        try:
            if not is_committed(place):
                continue
            _check_same(version, place, verified(place))
        except (DamagedError, OSError) as error:
            # Ours is written over below, and what cannot be read may be whole.
            if isinstance(error, OSError) and place == fetched:
                raise
            troubles.append(str(error).partition(";")[0])
        else:
            return place
    for trouble in troubles:
        log.warning("model %s: %s; MLflow's copy is taken", version.label, trouble)
    try:
        _fetch(version, fetched)
    except Exception as error:
        why = f" ({'; '.join(troubles)})" if troubles else ""
        raise UserError(
            f"model {version.label}: its checkpoint is neither at {stated}{why} nor whole among the artifacts of run "
            f"{version.run_id} ({first_line(error).partition(';')[0]}); {_way_out(version)}"
        ) from None
    return fetched


def _check_same(version: Version, place: Path, manifest: Mapping[str, Any]) -> None:
    """Raises DamagedError for a checkpoint that is whole, but another than was registered."""
    if version.facts.get(FILES_FACT, stands_for := content_id(manifest["files"])) != stands_for:
        raise DamagedError(f"{place}: another checkpoint than was registered as {version.label}")


def _fetch(version: Version, place: Path) -> None:
    """Commit MLflow's copy of a version's checkpoint as `place`, instead of what is there."""
    with tempfile.TemporaryDirectory(prefix="gptloom-model-") as folder:
        found = Path(open_client().download_artifacts(version.run_id, "model/artifacts", folder))
        whole = next(found.rglob(MANIFEST)).parent
        manifest = verified(whole)
        _check_same(version, whole, manifest)
        shutil.rmtree(place, ignore_errors=True)
        with commit_dir(place, manifest) as tmp:
            # Its marker stays behind: a copy has one of its own, once it is whole.
            shutil.copytree(whole, tmp, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, MARKER))


def model_card(title: str, rows: Mapping[str, Any], text: str = "") -> str:
    """Markdown: a title, a sentence or two, a table of facts."""
    shown = [(key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in rows.items()]
    return f"# {title}\n\n{text}\n\n{markdown_table(shown, ['', ''])}\n"


def _registered(name: str) -> Any:
    """MLflow's registered model; None where there is none of that name, or where none can be called so."""
    try:
        return open_client().get_registered_model(name)
    except Exception as error:
        if is_answer(error):
            return None
        raise


def _history(model: Any) -> list[str]:
    text = model.tags.get(CHAMPIONS_TAG, "[]")
    try:
        numbers = json.loads(text)
    except (ValueError, RecursionError):
        numbers = None
    if not isinstance(numbers, list) or not all(str(number).isdigit() for number in numbers):
        raise UserError(
            f"model {model.name!r}: its tag {CHAMPIONS_TAG} is damaged ({text[:80]!r}); set it in MLflow to the versions that were champion, "
            'oldest first, as in ["1", "3"]'
        )
    return [str(number) for number in numbers]


def _require_model(name: str) -> Any:
    model = _registered(name)
    if model is not None:
        return model
    known = sorted(found.name for found in open_client().search_registered_models())
    told = f"registered models: {', '.join(known)}" if known else "the registry is empty"
    raise UserError(f"no model or run {name!r} in the registry ({told}); a finished `gptloom run` registers one")


def _aliased(name: str, alias: str) -> Version | None:
    """The version that has an alias; None where none has. Raises UserError for an alias of a version that was deleted."""
    model = _registered(name)
    number = (model.aliases if model else {}).get(alias)
    if not number:
        return None
    try:
        return _read(open_client().get_model_version(name, number))
    except Exception as error:
        if not is_answer(error):
            raise
        raise UserError(
            f"model {name!r}: its alias {alias!r} names version {number}, which is not there any more; "
            f"`gptloom promote {name}/VERSION` gives the model another champion"
        ) from None


def _no_alias(name: str, alias: str, model: Any) -> Version:
    known = ", ".join(f"{key} → {value}" for key, value in sorted(model.aliases.items())) or "none"
    raise UserError(f"model {name!r} has no alias {alias!r} (aliases: {known}); name a version, as in {name}/1")


def _read(found: Any) -> Version:
    facts = {key.removeprefix("gptloom."): value for key, value in found.tags.items() if key.startswith("gptloom.")}
    return Version(found.name, str(found.version), found.run_id, facts)


def _way_out(version: Version) -> str:
    return f"`gptloom rollback {version.name}` or `gptloom promote {version.name}/VERSION` takes another version"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
