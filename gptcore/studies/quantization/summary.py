"""What all cells of the quantization study say together: seeds paired with the trained weights, tables, plots, one sentence."""

from __future__ import annotations

from typing import Any

import pandas as pd

from gptcore.report import page
from gptcore.report.study import curves_figure, figure, interval_figure, table
from gptcore.studies import Draft, Results, Summary
from gptcore.studies.statistics import comparison_note, paired, ratio_interval

MEASURES = ("size_mib", "val_bpb")
LOST = "bits per byte lost"


def summarize(results: Results) -> Summary:
    rows, baseline, draft = results.table(), results.plan.baseline, Draft()
    speeds = [c for c in rows.columns if c == "prefill" or (c.startswith("decode_") and c.removeprefix("decode_").isdigit())]
    overview = draft.tables["overview"] = _overview(rows, results.arms, speeds)
    caption = "means over seeds; speeds in tokens a second, memory of the whole process or GPU"
    draft.blocks.append(table("Every method", overview, caption, styles=_styles(overview)))
    if baseline in results.arms and len(results.arms) > 1:
        changes = draft.tables["comparison"] = compare(rows, baseline, speeds)
        sentences = [sentence(row, speeds) for _, row in changes.iterrows()]
        note = comparison_note(paired(rows, "val_bpb", baseline), baseline)
        draft.findings += [_best(changes, sentences), *sentences, note]
        caption = f"seeds paired with {baseline}; 95 % intervals"
        draft.blocks.append(table("Against the trained weights", changes, caption, styles=_styles(changes)))
        plot = interval_figure(changes, LOST, value="bpb_delta", low="bpb_delta_low", high="bpb_delta_high")
        caption = "Bits per byte on the whole validation split minus those of the trained weights of the same seed."
        alt = "Loss of bits per byte for each method with its interval"
        draft.blocks.append(figure(plot, "What it costs", caption, alt=alt))
        draft.metrics = {f"quant/bpb_delta/{row['arm']}": float(row["bpb_delta"]) for _, row in changes.iterrows()}
    else:
        draft.findings.append(
            f"{len(overview)} kinds of weights measured; none of the trained ones ({baseline}), so nothing is compared."
        )
    _by_age(results, baseline, draft)
    _by_layer(results, draft)
    _texts(results, draft)
    return draft.summary()


def _overview(rows: pd.DataFrame, arms: list[str], speeds: list[str]) -> pd.DataFrame:
    columns = [*MEASURES, *speeds, *[c for c in rows.columns if c.startswith("peak_mib")], "quantize_seconds"]
    means = rows.groupby("arm", sort=False)[columns].mean(numeric_only=True)
    counts = rows.groupby("arm", sort=False)["seed"].nunique()
    return means.assign(n=counts).reindex(arms).reset_index()


