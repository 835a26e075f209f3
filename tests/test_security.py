"""What somebody sends is refused or safe; what is secret stays so; what is on the disk is for its owner alone."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import fcntl
import json
import os
import random
import re
import secrets
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from conftest import ROOT, users_environment
from safetensors.torch import save_file

from gptcore.checkpoint import FORMAT, load_model
from gptcore.config import UserError, dump_yaml, flatten, load_config
from gptcore.device import _open_lock
from gptcore.models import build_model
from gptcore.nights.settings import NightlySettings
from gptcore.store import commit_dir, hash_file, inside, keep_private, read_manifest
from gptcore.vocab import CharVocab
from gptloom.flows.forms import NO_SECRET, Overrides
from gptloom.flows.servers.listening import check_host
from gptloom.flows.servers.stack import child_environment
from gptloom.tasks.records.guard import Guard, create_app
from gptloom.tasks.records.login import MLFLOW_VARIABLES, find_login, take_login
from gptloom.tasks.runtime.liveness import device_locks

CONFIG = {"model": {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8}}
FILES = ("model.safetensors", "tokenizer.json", "config.yaml", "state.json")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as somebody would send it: small, whole, with true hashes."""
    folder = tmp_path_factory.mktemp("sent")
    (folder / "sent.yaml").write_text(json.dumps(CONFIG))
    config = load_config(folder / "sent.yaml")
    vocab = CharVocab("abcdefgh \n")
    model = build_model(config.model, vocab.size)
    state = {"step": 1, "vocab_size": vocab.size, "vocab_fingerprint": vocab.fingerprint}
    directory = folder / "step_000001"
    with commit_dir(directory, {"kind": "checkpoint", "format": FORMAT, "step": 1, "vocab_size": vocab.size}) as tmp:
        save_file({name: tensor.contiguous() for name, tensor in model.weights().items()}, tmp / "model.safetensors")
        (tmp / "tokenizer.json").write_text(json.dumps(vocab.to_json()))
        (tmp / "config.yaml").write_text(dump_yaml(config))
        (tmp / "state.json").write_text(json.dumps(state))
    load_model(directory)  # as it is, it loads
    return directory


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One of the ways in which bytes go wrong, by accident or on purpose; never the same bytes."""
    at = rng.randrange(len(raw))
    kind = rng.randrange(6)
    if kind == 0:
        changed = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    elif kind == 1:
        changed = raw[:at]
    elif kind == 2:
        changed = raw[:at] + rng.randbytes(rng.randint(1, 16)) + raw[at:]
    elif kind == 3:
        changed = raw[:at] + raw[at + rng.randint(1, 16) :]
    elif kind == 4:
        changed = raw[:at] + bytes([rng.choice(b'{}[]:,"-0919e.')]) + raw[at + 1 :]
    else:
        changed = raw + raw[at:]
    return changed if changed != raw else raw + b"\0"


def seal(directory: Path) -> None:
    """The manifest made true again, as whoever tampers with a file would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "COMMITTED").write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
def test_every_changed_file_is_refused(model_dir: Path, tmp_path: Path, name: str) -> None:
    """240 mutations in all: a flipped bit in the weights loads, runs and answers nonsense."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    rng = random.Random(name)
    for _ in range(60):
        (copy / name).write_bytes(mutated(whole, rng))
        with pytest.raises(UserError):
            load_model(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_with_a_forged_manifest_cannot_do_harm(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Hashes do not stop whoever writes them. What then still loads must be a whole model; all else is the user's error, no crash."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    rng = random.Random(f"forged {name}")
    refused = 0
    for _ in range(30):
        (copy / name).write_bytes(mutated(whole, rng))
        seal(copy)
        try:
            model, _ = load_model(copy)
        except UserError:
            refused += 1
        else:
            assert model(torch.zeros((1, 4), dtype=torch.long))[0].shape[:2] == (1, 4)
    assert refused >= (3 if name == "config.yaml" else 10), refused


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        header, data = header_of(raw)
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    return apply


def with_json(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        tree = json.loads(raw)
        change(tree)
        return json.dumps(tree).encode()

    return apply


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        assert old in raw.decode()
        return raw.decode().replace(old, new).encode()

    return apply


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


def bomb(_raw: bytes) -> bytes:
    """Nine levels of nine aliases each: 400 million words, if anybody writes them out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return ("\n".join(lines) + "\ndata: {source: *a8}\nmodel: {n_layer: *a8}\n").encode()


