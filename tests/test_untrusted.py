"""Files, folders and names that somebody else made: they decide nothing, run nothing, and hang nothing."""

import gzip
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from data_prep.sources import files, tars
from data_prep.sources.rows import Wanted
from megatron_soda.codecs import description
from megatron_soda.commands import params, prepare, train
from megatron_soda.commands.resolve import resolve
from megatron_soda.config import load_recipe
from megatron_soda.console import SafeConsole
from megatron_soda.errors import SodaError, say
from megatron_soda.files import read_json, sha256, write_sealed
from megatron_soda.hf.load import CONFIG, file_hashes, load_model
from megatron_soda.inference.studio import Studio
from megatron_soda.log import log
from megatron_soda.tokenizer import TextTokenizer, write_byte_tokenizer
from tests.exported import HOP, RATE, FakeCodec

# ---- names are values, not text to be parsed

NAMES = ["exp #3", "2024_01_15", "1e3", "null", "${HOME}", "'quoted'", '"quoted"', "[a,b]", "a: b", "x=y", "~", " a "]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_folder_of_any_name_is_itself(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # a relative name is not protected by a slash at its beginning
    Path(name).mkdir()
    Path(name, "recipe.yaml").write_text("run: elsewhere\n")
    assert resolve(name, []).run == name
    assert load_recipe(None, [], {"name": name, "prepare": {"tokenizer": name}}).prepare.tokenizer == name
    given: list[Any] = []
    monkeypatch.setattr("megatron_soda.train.run", lambda *arguments: given.extend(arguments) or 0)
    with pytest.raises(train.typer.Exit):
        train.command(name)
    assert given == [f"{name}/recipe.yaml", [], Path(name)]


def test_a_preset_is_not_parsed(capsys):
    with pytest.raises(SodaError, match=r"model\.preset='135m': no such preset"):
        params.command("'135m'")


# ---- models


def changed(folder: Path, **config: Any) -> None:
    """Changes config.json and makes soda.json say so: whoever makes a folder can do both."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    again(folder)


def again(folder: Path) -> None:
    described = read_json(folder / "soda.json")
    config = read_json(folder / "config.json")
    names = [name for name in described["files"] if (folder / name).is_file()]
    described |= {"files": file_hashes(folder, names), "config": {k: v for k, v in config.items() if k in CONFIG}}
    write_sealed(folder / "soda.json", {name: value for name, value in described.items() if name != "crc32"})


def weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    again(folder)


NORM = "model.layers.1.mlp.down_proj.weight"
FOLDERS = {
    "missing tensor": (lambda f: weights(f, lambda t: t.pop(NORM)), rf"lacks {NORM}"),
    "unknown tensor": (lambda f: weights(f, lambda t: t.update(extra=torch.ones(2))), "unknown tensors: extra"),
    "other shape": (lambda f: weights(f, lambda t: t.update({NORM: torch.ones(2, 3)})), rf"{NORM} is \[2, 3\]"),
    "not a number": (lambda f: weights(f, lambda t: t[NORM].__setitem__((0, 0), torch.nan)), "not finite"),
    "another model": (lambda f: changed(f, model_type="llama"), "only Qwen3ForCausalLM"),
    "code": (lambda f: changed(f, auto_map={"AutoModelForCausalLM": "code.Model"}), "has auto_map"),
    "quantised": (lambda f: changed(f, quantization_config={"quant_method": "fp8"}), "has quantization_config"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder_is_read_strictly(exported, name):
    change, message = FOLDERS[name]
    assert load_model(exported.folder).step == 7
    change(exported.folder)
    with pytest.raises(SodaError, match=message):
        load_model(exported.folder)


def test_pickled_weights_are_not_read(exported):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(exported.run / "ran"),)

    (exported.folder / "model.safetensors").unlink()
    torch.save({"model": Bomb()}, exported.folder / "pytorch_model.bin")
    again(exported.folder)
    with pytest.raises(SodaError, match="Only safetensors are read"):
        load_model(exported.folder)
    assert not (exported.run / "ran").exists()


def test_logits_are_those_of_transformers(exported):
    from transformers import AutoModelForCausalLM

    ours = load_model(exported.folder).model
    theirs = AutoModelForCausalLM.from_pretrained(exported.folder).eval()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


def test_a_model_does_not_decide_where_results_go(exported, tmp_path):
    alone = shutil.copytree(exported.folder, tmp_path / "got" / "model")
    (alone / "recipe.yaml").write_text(f"name: tiny\nrun: {tmp_path}/theirs\n")
    with pytest.raises(SodaError, match=r"model: a model outside its run: say where .*: run=FOLDER"):
        resolve(alone, [])
    assert resolve(alone, [f"run={tmp_path}/ours"]).run == f"{tmp_path}/ours"
    assert resolve(exported.folder, []).run == str(exported.run)
    with pytest.raises(SodaError, match="a model; give a recipe"):
        prepare.command(str(exported.folder))


def test_codec_json_does_not_decide_what_is_downloaded(tmp_path, monkeypatch):
    loaded: list[str | None] = []
    monkeypatch.setattr(description, "load_codec", lambda spec, path=None, codebooks=None, **_: loaded.append(path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for path in ("somebody/else", "../somewhere", "kyutai/mimi/../../else"):
        with pytest.raises(SodaError, match=r"codec\.json"):
            description._load({"spec": "mimi", "path": path}, tmp_path)
    assert loaded == []
    for path in (None, "kyutai/mimi", str(tmp_path)):
        description._load({"spec": "mimi", "path": path}, tmp_path)
    assert loaded == [None, "kyutai/mimi", str(tmp_path)]


class Listening(FakeCodec):
    """The first code of a frame is the number of its loudest sample."""

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        frames = [np.resize(wave, (-(-len(wave) // HOP), HOP)) for wave in waves]
        return [np.repeat(np.abs(one).argmax(1)[:, None] % 16, 4, 1).astype(np.int16) for one in frames]


def test_only_the_recording_of_the_codes_is_published(exported, tmp_path):
    codec, draw = Listening(), np.random.default_rng(0)
    studio = Studio(load_model(exported.folder), exported.recipe(), codec, tmp_path)
    own, other = (0.5 * draw.standard_normal(20 * HOP).clip(-1, 1) for _ in range(2))
    soundfile.write(tmp_path / "own.wav", own, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "private.wav", other, RATE, subtype="FLOAT")
    row = {"codes": codec.encode([own])[0]}
    decoded = codec.decode([row["codes"]])[0]
    assert np.allclose(studio.original({**row, "audio": str(tmp_path / "own.wav")}), own, atol=1e-6)
    for path in ("private.wav", "gone.wav"):
        assert np.array_equal(studio.original({**row, "audio": str(tmp_path / path)}), decoded)
    longer = np.concatenate([own, other])
    soundfile.write(tmp_path / "own.wav", longer, RATE, subtype="FLOAT")  # the rest of it is not the utterance
    assert np.array_equal(studio.original({**row, "audio": str(tmp_path / "own.wav")}), decoded)


# ---- tokenizers


def test_a_tokenizer_whose_ids_are_random_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_byte_tokenizer(path)
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, "model": {**spec["model"], "dropout": 0.0}}))
    TextTokenizer(path)
    path.write_text(json.dumps({**spec, "model": {**spec["model"], "dropout": 0.5}}))
    with pytest.raises(SodaError, match=r"tokenizer\.json: model\.dropout makes its ids random"):
        TextTokenizer(path)


class PanicException(BaseException):
    pass


@pytest.mark.parametrize("method", ["encode", "encode_batch", "decode"])
def test_a_panic_in_the_tokenizer_is_one_sentence(tmp_path, monkeypatch, method):
    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    write_byte_tokenizer(tmp_path / "tokenizer.json")
    text = TextTokenizer(tmp_path / "tokenizer.json")
    engine = type("Engine", (), {"encode": panic, "encode_batch_fast": panic, "decode": panic})
    monkeypatch.setattr(text, "_model", engine)
    with pytest.raises(SodaError, match=r"tokenizer\.json: the tokenizer failed on a text \(index out of bounds\)"):
        getattr(text, method)({"encode": "a", "encode_batch": ["a"], "decode": [1]}[method])


# ---- pipes, and files that grow without end

READERS = {
    "json": (read_json, SodaError),
    "checksum": (sha256, SodaError),
    "recipe": (load_recipe, SodaError),
    "tokenizer": (lambda path: TextTokenizer(path.parent), SodaError),
    "glob": (lambda path: files.expand(f"{path.parent}/*.json"), SodaError),
    "folder": (lambda path: (list(files.walk(path.parent, failed := [])), failed[0].reason)[1], None),
    "tar": (lambda path: next(iter(tars.read(path.parent, [path], path.parent, Wanted()))).reason, None),
}


@pytest.fixture
def alarm():
    """Ends a test that waits for a pipe."""

    def end(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(15)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_refused(tmp_path, reader):
    """Where nobody writes to it, opening it would wait forever."""
    path = tmp_path / "text_tokenizer.json"
    os.mkfifo(path)
    read, raised = READERS[reader]
    if raised:
        with pytest.raises(raised, match=r"a pipe|no such"):
            read(path)
    else:
        assert "a pipe" in str(read(path))


@pytest.mark.parametrize("suffix", [".gz", ".tar.gz"])
def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "ALWAYS", 1 << 20)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(bytes(1 << 23)))
    with pytest.raises(SodaError, match=r"unpacks to over 200 times its size"):
        for _ in files.blocks(path):
            pass
    with pytest.raises(SodaError, match=r"unpacks to over 200 times its size"):
        files.unpacked(path, tmp_path / "scratch")
    assert not any((tmp_path / "scratch").iterdir())
    path.write_bytes(gzip.compress(os.urandom(1 << 21)))
    assert sum(map(len, files.blocks(path))) == 1 << 21


# ---- what is printed

EVIL = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202eb\udcff [red]c[/] [/]"


def test_the_console_prints_names_as_they_are():
    out = io.StringIO()
    console = SafeConsole(file=out, width=300)
    table = Table("name", width=200)
    table.add_row(EVIL)
    for shown in (EVIL, Text(EVIL), table):
        console.print(shown)
    console.note("left out", f" {EVIL}")
    said = out.getvalue()  # Rich itself removes the bell
    assert said.count(r"a\x1b]0;title\x1b[2J\x9b31m\u202eb\udcff [red]c[/] [/]") == 4
    assert not set(EVIL) & {letter for letter in said if not letter.isprintable() and letter != "\n"}


def test_progress_still_moves_on_a_terminal():
    out = io.StringIO()
    SafeConsole(file=out, force_terminal=True).note("yellow", " plain")
    assert out.getvalue() == "\x1b[33myellow\x1b[0m plain\n"


def test_messages_hold_no_escapes(capsys):
    say(EVIL)
    log.warning(EVIL)
    log.info(EVIL)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert (said.out + said.err).count(r"\x1b]0;title\x07") == 3


def test_a_recipe_that_aliases_make_endless_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    levels = [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for text in ("\n".join(["data:", "  a0: &a0 [x]", *levels]), "data: &a [*a]\n"):
        path.write_text(text)
        with pytest.raises(SodaError, match="more than 100,000 values"):
            load_recipe(path)
