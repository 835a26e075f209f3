"""`gptloom doctor`: one line a check, ok, warn or fail, each with its remedy. It changes nothing and needs no server.

The last line on stdout is JSON: {"checks": [{"name", "status", "message", "remedy"}], "ok"}; exit code 2 when a check fails.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import psutil

from gptcore.config import UserError, hide_password, load_written
from gptcore.errors import describe_error, is_of_surroundings
from gptcore.journal import FILE_NAME, TAGS_FILE, describe_damage
from gptcore.leftovers import find_leftovers
from gptcore.nights.ledger import Ledger
from gptcore.store import MARKER, DamagedError, is_committed, read_json, read_manifest, verified
from gptloom import PACKAGE
from gptloom.tasks.records.login import FILE_NAME as LOGIN_FILE
from gptloom.tasks.records.runs import SETTINGS, is_run
from gptloom.tasks.records.tracking import SERVERS_FILE, answers, read_servers
from gptloom.tasks.runtime.liveness import ProcessSnapshot, device_locks, is_dead, unfinished_run

OK, WARN, FAIL = "ok", "warn", "fail"
LITTLE_GIB, FULL_GIB = 10.0, 1.0  # free disk: below the first a warning, below the second a failure
CHECKED_BYTES = 1 << 26  # without --full: indexes of larger databases are not checked; about three seconds
HASHED_BYTES = 1 << 30  # without --full: so much is hashed, newest first; about two seconds
# Downloads and a family's ledger are kept in another way.
COMMITTED_KINDS = ("corpora", "segments", "vocabs", "tokens", "shards", "checkpoints")
PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")


@dataclass(frozen=True)
class Check:
    """What was looked at and how it is. `remedy` is empty where all is well."""

    name: str
    status: str
    message: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.status:<5} {self.name}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")


def examine(home: Path, *, full: bool = False) -> Iterator[Check]:
    """All checks, in the order in which a beginner would ask. One that breaks is a failed check and does not stop the rest."""
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", check_python),
        ("packages", lambda: check_packages(PACKAGE / "constraints.txt")),
        ("devices", check_devices),
        ("compiler", check_compiler),
        ("disk", lambda: check_disk(home)),
        ("permissions", lambda: check_permissions(home)),
        ("servers", lambda: check_servers(home)),
        ("stores", lambda: check_stores(home, full)),
        ("data", lambda: check_files("data", [home / "data"], full)),
        ("checkpoints", lambda: check_files("checkpoints", _others(home), full)),
        ("runs", lambda: check_runs(home)),
        ("records", lambda: check_records(home)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:
            if is_of_surroundings(error):
                yield _refused(name, error)
                continue
            yield Check(name, FAIL, f"could not be looked at ({type(error).__name__}: {error})", "this is a bug; report it")


# --- the machine -----------------------------------------------------------------------------------------------------


def check_python() -> Iterator[Check]:
    yield Check("python", OK, f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}")


def check_packages(constraints: Path) -> Iterator[Check]:
    """Installed packages against the pins; what the project asks for must be there within its bounds."""
    from packaging.requirements import Requirement

    reinstall = f"pip install -c {constraints} gptloom (in a checkout: make run)"
    try:
        wanted = [Requirement(text) for text in distribution("gptloom").requires or []]
    except PackageNotFoundError:
        wanted = []
        yield Check("packages", WARN, "gptloom itself is not installed, its bounds are not known", reinstall)
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found or 'missing'} (needs {requirement.specifier})")
    if wrong:
        yield Check("packages", FAIL, ", ".join(wrong), reinstall)
    pins = [match.groups() for match in map(PIN.fullmatch, constraints.read_text(encoding="utf-8").splitlines()) if match]
    found_pins = [(name, pin, found) for name, pin in pins if (found := _version(name)) is not None]
    # A build's local part (2.13.0+cpu) is no other version.
    other = [f"{name} {found} (pinned {pin})" for name, pin, found in found_pins if found.partition("+")[0] != pin]
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        yield Check("packages", WARN, ", ".join(other[:8]) + more, f"what is tested are the pins: {reinstall}")
    elif not wrong:
        yield Check("packages", OK, f"{len(found_pins)} packages as pinned")


def check_devices() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = psutil.virtual_memory().available / 2**30
    status, remedy = (WARN, "end other programs, or train a smaller model") if free < 1 else (OK, "")
    yield Check("cpu", status, f"{cores} cores, {free:.1f} GiB of memory free", remedy)
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            yield Check("gpu", OK, "none; training runs on the CPU")
        elif torch.version.cuda is None:
            yield Check("gpu", WARN, "a driver is here, but this torch is built for CPUs", "install torch's CUDA build")
        else:
            remedy = "compare nvidia-smi with torch.version.cuda"
            yield Check("gpu", WARN, "a driver is here, but torch finds no usable GPU", remedy)
    holders = device_locks()
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        free_bytes, all_bytes = torch.cuda.mem_get_info(number)
        memory = f"{free_bytes / 2**30:.1f} of {all_bytes / 2**30:.1f} GiB free"
        uuid = str(properties.uuid)
        holder = f", a training holds it (process {holders[uuid] or 'unknown'})" if uuid in holders else ""
        busy = free_bytes < all_bytes / 10 and not holder
        remedy = "nvidia-smi tells which process has its memory" if busy else ""
        yield Check(f"gpu {number}", WARN if busy else OK, f"{properties.name}, {memory}{holder}", remedy)


def check_compiler() -> Iterator[Check]:
    """What the trainer looks for before it compiles; on a GPU also the C compiler with which Triton builds its launchers."""
    from gptcore.device import choose_device
    from gptcore.train.trainer import missing_compiler

    device = choose_device()
    lacking, package = missing_compiler(device), "triton (pip)" if device.is_cuda else "g++ (apt-get)"
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not lacking and device.is_cuda and not any(map(shutil.which, names)):
        lacking, package = f"there is no C compiler here ({' or '.join(names)})", "gcc and libc6-dev (apt-get)"
    if lacking:
        remedy = f"install {package}, or set train.compile=off"
        yield Check("compiler", WARN, f"{lacking}; torch.compile cannot be used", remedy)
    else:
        yield Check("compiler", OK, f"torch.compile has what it needs on {device.name}")


def check_disk(home: Path) -> Iterator[Check]:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    status = FAIL if free < FULL_GIB else WARN if free < LITTLE_GIB else OK
    remedy = "" if status == OK else "free some, or point GPTLOOM_HOME at another disk"
    yield Check("disk", status, f"{free:.1f} GiB free for {home}", remedy)
    if not os.access(place, os.W_OK | os.X_OK):
        yield Check("disk", FAIL, f"{place} cannot be written to", "point GPTLOOM_HOME at a folder you can write to")


def check_permissions(home: Path) -> Iterator[Check]:
    """Others must not read texts, models and logs, much less replace a model."""
    if not home.exists():
        yield Check("permissions", OK, f"{home} is not there yet; it will be for you alone")
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    remedy = f"chmod o-rwx {home}"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield Check("permissions", FAIL, f"everyone may write to {home}", remedy)
    elif mode & stat.S_IRWXO:
        yield Check("permissions", WARN, f"everyone may look into {home}", remedy)
    elif hasattr(os, "getuid") and home.stat().st_uid not in (os.getuid(), 0):
        yield Check("permissions", WARN, f"{home} belongs to another user", "use a GPTLOOM_HOME of your own")
    else:
        yield Check("permissions", OK, f"{home} is closed to others")
    login = home / LOGIN_FILE
    if login.exists() and stat.S_IMODE(login.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        message = f"others may read {login}, and whoever does can run code as you"
        yield Check("permissions", FAIL, message, f"`gptloom down`, delete {login}; the next `gptloom up` makes another")


# --- servers and stores ------------------------------------------------------------------------------------------------


def check_servers(home: Path) -> Iterator[Check]:
    """What the environment or `gptloom up` names must answer; nothing named is well too."""
    ours = read_servers()
    for name, variable, key, instead in (
        ("prefect", "PREFECT_API_URL", "prefect_api_url", "a temporary one"),
        ("mlflow", "MLFLOW_TRACKING_URI", "mlflow_url", "a file"),
    ):
        url = os.environ.get(variable) or str(ours.get(key, ""))
        where = f"{variable}={hide_password(url)}" if os.environ.get(variable) else hide_password(url)
        if not url:
            yield Check(name, OK, f"no server is up; runs use {instead}")
        elif not url.startswith(("http://", "https://")):
            yield Check(name, OK, f"{where}: a database, no server")
        elif answers(f"{url}/health"):
            yield Check(name, OK, f"{where} answers")
        elif os.environ.get(variable):
            yield Check(name, FAIL, f"{where} does not answer", f"start that server, or unset {variable}")
        else:
            yield Check(name, FAIL, f"{where} does not answer, `gptloom up` says it is up", "`gptloom down`, then `gptloom up`")
    if not ours and (home / SERVERS_FILE).exists():
        yield Check("servers", WARN, "`gptloom up` was killed", "`gptloom down` tidies up, then `gptloom up`")


def check_stores(home: Path, full: bool) -> Iterator[Check]:
    """The servers' SQLite files, by their own check of every page and index (of pages alone where they are large), without writing."""
    for path in (*home.glob("*.db"), home / "prefect" / "prefect.db"):
        if not path.exists():
            continue
        name, size = path.stem, path.stat().st_size
        is_quick = size > CHECKED_BYTES and not full
        try:
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
                answer = str(database.execute(f"PRAGMA {'quick_check' if is_quick else 'integrity_check'}(1)").fetchone()[0])
        except sqlite3.Error as error:
            answer = str(error)
        if answer == "ok":
            how = " (its indexes: --full)" if is_quick else ""
            yield Check(f"{name} store", OK, f"{path} is whole, {size / 2**20:.1f} MiB{how}")
        else:
            remedy = f"`gptloom down`, move {path} away"
            if name == "mlflow":
                remedy += "; `gptloom sync` fills a new one from the journals, which hold all numbers"
            yield Check(f"{name} store", FAIL, f"{path}: {' '.join(answer.split())[:200]}", remedy)


