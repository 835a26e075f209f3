"""The report of one pipeline run: which numbers go where, and the sentences computed from them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from gptcore.config.switches import SHORT
from gptcore.report import page
from gptcore.report.figures import Curve, line_figure, time_figure
from gptcore.report.record import (
    QUANTIZATION,
    RunRecord,
    StepRecord,
    compare_models,
    format_comparison,
    perplexity,
    read_run,
    study_rows,
    training_speed,
)
from gptcore.report.studies import TIMING, rnn_block, study_block, time_parts
from gptcore.report.wording import MISSING, duration, number, short_count

# Random logits of standard deviation s cost about s²/2 nats more than a uniform guess: 0.1 allows s = 0.45.
UNTRAINED_TOLERANCE = 0.1
MODEL_STEPS = (("train", "main", "solid"), ("rnn", "baseline", "dash"), ("floor", "floor", "dot"))
COLUMNS = {  # of the comparison, in this order: a phone shows the first few
    "model": "model",
    "val_bpb": "bits per byte",
    "val_loss": "val loss (nats/token)",
    "val_ppl": "perplexity",
    "parameters": "parameters",
    "tok_per_sec": "training tok/s",
    "seconds": "training (s)",
}
STATES = {"done": "", "failed": "failed", "off": "switched off", "absent": "not run"}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what is in `run_dir` and return its path.

    Any step may be missing or failed; the report then says so. Raises UserError if `run_dir` is not a run's directory.
    """
    run = read_run(Path(run_dir))
    blocks = [
        summary(run),
        comparison_section(run),
        learning_section(run),
        time_section(run),
        studies_section(run),
        check_section(run),
        samples_section(run),
        data_section(run),
        reproduction_section(run),
    ]
    footer = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by gptloom from {run.name}. The file is complete in itself and asks no network for anything."
    html = page.page(run.name, headline_of(run), [block for block in blocks if block], footer=footer)
    return page.write_page(run.directory / "report.html", html)


def headline(run_dir: Path) -> str:
    """The run in one sentence, computed from its numbers."""
    return headline_of(read_run(run_dir))


def headline_of(run: RunRecord) -> str:
    """`headline` of a run already read."""
    train, evaluation = run.steps["train"], run.done("evaluate")
    if train.status == "failed":
        return f"Training failed: {train.reason.rstrip('.')}."
    if train.status != "done":
        return "This run trained no model."
    bpb = evaluation.number("val_bpb") if evaluation else train.number("val_bpb")
    if bpb is None:
        return f"The {run.model_name} was trained, but its quality on held-out text was not measured."
    interval = intervalnumber(evaluation)
    text = (
        f"The {run.model_name} spends {bpb:.3f} bits on a byte of text it has never seen{f' ({interval})' if interval else ''}"
    )
    gaps = [gap for step, name in (("floor", "the bigram floor"), ("rnn", "the LSTM")) if (gap := _gap(run, bpb, step, name))]
    text += "".join(f", {gap}" if i == 0 else f" and {gap}" for i, gap in enumerate(gaps))
    seconds, device = train.number("seconds"), train.result.get("device")
    if seconds is not None:
        text += f", after {duration(seconds)} of training"
    return f"{text} on {device}." if device else f"{text}."


def intervalnumber(evaluation: StepRecord | None) -> str:
    """`95 % interval 1.91–1.95`, or nothing where there is none."""
    low, high = (evaluation.number("val_bpb_low"), evaluation.number("val_bpb_high")) if evaluation else (None, None)
    return f"95 % interval {low:.3f}–{high:.3f}" if low is not None and high is not None else ""