FORGED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "header longer than the file": ("model.safetensors", lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]),
    "no header": ("model.safetensors", lambda raw: b"\0" * 8 + raw[8:]),
    "a pickle": ("model.safetensors", lambda raw: b"\x80\x04\x95\x0b\0\0\0\0\0\0\0cposix\nsystem\n."),
    "a zip, as torch.save writes": ("model.safetensors", lambda raw: b"PK\x03\x04" + raw),
    "other shape": ("model.safetensors", with_header(lambda h: first(h).update(shape=[4, 24]))),
    "negative shape": ("model.safetensors", with_header(lambda h: first(h).update(shape=[-12, -8]))),
    "shape that overflows": ("model.safetensors", with_header(lambda h: first(h).update(shape=[1 << 40, 1 << 40]))),
    "integers for floats": ("model.safetensors", with_header(lambda h: first(h).update(dtype="I32"))),
    "unknown type": ("model.safetensors", with_header(lambda h: first(h).update(dtype="OBJECT"))),
    "offsets beyond the end": ("model.safetensors", with_header(lambda h: first(h).update(data_offsets=[0, 1 << 40]))),
    "overlap": ("model.safetensors", with_header(lambda h: h.update(extra=first(h)))),
    "renamed tensor": ("model.safetensors", with_header(lambda h: h.update(other=h.pop(next(iter(h)))))),
    "tensor missing": ("model.safetensors", lambda raw: b""),
    "a thousand layers": ("config.yaml", replaced("n_layer: 2", "n_layer: 1000")),
    "one layer more": ("config.yaml", replaced("n_layer: 2", "n_layer: 3")),
    "wider": ("config.yaml", replaced("n_embd: 8", "n_embd: 100000")),
    "longer context": ("config.yaml", replaced("positions: rotary", "positions: learned")),
    "other family": ("config.yaml", replaced("family: gpt", "family: lstm")),
    "unknown key": ("config.yaml", replaced("n_layer: 2", "n_layer: 2\n  exec: id")),
    "Python tag": ("config.yaml", replaced("name: sent", "name: !!python/object/apply:os.system [id]")),
    "date that is none": ("config.yaml", replaced("name: sent", "name: !!timestamp 2001-99-99")),
    "number without end": ("config.yaml", replaced("n_layer: 2", f"n_layer: {'9' * 5000}")),
    "nested without end": ("config.yaml", lambda raw: b"data: " + b"[" * 2000),
    "aliases of aliases": ("config.yaml", bomb),
    "name that leads out": ("config.yaml", replaced("name: sent", "name: ../../sent")),
    "a list": ("config.yaml", lambda raw: b"- 1"),
    "not UTF-8": ("config.yaml", lambda raw: raw + b"\xff\xfe"),
    "vocabulary of a billion": ("state.json", with_json(lambda t: t.update(vocab_size=1_000_000_000))),
    "vocabulary of another size": ("state.json", with_json(lambda t: t.update(vocab_size=13))),
    "vocabulary below zero": ("state.json", with_json(lambda t: t.update(vocab_size=-1))),
    "vocabulary that is text": ("state.json", with_json(lambda t: t.update(vocab_size="12"))),
    "state that is a list": ("state.json", lambda raw: b"[1]"),
    "state nested without end": ("state.json", lambda raw: b'{"a":' * 100_000),
    "other vocabulary": ("tokenizer.json", replaced('"a"', '"z"')),
    "two tokens of one id": ("tokenizer.json", with_json(lambda t: t["model"]["vocab"].update(a=3, b=3))),
    "id of a trillion": ("tokenizer.json", with_json(lambda t: t["model"]["vocab"].update(a=10**12))),
    "id below zero": ("tokenizer.json", with_json(lambda t: t["model"]["vocab"].update(a=-1))),
    "id that is text": ("tokenizer.json", with_json(lambda t: t["model"]["vocab"].update(a="2"))),
    "id beyond all in a special": ("tokenizer.json", with_json(lambda t: t["added_tokens"][0].update(id=10**12))),
    "no vocabulary": ("tokenizer.json", with_json(lambda t: t["model"].pop("vocab"))),
    "other model": ("tokenizer.json", with_json(lambda t: t["model"].update(type="BPE"))),
    "vocabulary nested without end": ("tokenizer.json", lambda raw: b'{"model":' * 100_000),
}