# --- files ---------------------------------------------------------------------------------------------------------------


def check_files(name: str, tops: Iterable[Path], full: bool) -> Iterator[Check]:
    """Committed directories below `tops` against their manifests: all sizes, and hashes up to HASHED_BYTES, newest first.

    What may not be read is named, and hides nothing else.
    """
    refused: list[OSError] = []
    directories, left = _find_committed(tops, refused)
    budget = float("inf") if full else float(HASHED_BYTES)
    hashed, bad = 0, len(refused)
    for error in refused:
        yield _refused(name, error)
    for directory in sorted(directories, key=_changed, reverse=True):
        try:
            if not is_committed(directory):
                raise UserError(f"{directory}: was not committed (no {MARKER} in it); its maker was killed")
            size = sum(facts["bytes"] for facts in read_json(directory / "manifest.json")["files"].values())
            budget -= size
            (verified if budget >= 0 else read_manifest)(directory)
            hashed += budget >= 0
        except (UserError, KeyError, TypeError, AttributeError) as error:
            bad += 1
            remedy = f"delete {directory}; what can be made or fetched again is, training goes on from an older checkpoint"
            yield Check(name, FAIL, str(error).partition(";")[0], remedy)
        except OSError as error:
            bad += 1
            yield _refused(name, error)
    if left:
        message = f"{len(left)} half-written, left by killed processes: {left[0]}" + (" …" if len(left) > 1 else "")
        yield Check(name, WARN, message, "`gptloom reconcile --apply` deletes them, and so does the next build")
    if not bad:
        how = "every byte hashed" if hashed == len(directories) else f"all sizes, {hashed} hashed; --full reads the rest"
        yield Check(name, OK, f"{len(directories)} directories whole ({how})" if directories else "none yet")


