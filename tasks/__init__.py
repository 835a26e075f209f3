"""Prefect tasks: a decorator around one call of gptcore each; paths and plain results in, paths and plain results out.

They are used by flows/pipeline.py, the main job: `gptloom run experiments/smoke.yaml`.
"""
