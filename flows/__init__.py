"""Prefect flows and the `gptloom` command: the order of tasks, one flow a file.

gptloom run experiments/smoke.yaml
"""
