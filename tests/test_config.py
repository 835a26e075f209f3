"""The config tree refuses what it does not know and names the way out."""

from pathlib import Path

import pytest

from gptcore.config import (
    UserError,
    check_config,
    dump_yaml,
    flatten,
    load_config,
    load_written,
    reading,
    with_changes,
    with_overrides,
    write_yaml,
)


def write(tmp_path, text, name="toy.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_name_defaults_to_the_file_and_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "train: {lr: 0.5, max_steps: 30, warmup_steps: 3}\n")
    config = load_config(path, ["train.lr=1e-2", "data.source=2024", "train.compile=on"])
    assert config.name == "toy"
    assert config.train.lr == 0.01  # YAML 1.1 would read 1e-2 as text
    assert config.data.source == "2024"  # a path stays text
    assert config.train.compile == "on"  # YAML 1.1 would read a boolean
    assert config.train.max_steps == 30


def test_dumped_yaml_reads_back_equal(tmp_path):
    config = load_config(write(tmp_path, "model: {n_layer: 2}\n"), ["evaluate.prompt=on: {x}", "train.lr=1e-05"])
    assert load_config(write(tmp_path, dump_yaml(config), "again.yaml")) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["train.lrr", "did you mean 'lr'"]),
        ("trian.lr=1", ["trian", "did you mean 'train'"]),
        ("train.lr=fast", ["train.lr", "'fast'"]),
        ("train.lr=nan", ["train.lr"]),
        ("train.grad_clip=.inf", ["train.grad_clip=inf", "finite number"]),
        ("train.minutes=.inf", ["train.minutes=inf", "finite number"]),
        ("train.lr=.nan", ["train.lr=nan", "finite number"]),
        ("model.preset=[a]", ["model.preset=['a']", "'classic', 'gpt2' or 'modern'"]),
        ("train.micro_batch_size=5", ["train.micro_batch_size=5", "train.global_batch_size=32"]),
        ("model.n_head=3", ["model.n_head=3", "model.n_embd=128"]),
        ("model.n_head=128", ["even head size"]),
        ("data.split=random", ["data.split", "'section'"]),
        ("studies.accumulation_steps=5", ["studies.accumulation_steps=5", "studies.accumulation=false"]),
        ("train.warmup_steps=5000", ["train.warmup_steps=5000", "train.max_steps"]),
        ("lr", ["section.field=value"]),
        ("a.b.c=1", ["section.field=value"]),
        ("train.max_steps=", ["train.max_steps=", "empty", "train.max_steps=null"]),
    ],
)
def test_a_wrong_override_is_one_sentence_that_names_the_field(tmp_path, override, words):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, ""), [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["- a\n", "train: [", "train: 3\n", "train: {lr: {x: 1}}\n", "train: {}\ntrain: {}\n"])
def test_a_broken_file_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"toy\.yaml"):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_flatten_and_changes():
    config = check_config({})
    assert flatten(config)["train.max_steps"] == config.train.max_steps
    assert with_changes(config, train={"max_steps": 77}).train.max_steps == 77
    with pytest.raises(UserError):
        with_changes(config, train={"max_steps": 0})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: with_overrides(c, ["model.preset=gpt2", "train.minutes=2"], "here"),
        lambda c: with_changes(c, "here", model={"preset": "gpt2"}, train={"minutes": 2}),
    ],
)
def test_one_rule_for_changes_of_a_config(change) -> None:
    """A preset resets what the one before it filled in; an end replaces the others; an end taken away leaves them."""
    before = check_config({"train": {"max_steps": 70}, "model": {"preset": "classic", "dropout": 0.5}})
    config = change(before)
    assert config.model == check_config({"model": {"preset": "gpt2", "dropout": 0.5}}).model
    assert (config.train.max_steps, config.train.minutes) == (None, 2)
    assert with_changes(before, train={"minutes": None}).train.max_steps == 70
    with pytest.raises(UserError, match=r"^here: unknown section 'modl'"):
        with_changes(before, "here", modl={})


def test_settings_that_were_written_are_read_back_or_refused(tmp_path: Path) -> None:
    """Cut short, flipped or empty they would be another experiment, under the same name."""
    config, path = load_config(write(tmp_path, "train: {lr: 0.01}")), tmp_path / "config.yaml"
    write_yaml(config, path)
    assert load_written(path) == config
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 97):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert load_written(path) == config, bit
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 (either is well)
    for length in (0, 9, 80, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"config\.yaml: damaged"):
            load_written(path)
    assert list(tmp_path.glob(".*")) == []


def test_settings_larger_than_what_they_were_made_from_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of many sources is several times as long with every default stated; an input of that length stays refused."""
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_VALUES", 200)
    sources = ", ".join(f"{{source: a{number}}}" for number in range(40))
    config, path = load_config(write(tmp_path, f"data: {{source: [{sources}]}}")), tmp_path / "config.yaml"
    write_yaml(config, path)
    assert load_written(path) == config
    text = path.read_text(encoding="utf-8")
    path.write_text(text.partition("\n")[2], encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml: more than"):
        load_written(path)
    path.write_text(text + "#" * 16_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml: more than 16,000 characters"):
        load_written(path)