def summary(run: RunRecord) -> Markup:
    """Key numbers, the state of every step, and what failed."""
    train, evaluation = run.steps["train"], run.done("evaluate")
    parts = []
    if run.done("train"):
        best = evaluation or train
        loss, peak, mfu = best.number("val_loss"), train.series("mem/peak_mib"), train.series("perf/mfu")
        interval = intervalnumber(evaluation).replace("interval ", "")
        nats = f"nats per token · perplexity {number(perplexity(loss), '.2f')}"
        speed, mfu_text = (training_speed(train), f"MFU {mfu.median():.1f} %, median" if len(mfu) else "median while training")
        values = [
            ("bits per byte", number(best.number("val_bpb"), ".3f"), interval or "held-out text"),
            ("validation loss", number(loss, ".3f"), nats if loss is not None else ""),
            ("parameters", number(train.number("parameters"), ",.0f"), str(train.result.get("precision") or "")),
            ("tokens seen", short_count(train.number("tokens_seen")), f"{number(train.number('steps'), ',.0f')} steps"),
            ("tok/s", number(speed, ",.0f"), mfu_text),
            ("peak memory", f"{peak.max():,.0f} MiB" if len(peak) else MISSING, "while training"),
        ]
        parts.append(page.tiles(values))
    parts.append(page.chips(_chip_values(run)))
    for step in run.steps.values():
        if step.status == "failed":
            parts.append(page.callout(f"{step.name} failed.", f"{step.reason.rstrip('.')}. It has no numbers in this report."))
    return page.join(parts)


def comparison_section(run: RunRecord) -> Markup:
    """The models of the run beside each other."""
    frame = compare_models(run)
    if frame.empty:
        return Markup()
    text = format_comparison(frame)
    bpb = frame["val_bpb"]
    bars = {"bits per byte": list(bpb / bpb.max())}
    text = text[list(COLUMNS)].rename(columns=COLUMNS)
    notes = ["Bits per byte compares models of any vocabulary; loss and perplexity only those of one. Lower is better."]
    interval, evaluation = intervalnumber(run.done("evaluate")), run.done("evaluate")
    if interval and evaluation:
        unit = evaluation.result.get("interval_unit", "held-out text")
        notes.append(
            f"{run.model_name}: {interval} over {number(evaluation.number('bytes'), ',.0f')} bytes, from resampling {unit}. It does not hold the spread between seeds."
        )
    notes += _int8_note(run)
    caption = "All models on the same held-out text; n = 1 training run of each"
    return page.section("Models compared", page.html_table(text, caption, bars=bars, notes=notes))


def learning_section(run: RunRecord) -> Markup:
    """Loss curves of every model; learning rate, gradient norm and speed; loss by position."""
    curves, uniform = [], None
    for step_name, role, dash in MODEL_STEPS:
        step, name = run.steps[step_name], _model_name(run, step_name)
        uniform = uniform or step.number("uniform_loss")
        train, val = step.series("train/loss"), step.series("val/loss")
        if len(train):
            curves.append(Curve(f"{name} train", train, role, is_thick=False, in_legend=not len(val)))
        if len(val):
            curves.append(Curve(f"{name} val", val, role, dash))
    blocks = []
    if curves:
        guess = ("uniform guess, ln V", uniform) if uniform else None
        figure = line_figure(curves, x_title="tokens seen", y_title="loss (nats per token)", reference=guess)
        eval_tokens = run.section("train").get("eval_tokens")
        caption = "Thick: held-out text. Thin: training batches. Click a name to hide it, drag to zoom, double-click to return."
        if isinstance(eval_tokens, int) and eval_tokens > 0:
            caption += f" Held-out points on the way use the first {eval_tokens:,} validation tokens, up to the end of a batch, the last one all of them."
        blocks.append(page.figure_block(figure, "Loss over tokens", caption, alt=_curves_alt(curves), scale_toggle=True))
    small = [_small_figure(run.steps["train"], *spec) for spec in _SMALL]
    if any(small):
        blocks.append(page.figure_row(*(figure for figure in small if figure)))
    if position := _position_block(run):
        blocks.append(position)
    return page.section("Learning", *blocks) if blocks else Markup()


