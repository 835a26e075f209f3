"""One file from an http(s) address: resumed where the connection broke, checked, and whole or absent.

    https://HOST/PATH[#sha256=HEX]        a login for HOST comes from ~/.netrc, or the file that NETRC names

Kept under home/data/downloads. With a sha256 a whole copy is used without any network; without, the server is asked
whether its copy changed (ETag, Last-Modified), and if it cannot be reached the copy that is here is used, with a warning.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from gptcore.config import DataConfig, UserError, hide_password
from gptcore.corpus.containers import Kind
from gptcore.store import DamagedError, content_id, hash_file, read_json, write_json

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_SECONDS = (1.0, 2.0, 4.0)  # waits between attempts that got nowhere; one that got further starts them anew
BLOCK = 1 << 20
MIN_RATE = 100  # bytes per second over a whole timeout: less is a stall, however regular
SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")
OWN_COPY = "download it yourself and give its path with data.source=PATH"


@dataclass
class Facts:
    """What is known about a download, kept beside it as JSON."""

    etag: str = ""
    modified: str = ""
    length: int = -1  # as the server stated it; -1: it did not
    name: str = ""
    sha256: str = ""


class Broken(Exception):
    """The connection or the server failed in a way that another attempt may mend."""


def with_retries(attempt: Callable[[], T], where: str, progress: Callable[[], int] = int) -> T:
    """Call `attempt` until it does not raise Broken, with waits in between; the last Broken is raised.

    An attempt that got further, by `progress`, starts the waits anew.
    """
    waits = list(RETRY_SECONDS)
    while True:
        before = progress()
        try:
            return attempt()
        except Broken as error:
            if progress() > before:
                waits = list(RETRY_SECONDS)
            if not waits:
                raise
            logger.warning("%s: %s; next attempt in %g s", where, error, waits[0])
            time.sleep(waits.pop(0))


def fetch_address(source: str, data: DataConfig, home: Path) -> tuple[Path, str]:
    """(the whole file on this machine, its name).

    Raises UserError for an address that is malformed, gone, too large, stalling, or whose content is not the pinned one.
    """
    url, _, fragment = source.partition("#")
    pin = SHA256.fullmatch(fragment)
    if (fragment and not pin) or not _has_host(url):
        raise UserError(f"data.source={shown(source)!r}: expected http(s)://HOST/PATH, with #sha256=HEX or nothing after it")
    folder = home / "data" / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    fetch = _Fetch(url, pin.group(1).lower() if pin else "", folder / f"http-{content_id(url)}", data)
    return fetch.target, fetch.run()


def shown(url: str) -> str:
    """An address for a message: without the password, the query and the fragment it may hold."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no address at all, such as one with half a pair of brackets
        return hide_password(url).partition("#")[0].partition("?")[0]
    return urlunsplit((parts.scheme, (parts.netloc.rpartition("@")[2]), parts.path, "", ""))


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:
        return False


