"""Prefect flows and the `gptloom` command: the order of tasks, one flow a file.

gptloom run experiments/smoke.yaml
"""

import os

if "PREFECT__FLOW_RUN_ID" in os.environ:  # the process in which a worker runs a flow
    from gptloom.tasks.runtime.log import outlive_the_reader

    outlive_the_reader()
