"""The measurements behind the R&D studies of the notes, each runnable as `python -m gptcore.studies.NAME`."""