@pytest.mark.parametrize("how", FORGED)
def test_forged_models_are_refused(model_dir: Path, tmp_path: Path, how: str) -> None:
    """Each has true hashes. Loaded, it would crash, fill the memory, or run as another model than it says."""
    name, forge = FORGED[how]
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    (copy / name).write_bytes(forge((copy / name).read_bytes()))
    seal(copy)
    with pytest.raises(UserError) as refused:
        load_model(copy)
    assert len(str(refused.value)) < 4000


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link/outside", "a\0b"])
def test_manifests_cannot_name_files_outside(model_dir: Path, tmp_path: Path, name: str) -> None:
    """A manifest that names ../../other/file would have it hashed, shown and copied with the rest."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    (tmp_path / "outside").write_text("secret")
    (copy / "link").symlink_to(tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 6, "sha256": hash_file(tmp_path / "outside")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "COMMITTED").write_bytes(b"")
    with pytest.raises(UserError, match="outside of itself"):
        read_manifest(copy)
    assert inside(copy, "state.json") == copy / "state.json"


def test_loading_unpickles_nothing(model_dir: Path) -> None:
    """Python tells of every class that an unpickler looks up."""
    looked_up: list[object] = []
    watching = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if watching and event == "pickle.find_class":
            looked_up.append(args)

    sys.addaudithook(hook)  # for good: there is no way to take one off again
    import copyreg
    import pickle

    pickle.loads(pickle.dumps(copyreg.pickle))  # noqa: S301 - does the hook see anything?
    assert looked_up
    looked_up.clear()
    load_model(model_dir)
    watching = False
    assert looked_up == []


FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("package", ["gptcore", "tasks", "flows"])
def test_code_unpickles_nothing(package: str) -> None:
    """torch.load, np.load with pickles and yaml.load run code from files, whatever the rest of the program checks."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not FORBIDDEN & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node)
                owner = ast.unparse(node.func.value)
                assert not call.startswith(("torch.load(", "torch.save(", "yaml.unsafe_load(", "yaml.full_load(")), path
                if (owner, node.func.attr) == ("np", "load"):
                    assert "allow_pickle=False" in call, path
                if (owner, node.func.attr) == ("yaml", "load"):
                    assert "Loader=_YamlLoader" in call, path


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = [
    "https://me:hunter2@host/a.txt",
    "https://me:hun@ter2@host/a.txt",
    "http://hunter2@host/a.txt",
    "https://host/a.txt?access_token=hunter2",
    "https://host/a.txt?v=1&X-Amz-Signature=hunter2&n=2",
    "https://host/a.txt?sig=hunter2#sha256=" + "0" * 64,
    "ftp://me:hunter2@host/a.txt",
]


@pytest.mark.parametrize("source", SECRETS)
def test_a_secret_in_an_address_is_refused_unspoken(tmp_path: Path, source: str) -> None:
    """It would reach config.yaml, MLflow's parameters, Prefect's form and the report; the refusal must not spread it either."""
    path = tmp_path / "a.yaml"
    listed = json.dumps([{"source": source, "weight": 1}, "b.txt"])
    for text, override in (("", f"data.source={source}"), ("", f"data.source={listed}"), (f"data: {{source: {listed}}}", "")):
        path.write_text(text)
        with pytest.raises(UserError) as refused:
            load_config(path, [override] if override else [])
        assert "netrc" in str(refused.value)
        assert "ter2" not in str(refused.value)
    for field in ({"data_source": source}, {"more": [f"data.source={source}"]}):
        with pytest.raises(ValueError) as refused_form:
            Overrides(**field)  # type: ignore[arg-type]
        assert "ter2" not in str(refused_form.value)
        assert re.search(NO_SECRET["pattern"], source) is None  # as the server looks at it


