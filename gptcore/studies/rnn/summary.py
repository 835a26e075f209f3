"""What the families' runs say: three comparisons read off the same curves, positions, states, speeds."""

from __future__ import annotations

import math

import pandas as pd

from gptcore.report import page
from gptcore.report.figures import COLOURS
from gptcore.report.study import curves_figure, figure, table
from gptcore.studies import Draft, Results, Summary
from gptcore.studies.rnn.budget import FLOORS, at_budget, comparable
from gptcore.studies.statistics import comparison_note, mean_interval, paired

CAVEAT = (
    "Equal FLOPs and equal time are read off the runs' curves at what all trained families have spent. A run that spends more in all is "
    "read before the end of its learning-rate schedule, where it would have become better. Floors spend next to nothing and are lines "
    "to compare with. Time is of training steps at each run's steady pace, without warm-up, evaluations and saving."
)


def summarize(results: Results) -> Summary:
    rows, curves, baseline, draft = results.table(), results.table("curves"), results.plan.baseline, Draft()
    floors = list(rows[rows["family"].isin(FLOORS)]["arm"].unique())
    comparisons = {"equal parameters, equal tokens": rows}
    if not curves.empty:
        curves = comparable(curves[~curves["arm"].isin(floors)], results.plan.base)
        comparisons |= {"equal FLOPs": at_budget(curves, "flops"), "equal time": at_budget(curves, "seconds")}
    if baseline in results.arms:
        draft.findings.append(_conclusion(against(rows, baseline), baseline, floors))
        for name, frame in comparisons.items():
            if frame.empty:
                continue
            compared = draft.tables[name.replace(", ", " ").replace(" ", "_")] = against(frame, baseline)
            where, caption = f"At {name}", WHOLE_SPLIT
            if "budget" in frame:
                where += f" ({spent(name, frame)})"
                caption = f"bits per byte after {spent(name, frame)}"
            draft.blocks.append(table(name[0].upper() + name[1:], compared, caption, styles=STYLES))
            others = [row for _, row in compared.iterrows() if row["arm"] != baseline]
            draft.findings += [sentence(row, "The floor" if row["arm"] in floors else where, baseline) for row in others]
        draft.findings.append(comparison_note(paired(rows, "val_bpb", baseline), baseline))
        draft.blocks.append(page.paragraph(CAVEAT))
    else:
        draft.findings.append(f"{len(results.arms)} families measured, but not the reference {baseline}.")
    levels = rows[rows["arm"].isin(floors)].groupby("arm", sort=False)["val_bpb"].mean()
    _figures(results, curves, levels, draft)
    _sizes(rows, results.arms, draft)
    _states(rows, draft)
    return draft.summary()


WHOLE_SPLIT = "bits per byte on the whole validation split, all trained on the same number of tokens (n-gram: counted once)"
STYLES = {
    **dict.fromkeys(("val_bpb", "stream_reset_bpb", "stream_carried_bpb"), ".4f"),
    **dict.fromkeys(("difference", "gain"), "+.4f"),
    **dict.fromkeys(("train_tok_per_sec", "decode_1", "decode_32", "parameters", "non_embedding"), ",.0f"),
    **{"flops_per_token": ".3g", "lr": ".4g"},
}