def time_section(run: RunRecord) -> Markup:
    """Where the pipeline's time went, and inside it a training step's."""
    blocks, intro = [], ""
    if run.seconds:
        total = sum(run.seconds.values())
        trained = run.seconds.get("train")
        share = "No training in this time"
        if trained is not None and total:
            share = f"{100 * trained / total:.0f} % of the time was training"
        intro = f"{share}: {duration(trained or 0)} of {duration(total)} in all steps together."
        parts = time_parts(run)
        alt = "Seconds by step: " + ", ".join(f"{name} {duration(value)}" for name, value in run.seconds.items()) + "."
        caption = "Every step of the pipeline in its order."
        if (parts["part"] != "").any():
            caption += " Training is divided by the timing study's shares of a step; the rest of it is start-up, validation and saving."
        blocks.append(page.figure_block(time_figure(parts), "The pipeline's timing map", caption, alt=alt))
    if run.steps[TIMING].status in ("done", "failed"):
        blocks.append(study_block(run.steps[TIMING]))
    return page.section("Where the time went", *blocks, intro=intro) if blocks else Markup()


def studies_section(run: RunRecord) -> Markup:
    """The research items: their tables and what follows from them."""
    steps = [run.steps[name] for name in SHORT if name != TIMING]
    blocks = [study_block(step) for step in steps if step.status in ("done", "failed")]
    if rnn := rnn_block(run):
        blocks.append(rnn)
    return page.section("Studies", *blocks) if blocks else Markup()


def check_section(run: RunRecord) -> Markup:
    """A model that has learned nothing must guess: its loss has to be −ln(1/V)."""
    rows = []
    for step_name, _, _ in MODEL_STEPS:
        step = run.steps[step_name]
        untrained, uniform = step.number("untrained_loss"), step.number("uniform_loss")
        if untrained is not None and uniform is not None:
            off = untrained - uniform
            verdict = "pass" if abs(off) <= UNTRAINED_TOLERANCE else "fail"
            rows.append((_model_name(run, step_name), verdict, f"{untrained:.4f}", f"{uniform:.4f}", f"{off:+.4f}"))
    if not rows:
        return Markup()
    frame = pd.DataFrame(rows, columns=["model", "verdict", "untrained loss", "−ln(1/V)", "difference"])
    failed = [row[0] for row in rows if row[1] == "fail"]
    message = page.callout("Pass.", f"Every model starts within {UNTRAINED_TOLERANCE} nats of a uniform guess.", "good")
    if failed:
        reason = f"the first guess is off by more than {UNTRAINED_TOLERANCE} nats; look at the initialisation."
        message = page.callout("Fail.", f"{' and '.join(failed)}: {reason}")
    caption = f"Loss before the first step, nats per token; tolerance ±{UNTRAINED_TOLERANCE}"
    table = page.html_table(frame, caption, text_columns=["verdict"])
    intro = "Before training, every token of the vocabulary should look equally likely. A larger loss means confident nonsense at the start."
    return page.section("Does it start from nothing?", message, table, intro=intro)


def samples_section(run: RunRecord) -> Markup:
    """What the model writes."""
    samples = run.steps["evaluate"].result.get("samples")
    if not isinstance(samples, list) or not samples:
        return Markup()
    settings = run.section("evaluate")
    named = [name for name in ("temperature", "top_k", "seed") if settings.get(name) is not None]
    how = [f"{name.replace('_', '-')} {settings[name]}" for name in named]
    prompt = settings.get("prompt")
    intro = f"As generated{': ' + ', '.join(how) if how else ''}. " + (
        f"Every sample starts with “{prompt}”." if prompt else "Each starts where a document starts."
    )
    blocks = page.text_blocks([str(sample) for sample in samples], "Sample")
    return page.section("What it writes", Markup('<div class="samples">{}</div>').format(blocks), intro=intro)


def data_section(run: RunRecord) -> Markup:
    """What it learned from."""
    if not run.dataset:
        return Markup()
    profile = run.dataset.get("profile")
    keys = {"name": "name", "corpus id": "digest", "source": "source"}
    values = {label: run.dataset.get(key) for label, key in keys.items()}
    values |= _flat(profile) if isinstance(profile, dict) else {}
    shown = {key: f"{value:,}" if isinstance(value, int) else value for key, value in values.items() if value not in (None, "")}
    return page.section("Data", page.facts({key.replace("_", " "): value for key, value in shown.items()}))


