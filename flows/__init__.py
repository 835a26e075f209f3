"""Prefect flows and the `gptloom` command: the order of tasks, one flow a file.

gptloom run experiments/smoke.yaml
"""

import os
from pathlib import Path

if "PREFECT__FLOW_RUN_ID" in os.environ:  # the process in which a worker runs a flow
    from gptloom import is_project
    from gptloom.tasks.runtime.log import outlive_the_reader

    outlive_the_reader()
    # Prefect puts the folder in which it starts a run before all others to import from. That is experiments/, where no code lies
    # (prefect.yaml); from there the run goes to the project's own folder, whose code is the user's, or another checkout's.
    if Path.cwd().name == "experiments" and is_project(Path.cwd().parent):
        os.chdir("..")