class _Fetch:
    def __init__(self, url: str, pin: str, target: Path, data: DataConfig) -> None:
        self.url, self.pin, self.target, self.data = url, pin, target, data
        self.part = target.with_name(target.name + ".part")
        self.where = f"data.source: {shown(url)}"

    def run(self) -> str:
        """Make the target whole; its name."""
        have = _read_facts(self.target)
        if have and self.pin and have.sha256 == self.pin and hash_file(self.target) == self.pin:
            return have.name
        try:
            return with_retries(lambda: self._attempt(have), self.where, self._size)
        except Broken as error:
            if have and not self.pin:
                logger.warning("%s: %s; the copy that is here is used", self.where, error)
                return have.name
            raise UserError(f"{self.where}: {error}; check address and network, or {OWN_COPY}") from None

    def _attempt(self, have: Facts | None) -> str:
        import requests
        import urllib3

        partial = _read_facts(self.part)
        headers = {"Accept-Encoding": "identity"}
        begun = self.part.stat().st_size if partial and self.part.exists() else 0
        if begun and partial and (partial.etag or partial.modified):
            headers |= {"Range": f"bytes={begun}-", "If-Range": partial.etag or partial.modified}
        elif have and not self.pin:
            headers |= {"If-None-Match": have.etag} if have.etag else {}
            headers |= {"If-Modified-Since": have.modified} if have.modified and not have.etag else {}
        timeout = (min(self.data.timeout_seconds, 10.0), self.data.timeout_seconds)
        try:
            with requests.get(self.url, headers=headers, stream=True, timeout=timeout) as answer:
                if answer.status_code == 304 and have:
                    return have.name
                self._check_status(answer)
                facts = self._facts(answer)
                begun = begun if answer.status_code == 206 else 0
                self._receive(answer, facts, begun)
        except (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException) as error:
            if isinstance(error, ValueError) and not isinstance(error, requests.ConnectionError):
                raise UserError(f"{self.where}: not a usable address ({type(error).__name__}); correct it") from None
            raise Broken(f"the connection broke at {self._size()} bytes ({type(error).__name__})") from None
        return self._accept(facts)

    def _check_status(self, answer: requests.Response) -> None:
        status = answer.status_code
        start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if status == 206 and (start is None or int(start.group(1)) != self._size()):
            self._forget()
            raise Broken("the server answers with another part of the file than was asked for")
        if status in (200, 206):
            return
        if status == 416:  # what we have is not a beginning of what is there now
            self._forget()
            raise Broken("HTTP 416")
        if status in (408, 429) or status >= 500:
            raise Broken(f"HTTP {status}")
        login = " (a login for it can stand in ~/.netrc)" if status in (401, 403) else ""
        raise UserError(f"{self.where}: HTTP {status}; correct the address{login}, or {OWN_COPY}")

    def _facts(self, answer: requests.Response) -> Facts:
        headers = answer.headers
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", ""):
            raise UserError(f"{self.where}: the server insists on Content-Encoding {encoding!r}; {OWN_COPY}")
        name = Path(unquote(urlsplit(answer.url).path)).name or "index.html"
        if "html" in headers.get("Content-Type", "") and not Kind.of(name).inner:
            name += ".html"
        name += ".gz" if encoding == "gzip" and not name.endswith(".gz") else ""
        etag = headers.get("ETag", "")
        length = headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else -1
        if answer.status_code == 206 and total >= 0:
            total += self._size()
        limit = self.data.max_download_bytes
        if total > limit:
            raise UserError(
                f"{self.where}: {total} bytes, more than data.max_download_bytes={limit}; raise the limit, or give less"
            )
        free = shutil.disk_usage(self.target.parent).free
        if total - self._size() > free:
            raise UserError(
                f"{self.where}: {total} bytes do not fit on the disk ({free} free); free some, or point GPTLOOM_HOME elsewhere"
            )
        weak = etag.startswith("W/")  # says nothing about single bytes: no good for resuming
        return Facts("" if weak else etag, headers.get("Last-Modified", ""), total, name)

    def _receive(self, answer: requests.Response, facts: Facts, begun: int) -> None:
        write_json(_facts_path(self.part), asdict(facts))
        window, count = time.monotonic(), 0
        with open(self.part, "r+b" if begun else "wb") as file:
            file.seek(begun)
            file.truncate()
            # read1 gives what has arrived: a server that drips a byte a second is seen as such.
            while piece := answer.raw.read1(BLOCK, decode_content=False):
                file.write(piece)
                count += len(piece)
                if file.tell() > self.data.max_download_bytes:
                    raise UserError(
                        f"{self.where}: sends more than data.max_download_bytes={self.data.max_download_bytes}; raise the limit, or give less"
                    )
                now = time.monotonic()
                if now - window > self.data.timeout_seconds:
                    if count < MIN_RATE * (now - window):
                        raise Broken(f"the server stalls: {count} bytes in {now - window:.0f} s")
                    window, count = now, 0
        size = self._size()
        if 0 <= facts.length != size:
            raise Broken(f"the connection ended at {size} of {facts.length} bytes")

    def _accept(self, facts: Facts) -> str:
        facts.sha256 = hash_file(self.part)
        if self.pin and facts.sha256 != self.pin:
            self._forget()
            raise UserError(
                f"{self.where}: its sha256 is {facts.sha256}, not the pinned {self.pin}; it is not used. Correct the pin, or {OWN_COPY}"
            )
        _facts_path(self.target).unlink(missing_ok=True)  # from here to the last line there is no whole download
        self.part.replace(self.target)
        write_json(_facts_path(self.target), asdict(facts))
        _facts_path(self.part).unlink(missing_ok=True)
        logger.info("%s: %d bytes, sha256 %s", self.where, self.target.stat().st_size, facts.sha256)
        return facts.name

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        _facts_path(self.part).unlink(missing_ok=True)


def verify_download(path: Path) -> None:
    """Before a file is read: one that was fetched earlier is what arrived then. Raises DamagedError; any other file is taken as it is."""
    facts = _read_facts(path)
    stored = path.resolve()
    # The hub's library names a large file by its sha256.
    expected = stored.name if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name) else ""
    if facts is not None:
        expected = facts.sha256
    if expected and hash_file(path) != expected:
        raise DamagedError(f"{path}: not what was fetched (sha256); delete {stored} and run again to fetch it anew")


def _facts_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_facts(path: Path) -> Facts | None:
    """The facts of a file that is there; None for a file without them, which is nothing."""
    try:
        known = read_json(_facts_path(path))
        return Facts(**{field.name: known[field.name] for field in fields(Facts)}) if path.is_file() else None
    except (ValueError, KeyError, TypeError):
        return None
