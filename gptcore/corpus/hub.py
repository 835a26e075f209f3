"""Files of a data set on the Hugging Face hub, through huggingface_hub: no code of the data set is run.

    hf://datasets/OWNER/NAME[/PATH OR GLOB][@REVISION]      by default its Parquet files, at the newest revision

The endpoint is HF_ENDPOINT, the token HF_TOKEN, as everywhere in that ecosystem. Files are kept under
home/data/downloads/hub; with a full commit hash as revision, a complete copy is used without any network.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gptcore.config import DataConfig, UserError
from gptcore.corpus.containers import Kind
from gptcore.store import DamagedError, content_id, read_json, write_json

logger = logging.getLogger(__name__)

PATTERN = re.compile(r"hf://datasets/([^/@\s]+/[^/@\s]+)(?:/([^@]+))?(?:@([^@\s]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
ENDPOINT = "https://huggingface.co"


def fetch_dataset(source: str, data: DataConfig, home: Path, known: dict[str, str]) -> list[tuple[str, Path]]:
    """(path in the data set, file here) of all files the source names, sorted; `known` gets title and licence.

    Raises UserError for a malformed source, a data set or revision that is not there or not open to us, an empty
    selection, and beyond `data.max_download_bytes`.
    """
    match = PATTERN.fullmatch(source)
    if match is None:
        raise UserError(f"data.source={source!r}: expected hf://datasets/OWNER/NAME[/GLOB][@REVISION]")
    name, glob, revision = match.group(1), match.group(2), match.group(3)
    folder = home / "data" / "downloads" / "hub"
    listing = _list(name, revision, folder, data)
    known |= {"title": name} | ({"licence": listing["licence"]} if listing["licence"] else {})
    chosen = sorted(path for path in listing["files"] if _is_chosen(path, glob, data))
    if not chosen:
        raise UserError(
            f"data.source={source!r}: no file matches {glob or '**/*.parquet'!r}; there are {', '.join(sorted(listing['files'])[:10]) or 'none'}"
        )
    total = sum(listing["files"][path] for path in chosen)
    if total > data.max_download_bytes:
        raise UserError(
            f"data.source={source!r}: {total} bytes, more than data.max_download_bytes={data.max_download_bytes}; name fewer files, or raise the limit"
        )
    return [(path, _fetch(name, path, listing, folder, data)) for path in chosen]


def _is_chosen(path: str, glob: str | None, data: DataConfig) -> bool:
    if glob is None:
        return path.endswith(".parquet")
    if any(sign in glob for sign in "*?["):
        return fnmatchcase(path, glob.replace("**/", "*")) and Kind.of(path).is_wanted(data.formats)
    return path == glob or (path.startswith(glob.rstrip("/") + "/") and Kind.of(path).is_wanted(data.formats))


def _list(name: str, revision: str | None, folder: Path, data: DataConfig) -> dict[str, Any]:
    """{"commit", "licence", "files": {path: bytes}} of a revision; that of a commit is kept, for it cannot change."""
    kept = folder / f"listing-{content_id([_endpoint(), name, revision])}.json"
    if revision and COMMIT.fullmatch(revision) and kept.is_file():
        try:
            return read_json(kept)
        except DamagedError as error:
            logger.warning("%s; it is asked for again", error)
    from huggingface_hub import HfApi

    with _explained(f"hf://datasets/{name}"):
        api = HfApi(endpoint=_endpoint())
        info = api.dataset_info(name, revision=revision, files_metadata=True, timeout=data.timeout_seconds)
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license") or next((tag[8:] for tag in info.tags or () if tag.startswith("license:")), "")
    listing = {
        "commit": info.sha,
        "licence": licence if isinstance(licence, str) else ", ".join(licence),
        "files": {file.rfilename: file.size or 0 for file in info.siblings or ()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if revision == info.sha:
        write_json(kept, listing)
    return listing


def _fetch(name: str, path: str, listing: dict[str, Any], folder: Path, data: DataConfig) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    options = {"repo_type": "dataset", "revision": listing["commit"], "cache_dir": folder}
    here = try_to_load_from_cache(name, path, **options)
    if not isinstance(here, str):
        with _explained(f"hf://datasets/{name}/{path}"):
            here = hf_hub_download(name, path, endpoint=_endpoint(), etag_timeout=data.timeout_seconds, **options)
        logger.info("hf://datasets/%s/%s fetched", name, path)
    found = Path(here)
    expected = listing["files"][path]
    if expected and found.stat().st_size != expected:
        size = found.stat().st_size
        found.resolve().unlink()
        found.unlink(missing_ok=True)
        raise UserError(f"hf://datasets/{name}/{path}: {size} bytes arrived, {expected} were promised; run again")
    return found


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The library's errors as one sentence for the user."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if not reason:
            raise
        raise UserError(f"data.source: {what}: {reason}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    unreachable = (
        f"the hub at {_endpoint()} cannot be reached ({type(error).__name__}); check the network, or give your own "
        "text with data.source=PATH"
    )
    if type(error) is errors.HfHubHTTPError:
        return unreachable
    # The first that fits: a gated data set is one that is not found, too.
    reasons = {
        errors.LocalEntryNotFoundError: unreachable,
        errors.GatedRepoError: "access to it must be granted first; ask for it on its page and set HF_TOKEN",
        errors.RevisionNotFoundError: "no such revision; correct what follows @",
        errors.EntryNotFoundError: "no such file in the data set; correct the path",
        errors.RepositoryNotFoundError: "no such data set, or it is private; correct the name, or set HF_TOKEN",
        ValueError: f"not a usable name ({' '.join(str(error).split())[:200]}); correct it",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if _is_network(error):
        return unreachable
    # What the system raises has a number; without one it is the library's own: the size is not the one that was promised.
    is_torn = type(error) is OSError and error.errno is None
    return "the file arrived incomplete; run again" if is_torn else ""


def _is_network(error: BaseException) -> bool:
    """An error of the library's HTTP client, which is httpx or its successor httpx2."""
    clients = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(clients & {"httpx", "httpx2"}) or isinstance(error, (ConnectionError, TimeoutError))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
