"""One of the processes that read and clean: units of work in on stdin, batches of records out on stdout.

Started by `gptcore.corpus.pool`. First line in: {"data": settings, "plan": split}; then one unit a line. Out: one Arrow IPC stream; each batch's
metadata holds its facts, and an empty batch ends a unit or tells an error. End of stdin ends the process.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from gptcore.config import DataConfig
from gptcore.corpus.records import make_batch, read_batches_of
from gptcore.corpus.sections import SplitPlan
from gptcore.corpus.sources import Entry
from gptcore.errors import EXIT_BUG, describe_error, exit_code
from gptcore.parallel import go_without_pandas


def main() -> int:
    go_without_pandas()
    import pyarrow as pa

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    pa.set_cpu_count(1)
    settings = json.loads(sys.stdin.readline())
    data, plan = DataConfig.model_validate(settings["data"]), SplitPlan.restore(settings["plan"])
    empty = make_batch([], data, plan).table
    out = sys.stdout.buffer
    with pa.ipc.new_stream(out, empty.schema) as writer:

        def send(table: pa.RecordBatch, **metadata: Any) -> None:
            writer.write_batch(table, custom_metadata=metadata)
            out.flush()

        for line in sys.stdin:
            unit = [Entry(**entry) for entry in json.loads(line)]
            try:
                for batch in read_batches_of(unit, data, plan):
                    send(batch.table, facts=batch.facts())
                send(empty, end="1")
            except BrokenPipeError:
                return 0
            except Exception as error:
                if exit_code(error) == EXIT_BUG:
                    sys.excepthook(type(error), error, error.__traceback__)
                send(empty, error=describe_error(error), code=str(exit_code(error)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