@pytest.mark.parametrize(
    "source",
    ["a@b.txt", "hf://datasets/me/it@main", "https://host/a@b.txt?v=token", "package:a==1/x?token=1", "folder/?key=*.txt"],
)
def test_harmless_addresses_are_left_alone(tmp_path: Path, source: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("")
    if not source.startswith("package:"):
        assert flatten(load_config(path, [f"data.source={source}"]))["data.source"] == source
    assert re.search(NO_SECRET["pattern"], source)


class _Private(BaseHTTPRequestHandler):
    """Gives the text to whoever logs in; counts those who did."""

    text = b""
    login = ""
    served: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(self.login.encode()).decode():
            self.send_error(401)
            return
        self.served.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads command lines in /proc (Linux)")
def test_planted_secrets_appear_nowhere(small_text: Path, tmp_path: Path) -> None:
    """A whole run with a download behind a login and credentials in the environment: every byte it wrote is searched, every
    command line it started, all it printed; and it wrote nothing that others may read."""
    password, planted = secrets.token_hex(12), {name: f"planted:{secrets.token_hex(12)}" for name in ENVIRONMENT}
    _Private.text, _Private.login = small_text.read_bytes(), f"reader:{password}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Private)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login reader password {password}\n")
    (tmp_path / "netrc").chmod(0o600)
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    home = tmp_path / "home"
    env = users_environment(home) | planted | {"NETRC": str(tmp_path / "netrc")}
    source = f"http://127.0.0.1:{server.server_port}/not-secret-at-all.txt"
    command = [sys.executable, "-m", "gptloom.flows.command.cli", "run", str(tmp_path / "tiny.yaml"), f"data.source={source}"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen: set[bytes] = set()
    watcher = threading.Thread(target=_watch_commands, args=(process, str(home), seen))
    watcher.start()
    output, _ = process.communicate(timeout=240)
    watcher.join()
    server.shutdown()
    assert process.returncode == 0, output.decode()
    assert _Private.served, "the text came from somewhere else"

    everything = b"\n".join([output, *seen, *(path.read_bytes() for path in home.rglob("*") if path.is_file())])
    names = b"\n".join(str(path).encode() for path in home.rglob("*"))
    assert any(b"gptcore.train" in words for words in seen), "the command lines of its processes were not seen"
    assert everything.count(b"not-secret-at-all") >= 3, "a search that finds nothing proves nothing"
    for secret in (
        password,
        base64.b64encode(_Private.login.encode()).decode(),
        *(value.partition(":")[2] for value in planted.values()),
    ):
        assert secret.encode() not in everything + names, secret
    exposed = [path for path in home.rglob("*") if not path.is_symlink() and path.stat().st_mode & stat.S_IRWXO]
    assert not exposed
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


# Where people keep credentials that these programs, or libraries below them, look at.
ENVIRONMENT = (
    "HF_TOKEN",
    "PREFECT_API_KEY_OF_MINE",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_SERVER_API_AUTH_STRING",
)
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {"max_steps": 20, "global_batch_size": 4, "warmup_steps": 2, "eval_tokens": 512},
    "evaluate": {"samples": 1, "sample_tokens": 20, "bootstrap": 0},
    "studies": {"floor": False, "timing": False, "quantization": False, "accumulation": False, "rnn": False},
}


def _watch_commands(process: subprocess.Popen[bytes], home: str, seen: set[bytes]) -> None:
    """Command lines of all processes of this home, while they run."""
    entry = f"GPTLOOM_HOME={home}".encode()
    while process.poll() is None:
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if entry in (directory / "environ").read_bytes().split(b"\0"):
                    seen.add((directory / "cmdline").read_bytes())
        time.sleep(0.2)


@pytest.mark.parametrize(("before", "after"), [(0o022, 0o027), (0o077, 0o077), (0o002, 0o007), (0, 0o007)])
def test_what_is_written_is_private(before: int, after: int) -> None:
    """A journal or a database that every user of the machine can read; or a group's shared folder made useless."""
    old = os.umask(before)
    try:
        keep_private()
        assert os.umask(0) == after
    finally:
        os.umask(old)


def test_the_device_lock_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One user's umask must not keep all others from the GPU; nor may a link make us open their file."""
    lock = tmp_path / "gptloom-GPU-1.lock"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old = os.umask(0o077)
    try:
        fd = _open_lock(lock)
    finally:
        os.umask(old)
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666
    assert device_locks() == {}
    fcntl.flock(fd, fcntl.LOCK_EX)
    second = _open_lock(lock)
    with pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder = os.getpid() if Path("/proc/locks").exists() else None
    assert device_locks() == {"GPU-1": holder}
    os.close(fd)
    os.close(second)
    (tmp_path / "link.lock").symlink_to(lock)
    with pytest.raises(OSError, match="symbolic links"):
        _open_lock(tmp_path / "link.lock")


