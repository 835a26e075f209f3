"""What `pip install gptloom` brings beside the library `gptcore`: the command, the flows, the tasks, the experiments.

In a checkout the folders lie at its top and are linked from here; in a wheel they lie here. Either way their modules have one
name, `gptloom.flows.…` and `gptloom.tasks.…`, so that nothing of ours answers to a name that a user's own folder may have.
"""

from pathlib import Path

# Where prefect.yaml and experiments/ are: the checkout, or this package.
ROOT = (Path(__file__).parent / "prefect.yaml").resolve().parent
