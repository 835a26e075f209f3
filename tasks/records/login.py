"""The login of a home: Prefect's and MLflow's servers ask for it, whoever calls them says it.

    curl -u "$(cat .gptloom/login)" http://127.0.0.1:4200/api/version

It stands in $GPTLOOM_HOME/login as USER:PASSWORD, for the owner alone; whoever needs it first makes it up. Where the environment sets
PREFECT_SERVER_API_AUTH_STRING, that is the login instead. It travels in files and environments only: command lines, servers.json,
logs and parameters are read by others.
"""

from __future__ import annotations

import os
import secrets

from gptcore.config import UserError
from gptcore.store import home_dir, make_home, write_once

FILE_NAME = "login"
USER = "gptloom"
SERVER_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"  # what a Prefect server asks for
CLIENT_VARIABLE = "PREFECT_API_AUTH_STRING"  # what its clients say
MLFLOW_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")  # what MLflow's clients say
VARIABLES = (SERVER_VARIABLE, CLIENT_VARIABLE, *MLFLOW_VARIABLES)


def take_login() -> str:
    """USER:PASSWORD of this home, made up if it has none. Raises UserError when it cannot be read or written, or is none."""
    if (login := find_login()) is not None:
        return login
    path = make_home() / FILE_NAME
    try:
        write_once(path, f"{USER}:{secrets.token_urlsafe(24)}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the servers' login has its place there") from None
    login = find_login()  # of two processes at once, that of the first
    assert login is not None
    return login


def find_login() -> str | None:
    """USER:PASSWORD of the environment or of this home; None where neither has one. Raises UserError for what is none."""
    if given := os.environ.get(SERVER_VARIABLE):
        return _checked(given, SERVER_VARIABLE, "correct it, or unset it and the home gets a login of its own")
    path = home_dir() / FILE_NAME
    remedy = "delete it, and the next `gptloom up` makes another"
    try:
        # No link: who can write to a folder above could point it at a login that he knows.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), encoding="utf-8") as file:
            facts, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UserError(f"{path}: another user owns it or may read it, so it is nobody's secret; {remedy}")
    return _checked(text.strip(), str(path), remedy)


def _checked(login: str, where: str, remedy: str) -> str:
    user, _, password = login.partition(":")
    if not (user and password and login.isascii() and login.isprintable()) or " " in login:
        raise UserError(f"{where}: is no USER:PASSWORD of letters, digits and signs of ASCII; {remedy}")
    return login


def client_environment(login: str) -> dict[str, str]:
    """What clients of both servers find in their environment."""
    return {CLIENT_VARIABLE: login, **mlflow_environment(login)}


def mlflow_environment(login: str) -> dict[str, str]:
    user, _, password = login.partition(":")
    return dict(zip(MLFLOW_VARIABLES, (user, password), strict=True))
