"""`gptloom up` and `gptloom down`: Prefect and MLflow with their UIs, and a worker."""

from __future__ import annotations

import argparse
from typing import Any

from gptloom.flows.command.surroundings import prepare_home
from gptloom.flows.servers.listening import check_port_number


def start_servers(args: argparse.Namespace, _result: dict[str, Any]) -> int:
    check_port_number(args.prefect_port, "--prefect-port")
    check_port_number(args.mlflow_port, "--mlflow-port")
    prepare_home()
    from gptloom.flows.servers import stack

    return stack.up(args.host, args.prefect_port, args.mlflow_port, not args.no_auth)


def stop_servers(_args: argparse.Namespace, _result: dict[str, Any]) -> int:
    from gptloom.flows.servers import stack

    return stack.down()
