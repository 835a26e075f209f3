"""The work pools and their queues: what runs beside what, and what waits.

    python -m gptloom.flows.servers.pools http://127.0.0.1:4200/api        # make both, as docker compose does

    cpu, gpu    two slots each: one for whatever trains (queue `default`), one for what is urgent (queue `urgent`, goes first)

So two trainings sent to one pool run one after the other, and a rollback never waits for a training. The lock on each device
(gptcore/device.py) holds beyond that, whoever starts a training, and however.
"""

from __future__ import annotations

import sys
from typing import Any

from gptloom.flows.servers.prefect_api import exists, request

POOLS = ("cpu", "gpu")
SLOTS = 2
QUEUES = {"urgent": {"priority": 1, "concurrency_limit": 1}, "default": {"priority": 2, "concurrency_limit": 1}}
NO_WORKER = (
    "No worker: what is sent here waits. `gptloom up` starts one for this pool where it finds the device; on another machine: "
    "prefect worker start --pool {pool} --type process"
)
HAS_WORKER = "Trainings one after the other; the queue `urgent` has a slot of its own and goes first."


def prepare_pool(api: str, pool: str, *, has_worker: bool) -> None:
    """Make a pool if need be, with its slots and queues, and say in its description whether anyone works for it.

    Limits that someone changed in the UI stay as they are. Raises OSError when Prefect does not answer.
    """
    url = f"{api}/work_pools/{pool}"
    if not exists(url):
        request(
            f"{api}/work_pools/",
            {"name": pool, "type": "process", "concurrency_limit": SLOTS, "base_job_template": template(api)},
        )
        for name, settings in QUEUES.items():
            if exists(f"{url}/queues/{name}"):  # `default` comes with the pool
                request(f"{url}/queues/{name}", settings, method="PATCH")
            else:
                request(f"{url}/queues", {"name": name, **settings})
    request(url, {"description": HAS_WORKER if has_worker else NO_WORKER.format(pool=pool)}, method="PATCH")


def template(api: str) -> dict[str, Any]:
    """Prefect's own job template of process workers."""
    collections = request(f"{api}/collections/views/aggregate-worker-metadata")
    return dict(collections["prefect"]["process"]["default_base_job_configuration"])


def main() -> None:
    """Make both pools; who works for them is not known here."""
    for pool in POOLS:
        prepare_pool(sys.argv[1], pool, has_worker=True)


if __name__ == "__main__":
    main()