def compare(rows: pd.DataFrame, baseline: str, speeds: list[str]) -> pd.DataFrame:
    """One row an arm: share of the size, bits per byte lost and speed as a multiple, each with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for name, value, is_ratio in (("size_ratio", "size_mib", True), ("bpb_delta", "val_bpb", False)):
        for _, row in paired(rows, value, baseline, ratio=is_ratio).iterrows():
            entry = found.setdefault(str(row["arm"]), {"arm": row["arm"], "n": row["n"]})
            entry[name] = row["difference"]
            if not is_ratio:
                entry |= {f"{name}_low": row["low"], f"{name}_high": row["high"]}
                if row["n"] == 1 and "text_low" in rows:  # one seed: what is left is the spread over texts
                    own = rows[rows["arm"] == row["arm"]].iloc[0]
                    entry |= {f"{name}_low": own["text_low"], f"{name}_high": own["text_high"]}
    for arm, entry in found.items():
        for speed in speeds:  # each cell timed the trained weights beside its own
            times = ratio_interval(rows.loc[rows["arm"] == arm, f"{speed}_speedup"])
            entry |= times.columns(f"{speed}_ratio")
    return pd.DataFrame(list(found.values()))


def sentence(row: pd.Series, speeds: list[str]) -> str:
    """`int8 takes 25 % of the bytes, decodes 3.90 times as fast (…) and costs +0.0010 bits per byte (n=5, …)`."""
    speed = speeds[0]
    of = "over texts " if row["n"] == 1 else ""
    interval = {
        name: f"95 % interval {of}{row[f'{name}_low']:{style}} to {row[f'{name}_high']:{style}}"
        if pd.notna(row[f"{name}_low"])
        else "no interval"
        for name, style in ((f"{speed}_ratio", ".2f"), ("bpb_delta", "+.4f"))
    }
    return (
        f"{row['arm']} takes {100 * row['size_ratio']:.1f} % of the bytes, decodes {row[f'{speed}_ratio']:.2f} times as fast at batch "
        f"{speed.removeprefix('decode_')} ({interval[f'{speed}_ratio']}) and costs {row['bpb_delta']:+.4f} bits per byte "
        f"(n={row['n']}, {interval['bpb_delta']})."
    )


def _best(changes: pd.DataFrame, sentences: list[str]) -> str:
    """The smallest of those that cost at most 0.02 bits per byte; where none does, the cheapest."""
    good = changes[changes["bpb_delta"] <= 0.02]
    order = good.assign(size=good["size_ratio"].round(3)).sort_values(["size", "bpb_delta"])
    place = order.index[0] if len(good) else changes["bpb_delta"].idxmin()
    return sentences[list(changes.index).index(place)]


def _by_age(results: Results, baseline: str, draft: Draft) -> None:
    ages = results.table("ages")
    if ages.empty or baseline not in set(ages["arm"]):
        return
    full = ages[ages["arm"] == baseline].set_index(["seed", "step"])["val_bpb"]
    ages = ages[ages["arm"] != baseline].join(full.rename("full"), on=["seed", "step"])
    ages["bpb_delta"] = ages["val_bpb"] - ages["full"]
    ages = ages.dropna(subset=["bpb_delta"])
    if ages.empty:
        return
    draft.tables["ages"] = ages
    plot = curves_figure(ages, x="tokens_seen", y="bpb_delta", by="arm", x_title="tokens seen in training", y_title=LOST)
    caption = "Every saved checkpoint of each run, quantized and evaluated on the first validation tokens."
    alt = "Bits per byte lost to quantization over the length of training"
    draft.blocks.append(figure(plot, "Damage against training length", caption, alt=alt))


def _by_layer(results: Results, draft: Draft) -> None:
    layers = results.table("layers")
    if layers.empty:
        return
    draft.tables["layers"] = layers
    means = layers.groupby(["arm", "layer"], sort=False)["bpb_delta"].agg(["mean", "min", "max"]).reset_index()
    for arm, frame in means.groupby("arm", sort=False):
        worst = frame.sort_values("mean", ascending=False)
        plot = interval_figure(worst, LOST, label="layer", value="mean", low="min", high="max")
        title, alt, height = f"One matrix at a time: {arm}", f"Loss by layer for {arm}", 140 + 22 * len(worst)
        caption = "All others stay as trained; rounded to nearest. Bars are the range over seeds."
        draft.blocks.append(figure(plot, title, caption, alt=alt, height=height))


def _texts(results: Results, draft: Draft) -> None:
    samples = results.table("samples")
    if samples.empty:
        return
    first = samples[samples["seed"] == samples["seed"].iloc[0]]
    texts = [page.subsection(str(row["arm"]), page.text_blocks([row["text"]], "sample")) for _, row in first.iterrows()]
    draft.blocks.append(page.subsection("Texts, from the same random numbers", *texts))


def _styles(frame: pd.DataFrame) -> dict[str, str]:
    styles = {"size_mib": ".2f", "val_bpb": ".4f", "bpb_delta": "+.4f", "quantize_seconds": ".1f"}
    styles |= {c: ",.0f" for c in frame.columns if c.startswith(("decode", "prefill", "peak"))}
    return styles | {c: ".2f" for c in frame.columns if c.endswith("_ratio")}
