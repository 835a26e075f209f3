"""Retraining every night: is tonight's model better, on what, and what changed, the text or the model?

    python -m gptcore.nights PLAN.json --out DIR       # the device's part of a night: judge, train two arms, evaluate

`settings` are the night's choices, `night` the process, `scores` what a model makes of a hold-out, `gate` the decision,
`ledger` every model on every hold-out, `page` the report. flows/nightly.py puts a night together.
"""
