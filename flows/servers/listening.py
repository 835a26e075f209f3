"""Where a server may listen: checked before anything is started, so that a refusal names the way out.

check_host("127.0.0.1")
check_port_number(4200, "--prefect-port")
check_port("127.0.0.1", 4200, "Prefect", "--prefect-port")
"""

from __future__ import annotations

import errno
import ipaddress
import socket

from gptcore.config import UserError


def check_host(host: str, *, asks_login: bool) -> None:
    """Raises UserError for an address that others reach, unless they must log in."""
    if not is_loopback(host) and not asks_login:
        raise UserError(f"--host {host} --no-auth: everyone who reaches it could run code here; leave out one of the two")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port_number(port: int, option: str) -> None:
    """Raises UserError for what no port is; 0, any free one, neither: nobody could be told where the server is."""
    if not 1 <= port <= 65535:
        raise UserError(f"{option} {port}: there is no such port; choose one from 1 to 65535")


def check_port(host: str, port: int, server: str, option: str) -> None:
    """Raises UserError when something listens on the port, or the host is not an address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            probe.bind(address)
    except OSError as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use, {server} cannot have it; if it is an earlier `gptloom up`, stop that "
                f"with `gptloom down`, else choose another port with {option}"
            ) from None
        raise UserError(
            f"{server} cannot listen on {host}:{port} ({error}); choose another one with --host or {option}"
        ) from None
