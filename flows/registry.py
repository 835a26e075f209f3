"""Promote and roll back as flows, so that either is one click in the Prefect UI: seconds, no training, a slot of its own.

gptloom promote shakespeare        # the challenger becomes the champion
gptloom rollback shakespeare       # the champion before it is champion again
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from gptloom.flows.forms import titled_text

Model = Annotated[str, titled_text("Model", min_length=1)]
Reason = Annotated[str, titled_text("Why")]


@flow(name="promote", flow_run_name="promote {model}", persist_result=False)
def promote(model: Model, reason: Reason = "on request") -> dict[str, Any]:
    """Make a model version the champion, the one in use. NAME alone means its challenger.

    Args:
        model: A registered model such as shakespeare; also NAME@ALIAS, NAME/VERSION or the name of a run.
        reason: Kept with the version, for whoever asks later.
    """
    from gptloom.tasks.records import registry

    start = time.perf_counter()
    now, before = registry.promote(model, reason)
    return _told("promoted", now, before, reason, start)


@flow(name="rollback", flow_run_name="roll back {model}", persist_result=False)
def rollback(model: Model, reason: Reason = "on request") -> dict[str, Any]:
    """Give `champion` back to the version that had it before.

    Args:
        model: The registered model's name, such as shakespeare.
        reason: Kept with the version, for whoever asks later.
    """
    from gptloom.tasks.records import registry

    start = time.perf_counter()
    now, before = registry.rollback(model, reason)
    return _told("rolled back", now, before, reason, start)


def _told(done: str, now: Any, before: Any, reason: str, start: float) -> dict[str, Any]:
    result = {
        "model": now.name,
        "champion": now.version,
        "before": before.version if before else None,
        "run": now.facts.get("run"),
        "val_bpb": now.val_bpb,
        "seconds": round(time.perf_counter() - start, 3),
    }
    create_markdown_artifact(
        key="champion",
        markdown=f"**{now.name}**: {done}, champion is now version {now.version} (was {result['before'] or 'none'}), "
        f"{now.val_bpb:.4f} bits per byte at its training, run `{result['run']}`. Why: {reason}",
        description="The model in use",
    )
    return result
