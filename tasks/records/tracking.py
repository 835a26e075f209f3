"""MLflow: find the store, check it, ask it for runs and change them. With forwarding.py the only files that import mlflow.

from gptloom.tasks.records.tracking import check_store, open_client
check_store()      # UserError with the remedy
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.config import UserError, hide_password
from gptcore.errors import first_line
from gptcore.locks import held_beside, is_held
from gptcore.store import home_dir, make_home, read_json
from gptloom.tasks.records.login import MLFLOW_VARIABLES, SERVER_VARIABLE, find_login, mlflow_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS_FILE, UP_LOCK = "servers.json", "servers/up.lock"  # below GPTLOOM_HOME
MAKING_S = 120.0  # to make all tables, on a slow disk
RUN_TAG = "gptloom.run"
REASON_TAG = "gptloom.reason"
NOTE_TAG = "mlflow.note.content"  # what MLflow's pages show as a description
EXPERIMENT_NOTE = (
    "Runs of the experiment `{name}`. The x-axis that charts call *Step* is **tokens seen**. `bpb`, bits per byte of held-out text, is "
    "the headline, and fewer is better: it compares models of any vocabulary. Each run has one nested run a step; its name ends as "
    "that of the run. `train`, `rnn` and `floor` saw equally many tokens."
)

log = logging.getLogger("gptloom.tracking")


def read_servers() -> dict[str, Any]:
    """What `gptloom up` wrote about the servers it runs (prefect_api_url, mlflow_url, pid); empty without them.

    Believed only while `up` holds its lock: of one that was killed the file stays, and something else may listen on its ports by now.
    """
    path = home_dir() / SERVERS_FILE
    if not path.exists() or not is_held(home_dir() / UP_LOCK):
        return {}
    try:
        return read_json(path)
    except UserError as error:
        log.warning("%s; `gptloom down`, then `gptloom up`, writes it anew", error)
        return {}


def answers(url: str, timeout_s: float = 3.0) -> bool:
    """Does a server reply at this URL?"""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            return 200 <= reply.status < 300
    except (OSError, ValueError, urllib.error.URLError):
        return False


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, else the server of `gptloom up` if it answers, else SQLite under GPTLOOM_HOME."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    server = read_servers().get("mlflow_url")
    if server and answers(f"{server}/health"):
        return str(server)
    return mlflow_database(home_dir())


def sqlite_url(path: Path, scheme: str = "sqlite") -> str:
    """SQLAlchemy's URL of a database file (absolute), whatever letters its path holds."""
    return f"{scheme}:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def mlflow_database(home: Path) -> str:
    """The URL of MLflow's database in a home."""
    path = home / "mlflow.db"
    url = sqlite_url(path)
    # MLflow makes the folder that a sqlite:/// names, letter by letter; with another scheme it makes none.
    return url if url.endswith(str(path)) else sqlite_url(path, "sqlite+pysqlite")


def check_store(uri: str | None = None) -> str:
    """Make sure that MLflow can be written to, before any work is done; returns its URI.

    Raises UserError within seconds when a server does not answer or a database cannot be opened.
    """
    uri = uri or tracking_uri()
    is_ours = uri == mlflow_database(home_dir())
    if is_ours:
        make_home()
    try:
        # Its tables are made at the first use; of two processes that make them, one fails.
        with held_beside(home_dir() / "mlflow.db", MAKING_S) if is_ours else nullcontext():
            connect(uri).search_experiments(max_results=1)
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI={hide_password(uri)}: needs {error.name}, which is not installed; for PostgreSQL: pip install 'gptloom[postgres]'"
        ) from None
    except Exception as error:
        if is_store_trouble(error) and getattr(error, "error_code", "") == "UNAUTHENTICATED":
            variable = SERVER_VARIABLE if uri == read_servers().get("mlflow_url") else " and ".join(MLFLOW_VARIABLES)
            raise UserError(
                f"MLflow at {hide_password(uri)} refuses this login; set {variable} as that server was told"
            ) from None
        raise UserError(
            f"MLflow at {hide_password(uri)} does not answer ({hide_password(first_line(error))}); start that server, or correct or unset MLFLOW_TRACKING_URI "
            "(without it records go to a local SQLite file)"
        ) from None
    return uri


def open_client() -> MlflowClient:
    """A client of the store; its calls raise MLflow's own errors, after seconds."""
    return connect(tracking_uri())


def is_answer(error: BaseException) -> bool:
    """Did MLflow answer that there is no such thing, or that nothing can be called so?"""
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def quoted(value: str) -> str:
    """A value for a filter of MLflow, whose language knows no escape. Raises UserError for one that holds both quotes."""
    if "'" in value and '"' in value:
        raise UserError(f"{value!r}: MLflow cannot look for a name with both kinds of quotes; take one out")
    return f'"{value}"' if "'" in value else f"'{value}'"


def is_store_trouble(error: BaseException) -> bool:
    """Did MLflow, or the way to it, fail, and not our own code?"""
    from mlflow.exceptions import MlflowException

    return isinstance(error, (MlflowException, OSError))