def against(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Mean of every arm with its interval, and its difference from the baseline, seeds paired."""
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        own = mean_interval(group["val_bpb"])
        rows.append({"arm": arm, "n": own.n, **own.columns("val_bpb")})
    found = pd.DataFrame(rows)
    if baseline not in set(frame["arm"]):
        return found
    pairs = paired(frame, "val_bpb", baseline).set_index("arm")[["difference", "low", "high", "certain"]]
    pairs = pairs.rename(columns={"low": "difference_low", "high": "difference_high"})
    return found.join(pairs, on="arm").sort_values("val_bpb", ignore_index=True)


def spent(name: str, frame: pd.DataFrame) -> str:
    """What every run of a comparison had spent where it was read."""
    budget = frame["budget"].iloc[0]
    return f"{budget:.3g} training FLOPs each" if name == "equal FLOPs" else f"{budget:.3g} s of training steps each"


def sentence(row: pd.Series, where: str, baseline: str) -> str:
    if "difference" not in row or pd.isna(row["difference"]):
        return f"{where} {row['arm']} was not compared with {baseline}."
    interval = "no interval"
    if not math.isnan(row["difference_low"]):
        interval = f"95 % interval {row['difference_low']:+.4f} to {row['difference_high']:+.4f}"
    return (
        f"{where} {row['arm']} is at {row['val_bpb']:.4f} bits per byte, {row['difference']:+.4f} against {baseline} "
        f"(n={row['n']}, {interval})."
    )


def _conclusion(compared: pd.DataFrame, baseline: str, floors: list[str]) -> str:
    """The best trained family beside the baseline, and floors that are better than both: then nobody has learnt long enough."""
    trained = compared[~compared["arm"].isin(floors)]
    others = trained[trained["arm"] != baseline]
    if others.empty:
        return f"Only the reference {baseline} was measured: {trained['val_bpb'].iloc[0]:.4f} bits per byte."
    said = sentence(others.iloc[0], "At equal parameters and tokens", baseline)
    said = f"The best of the others: {said[0].lower()}{said[1:]}"
    is_better = compared["arm"].isin(floors) & (compared["val_bpb"] < trained["val_bpb"].min())
    for _, row in compared[is_better].iterrows():
        said += f" The floor {row['arm']}, counted on all of the training text, is ahead of all that were trained: {row['val_bpb']:.4f}."
    return said


def _figures(results: Results, curves: pd.DataFrame, floors: pd.Series, draft: Draft) -> None:
    specs = (("tokens", "training tokens"), ("seconds", "seconds of training steps"), ("flops", "training FLOPs"))
    for axis, title in specs if not curves.empty else ():
        plot = curves_figure(curves[curves[axis] > 0], x=axis, y="val_bpb", by="arm", x_title=title, y_title="bits per byte")
        for floor, bpb in floors.items():
            plot.add_hline(y=bpb, line={"color": COLOURS["reference"], "dash": "dash"}, annotation_text=str(floor))
        alt = f"Bits per byte of every family over {title}"
        tokens = results.plan.base.train.eval_tokens
        caption = f"On {f'the first {tokens:,}' if tokens else 'all'} validation tokens; one line a seed."
        caption += " Dashed: floors at their end, on the whole split." if len(floors) else ""
        draft.blocks.append(figure(plot, f"Over {title}", caption, alt=alt))
    positions = results.table("positions")
    if not positions.empty:
        smooth = positions.groupby(["arm", "position"], sort=False)["nats"].mean().reset_index()
        smooth, title = smooth[smooth["position"] > 0], "position in the window"
        plot = curves_figure(smooth, x="position", y="nats", by="arm", x_title=title, y_title="nats per token")
        plot.update_xaxes(type="log")
        caption = "Mean over seeds; a model that uses far context keeps falling to the right."
        draft.blocks.append(figure(plot, "Loss by position", caption, alt="Loss of every family by position in the window"))
    memory = results.table("memory")
    if not memory.empty:
        one = memory.groupby(["arm", "context"], sort=False)["state_kib"].mean().reset_index()
        plot = curves_figure(one, x="context", y="state_kib", by="arm", x_title="tokens of context", y_title="KiB")
        plot.update_xaxes(type="log")
        plot.update_yaxes(type="log")
        caption = "What one text leaves behind while it is continued: keys and values grow, a recurrent state does not."
        draft.blocks.append(figure(plot, "Memory of decoding", caption, alt="Memory of decoding by context length"))


def _sizes(rows: pd.DataFrame, arms: list[str], draft: Draft) -> None:
    wanted = ["parameters", "non_embedding", "flops_per_token", "lr", "train_tok_per_sec"]
    columns = [c for c in rows.columns if c in wanted or c.startswith("decode_")]
    sizes = rows.groupby("arm", sort=False)[columns].mean(numeric_only=True).reindex(arms).reset_index()
    draft.tables["sizes"] = sizes
    caption = (
        "parameters, training FLOPs a token, chosen learning rate, tokens a second in training and in decoding (batch 1, 32)"
    )
    draft.blocks.append(table("Sizes and speeds", sizes, caption, styles=STYLES))


def _states(rows: pd.DataFrame, draft: Draft) -> None:
    if "stream_carried_bpb" not in rows:
        return
    recurrent = rows.dropna(subset=["stream_carried_bpb"])
    means = recurrent.groupby(["arm", "state"], sort=False)[["stream_reset_bpb", "stream_carried_bpb"]].mean().reset_index()
    means["gain"] = means["stream_reset_bpb"] - means["stream_carried_bpb"]
    means = means.rename(columns={"state": "trained_with"})
    draft.tables["states"] = means
    caption = "the same models and targets, evaluated with a state that starts at zero in each window and with one that goes on"
    draft.blocks.append(table("Carried against reset state", means, caption, styles=STYLES))