def _find_committed(tops: Iterable[Path], refused: list[OSError]) -> tuple[list[Path], list[Path]]:
    """Directories that are committed or should be, and what killed builders left beside them; what cannot be entered goes to `refused`."""
    found, folders, seen = [], set(), set()
    for top in tops:
        for place, names, files in os.walk(top, onerror=refused.append, followlinks=True):
            path, real = Path(place), os.path.realpath(place)
            depth = len(path.relative_to(top).parts)  # a run may have the name of a kind
            should_be = path.parent.name in COMMITTED_KINDS and (depth == 2 if top.name == "data" else depth > 2)
            if MARKER in files or should_be:
                found.append(path)
                folders.add(path.parent)
            elif path.name == "checkpoints" or path.parent == top:
                folders.add(path)
            is_leaf = MARKER in files or should_be or real in seen  # a link may lead back to where it is
            names[:] = [] if is_leaf else [name for name in names if not name.startswith(".")]
            seen.add(real)
    return found, [path for folder in sorted(folders) for path in find_leftovers(folder)]


def _others(home: Path) -> list[Path]:
    """What a home holds besides its data: checkpoints are in runs, nights' arms and studies."""
    return sorted(path for path in home.glob("*/") if path.name != "data") if home.is_dir() else []


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # looked at below, and named there
        return 0.0


