"""Prefect flows and the `gptloom` command: the order of tasks, one flow a file.

gptloom run experiments/smoke.yaml
"""

import os
import sys
from pathlib import Path

if "PREFECT__FLOW_RUN_ID" in os.environ:  # the process in which a worker runs a flow
    from gptloom import is_project
    from gptloom.tasks.runtime.log import outlive_the_reader

    outlive_the_reader()
    # Prefect puts the folder in which it starts a run, and that of the flow's file, before all others to import from. In a checkout they
    # are taken away again: a `torch.py` that lies there is the user's.
    for folder in (str(Path.cwd()), str(Path.cwd() / "flows")):
        if folder in sys.path:
            sys.path.remove(folder)
    # In a project of `gptloom init` it is experiments/, where no code lies (prefect.yaml); from there the run goes to the project's own
    # folder, whose code is the user's.
    if Path.cwd().name == "experiments" and is_project(Path.cwd().parent):
        os.chdir("..")