def save_servable(directory: Path, checkpoint: Path, code: Path, requirements: list[str]) -> None:
    """Write `directory` as an MLflow model that runs `code` on `checkpoint` (models from code: nothing is pickled)."""
    import mlflow.pyfunc
    from mlflow.models import infer_signature

    # They warn about what is on purpose here.
    for name in ("mlflow.models.model", "mlflow.pyfunc", "mlflow.utils.requirements_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parameters = {"max_new_tokens": 200, "temperature": 0.8, "seed": 0}
    # Recorded, not shown: MLflow puts a filter of its own before any of ours.
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            path=str(directory),
            python_model=str(code),
            artifacts={"checkpoint": str(checkpoint)},
            pip_requirements=requirements,
            signature=infer_signature(["To be"], ["To be, or not"], parameters),
        )
    for path in directory.rglob("*"):  # MLflow copies the code with the mode it has in the repository: readable by all
        path.chmod(path.stat().st_mode & ~0o007)


def find_run(experiment: str, run: str) -> str | None:
    """MLflow's id of the run with this name in an experiment; None while MLflow has none."""
    client = open_client()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs([found.experiment_id], f"tags.`{RUN_TAG}` = {quoted(run)}", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def run_page(run_id: str | None) -> str | None:
    """The run's page in MLflow's UI; None where MLflow is no server, or has no such run."""
    uri = tracking_uri()
    if run_id is None or not uri.startswith(("http://", "https://")):
        return None
    try:
        experiment = connect(uri).get_run(run_id).info.experiment_id
    except Exception as error:  # a link is no reason to fail
        log.warning("no link to MLflow: %s", first_line(error))
        return None
    return f"{hide_password(uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def keep_files(experiment: str, run: str, files: Sequence[Path]) -> None:
    """Add files to a run that is over: what could only be written after it."""
    run_id = find_run(experiment, run)
    for file in files if run_id else []:
        open_client().log_artifact(run_id, str(file))


def delete_runs(experiment: str, run: str) -> None:
    """Delete a run and the runs nested in it, as the UI does: `mlflow gc` removes their files, `mlflow runs restore` brings them back."""
    client, parent = open_client(), find_run(experiment, run)
    if parent is None:
        return
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    for child in client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        client.delete_run(child.info.run_id)
    client.delete_run(parent)


def common_tags() -> dict[str, str]:
    """Tags of every run: who, where, which code, which Prefect flow run."""
    from prefect.runtime import flow_run

    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "gptloom",
        "gptloom.host": socket.gethostname(),
        "gptloom.version": _version(),
    }
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    if flow_run_id := flow_run.get_id():
        tags["prefect.flow_run_id"] = str(flow_run_id)
    return tags


def running_runs() -> list[dict[str, str]]:
    """Runs that MLflow believes under way: {"id", "run", "flow_run_id" (empty: none)}. Raises what MLflow raises."""
    client = connect(tracking_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[dict[str, str]] = []
    token = None
    while experiments:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000, page_token=token)
        for run in page:
            if RUN_TAG in run.data.tags:
                tags = run.data.tags
                found.append({"id": run.info.run_id, "run": tags[RUN_TAG], "flow_run_id": tags.get("prefect.flow_run_id", "")})
        token = page.token
        if not token:
            break
    return found


def end_run(run_id: str, status: str, reason: str) -> None:
    """Close a run of which only MLflow is left. reason: empty where there is nothing to explain."""
    client = connect(tracking_uri())
    if reason:
        client.set_tag(run_id, REASON_TAG, reason)
    client.set_terminated(run_id, status)


def connect(uri: str) -> MlflowClient:
    """A client that gives up after seconds (MLflow's own default is four minutes per call) and sends no telemetry. The server of
    `gptloom up` is told the home's login, any other what the environment says."""
    if uri == read_servers().get("mlflow_url") and (login := find_login()):
        os.environ.update(mlflow_environment(login))
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # table by table, while a new database is made
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages of SQL before the error that we explain
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def find_experiment(client: MlflowClient, name: str) -> str:
    """The experiment of that name; made if need be, in a local store with its artifacts under GPTLOOM_HOME.

    The explicit location lets a client on the SQLite file and the local server read the same files.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        uri = client.tracking_uri
        is_ours = not uri.startswith(("http://", "https://", "databricks")) or uri == read_servers().get("mlflow_url")
        location = (home_dir() / "mlartifacts" / name).as_uri() if is_ours else None
        try:
            note = {NOTE_TAG: EXPERIMENT_NOTE.format(name=name)}
            return str(client.create_experiment(name, artifact_location=location, tags=note))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
            assert experiment is not None, name
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _git_commit() -> str:
    """Commit of this code, with `-dirty` for changed files; empty outside a repository."""
    code = Path(__file__).parent
    command = ["git", "-C", str(code), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5)
        if tracked.returncode:
            return ""  # an installed copy inside some other project's repository
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in some containers
        return str(os.getuid())


def _version() -> str:
    try:
        return version("gptloom")
    except PackageNotFoundError:
        return "source"