def reproduction_section(run: RunRecord) -> Markup:
    """Config and environment: what one needs to do it again."""
    tags = {**run.steps["train"].tags, **run.tags}
    for key in ("device", "precision"):
        if value := run.steps["train"].result.get(key):
            tags.setdefault(key, str(value))
    blocks = [page.facts(tags)] if tags else []
    if run.config_text:
        blocks.append(page.collapsible("The resolved experiment file", page.preformatted(run.config_text)))
    return page.section("How to do it again", *blocks) if blocks else Markup()


_SMALL = (
    ("train/lr", "Learning rate", "as applied", ".3g"),
    ("train/grad_norm", "Gradient norm", "before clipping", ".3g"),
    ("perf/tok_per_sec", "Speed", "trained tokens per second", ",.0f"),
)


def _small_figure(step: StepRecord, key: str, title: str, caption: str, style: str) -> Markup:
    values = step.series(key)
    if values.empty:
        return Markup()
    figure = line_figure([Curve(title, values)], x_title="tokens seen", y_title="", height=220, from_zero=True)
    span = f"from {values.iloc[0]:{style}} to {values.iloc[-1]:{style}}"
    alt = f"{title} over tokens seen: {span}, between {values.min():{style}} and {values.max():{style}}."
    caption += f"; median {values.median():{style}}, n = {len(values)}"
    return page.figure_block(figure, title, caption, alt=alt)


def _position_block(run: RunRecord) -> Markup:
    losses = run.steps["evaluate"].result.get("loss_by_position")
    if not isinstance(losses, list) or len(losses) < 2:
        return Markup()
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in losses):
        return Markup()
    values = pd.Series(losses, index=range(1, len(losses) + 1), dtype=float)
    figure = line_figure([Curve("loss", values)], x_title="tokens of context", y_title="loss (nats per token)", height=300)
    half = len(values) // 2
    caption = f"Held-out loss by how much of the window the model has read: {values.iloc[0]:.2f} nats with one token, {sum(losses[half:]) / len(losses[half:]):.2f} in the window's second half."
    return page.figure_block(figure, "What context is worth", caption, alt=caption, scale_toggle=True)


def _gap(run: RunRecord, bpb: float, step_name: str, name: str) -> str:
    other = run.steps[step_name].number("val_bpb")
    if other is None:
        return ""
    return f"{abs(other - bpb):.3f} {'below' if bpb < other else 'above'} {name}"


def _int8_note(run: RunRecord) -> list[str]:
    """Say so if the quantization study, which computes in fp32 on the same tokens, has another loss than the table's first row."""
    rows = {row.get("weights"): row.get("val_bpb") for row in study_rows(run.steps[QUANTIZATION])}
    evaluation = run.done("evaluate")
    full, plain = (evaluation.number("val_bpb") if evaluation else None), rows.get("fp32")
    if full is None or not isinstance(plain, (int, float)) or abs(plain - full) < 5e-4:
        return []
    return [f"int8 was compared with the unquantized model in fp32 on the same tokens: {plain:.4f} bits per byte there."]


def _chip_values(run: RunRecord) -> list[tuple[str, str, str]]:
    prepared = [(name, "done", duration(value)) for name, value in run.seconds.items() if name not in run.steps]
    steps = [
        (name, step.status, STATES[step.status] or (duration(run.seconds[name]) if name in run.seconds else ""))
        for name, step in run.steps.items()
    ]
    return prepared + steps


def _curves_alt(curves: list[Curve]) -> str:
    ends = [f"{curve.name} from {curve.values.iloc[0]:.2f} to {curve.values.iloc[-1]:.2f}" for curve in curves]
    return f"Loss in nats per token over tokens seen: {', '.join(ends)}."


def _model_name(run: RunRecord, step_name: str) -> str:
    return {"train": run.model_name, "rnn": "LSTM", "floor": "bigram"}[step_name]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
