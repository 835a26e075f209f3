"""Prefect tasks: a decorator around one call of gptcore each; paths and plain results in, paths and plain results out.

    from tasks.data import ingest        # used by flows/pipeline.py
"""