def _refused(name: str, error: BaseException) -> Check:
    problem, _, remedy = describe_error(error).partition("; ")
    return Check(name, FAIL, problem, remedy)


def check_runs(home: Path) -> Iterator[Check]:
    snapshot = ProcessSnapshot.take(home)
    runs, refused = [], False
    for directory in sorted((home / "runs").glob("*/")):
        try:
            if run := unfinished_run(directory):
                runs.append(run)
        except OSError as error:
            refused = True
            yield _refused("runs", error)
    dead = [run.name for run in runs if is_dead(run, snapshot.orphans)]
    remedy = "`gptloom reconcile` says what it would do, with --apply it does it"
    if snapshot.orphans:
        pids = ", ".join(map(str, snapshot.orphans))
        yield Check("runs", FAIL, f"processes {pids} go on without the one that started them", remedy)
    if dead:
        more = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
        yield Check("runs", WARN, f"died without a word: {', '.join(dead[:5])}{more}", remedy)
    if not snapshot.orphans and not dead and not refused:
        yield Check("runs", OK, f"{len(runs)} under way, none dead")


def check_records(home: Path) -> Iterator[Check]:
    """What runs and nights remember, file by file: one that is damaged hides no other."""
    runs, files, bad = 0, [], 0
    for run in sorted((home / "runs").glob("*/")):
        try:
            if not is_run(run):
                continue
            runs += 1
            files += [path for path in sorted(run.rglob("*")) if path.name in RECORDS]
            # A run writes its settings first; a journal without them is older, or somebody took them away.
            files += [] if (run / SETTINGS).exists() else [run / SETTINGS]
        except OSError as error:
            bad += 1
            yield _refused("records", error)
    files += sorted((home / "nightly").glob("*/ledger.json"))
    for path in files:
        try:
            RECORDS[path.name](path)
        except (UserError, OSError) as error:
            bad += 1
            problem, _, remedy = describe_error(error).partition("; ")
            yield Check("records", WARN, problem, remedy or f"put a copy of {path} back")
    if not bad:
        yield Check("records", OK, f"{len(files)} files of {runs} runs whole" if files else "none yet")


def _check_journal(path: Path) -> None:
    if damage := describe_damage(path):
        raise DamagedError(
            f"{path}: {damage}; the rest is used; a copy put back brings them back, and `gptloom sync` tells MLflow"
        )


RECORDS: dict[str, Callable[[Path], object]] = {
    FILE_NAME: _check_journal,
    SETTINGS: load_written,
    "ledger.json": lambda path: Ledger.load(path.parent),
    **dict.fromkeys((TAGS_FILE, "timing.json", "result.json", "done.json", "cell.json"), read_json),
}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