@pytest.mark.parametrize("auth", ["admin", "admin:", ":secret", "admin:sec ret", "admin:secret\n"])
def test_a_login_is_a_whole_one(home: Path, monkeypatch: pytest.MonkeyPatch, auth: str) -> None:
    """Prefect runs code for whoever reaches it; an empty password is none. From the environment and from the home."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", auth)
    with pytest.raises(UserError, match="USER:PASSWORD"):
        take_login()
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING")
    home.mkdir()
    (home / "login").write_text(f"\n{auth}")
    (home / "login").chmod(0o600)
    if auth.strip() != "admin:secret":  # the line's end belongs to the file
        with pytest.raises(UserError, match="USER:PASSWORD"):
            take_login()


def test_a_home_has_one_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many processes at once, that of the first; the environment's instead, where it has one."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "")
    assert find_login() is None
    call = [sys.executable, "-c", "from gptloom.tasks.records.login import take_login; print(take_login())"]
    asked = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    (login,) = {process.communicate(timeout=60)[0].strip() for process in asked}
    assert login == find_login() == (home / "login").read_text().strip()
    assert stat.S_IMODE((home / "login").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["login"]
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:secret")
    assert take_login() == "admin:secret"


def test_other_hosts_need_a_login() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UserError, match="--no-auth"):
            check_host(host, asks_login=False)
        check_host(host, asks_login=True)
    check_host("127.0.0.1", asks_login=False)


def test_without_a_login_no_process_is_told_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with half a login would refuse its own workers."""
    names = (
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_API_AUTH_STRING",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    )
    for name in names:
        monkeypatch.setenv(name, "somebody:else")
    where = (home, home, "http://127.0.0.1:4200", "http://127.0.0.1:5000")
    assert not set(names) & child_environment(*where, None).keys()
    told = child_environment(*where, "me:pass:word")
    assert [told[name] for name in names] == ["me:pass:word", "me:pass:word", "me", "pass:word"]


@pytest.mark.parametrize(
    "receiver", ["json://host/token", "mailto://me:pw@host", "xoxb-1-token", "xoxbtoken", "a b", "x/y/z", ""]
)
def test_a_receivers_address_is_refused_unspoken(receiver: str) -> None:
    """Prefect keeps a flow's settings in clear: they name a variable or a block, which hold the address."""
    with pytest.raises(ValueError, match="environment variable") as refused:
        NightlySettings(notify=["FINE", receiver])
    assert not receiver or receiver not in str(refused.value).replace("slack://", "")
    assert NightlySettings(notify=["NIGHT_RECEIVERS", "slack-webhook/my-team"]).notify


def test_compose_has_no_secret_on_a_command_line() -> None:
    """Every user of a host can read command lines, and `docker inspect` prints them."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        assert "PASSWORD" not in str(service.get("command", "")), name


# --- the login of a home -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["readable", "somebody else's", "a link", "a dangling link", "ümlaut:ß", "no colon", ""])
def test_a_login_that_others_may_know_is_refused(home: Path, how: str) -> None:
    """Whoever can write to a shared folder could lay down a home with a login of his own in it."""
    home.mkdir()
    path = home / "login"
    path.write_text("gptloom:known" if how in ("readable", "somebody else's", "a link") else how)
    path.chmod(0o644 if how == "readable" else 0o600)
    if how == "somebody else's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(path, 65534, 65534)
    if "link" in how:
        path.rename(home / "theirs")
        path.symlink_to(home / ("theirs" if how == "a link" else "nowhere"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        take_login()


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:5000", 200), ("mlflow:5000", 200), ("evil.example", 403), ("127.0.0.1:5001", 403), ("", 403)],
)
def test_mlflow_asks_no_other_name_for_the_login(host: str, status: int) -> None:
    """A page whose own name leads here would make the browser show our question as its own."""
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def send(message: Any) -> None:
        told.append(message)

    known = b"Basic " + base64.b64encode(b"gptloom:known")
    scope = {"type": "http", "path": "/x", "headers": [(b"host", host.encode()), (b"authorization", known)]}
    asyncio.run(Guard(app, "gptloom:known", ["127.0.0.1:5000", "mlflow:*"])(scope, None, send))  # type: ignore[arg-type]
    assert told[0]["status"] == status
    assert b"www-authenticate" not in dict(told[0].get("headers", []))


@pytest.mark.parametrize("login", [("gptloom", ""), ("", "known")])
def test_mlflow_does_not_start_with_half_a_login(monkeypatch: pytest.MonkeyPatch, login: tuple[str, str]) -> None:
    """An empty password is one that everybody knows."""
    for name, value in zip(MLFLOW_VARIABLES, login, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(AssertionError):
        create_app()
