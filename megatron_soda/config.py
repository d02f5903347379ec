"""The recipe: one typed tree, from a YAML file and key=value overrides. An unknown key is an error.

recipe = load_recipe("examples/quickstart/recipe.yaml", ["training.steps=20", "model.preset=135m"])
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .errors import SodaError
from .files import write_text
from .registry import SUITES, TASKS


@dataclass
class Prepare:
    """From speech and text to token stores."""

    # Speech: `asterisk`, the free prompts, fetched; or a folder, a manifest or a glob; empty: none.
    speech: str = "asterisk"
    layout: str = "auto"  # see data_prep/sources: manifest, audio, pairs, librispeech, ..
    # The corpus's column for one of ours (text, speaker, ..): {text: sentence}. {id: null}: its ids are not used.
    columns: dict[str, str | None] = field(default_factory=dict)
    audio_root: str = ""  # the folder that paths in manifests are relative to, and in; empty: the manifest's own
    languages: list[str] = field(default_factory=lambda: ["en", "es", "fr"])  # of the prompts
    downloads: str = "downloads"  # where fetched material is kept
    units: list[str] = field(default_factory=list)  # unit shards (globs) made before, instead of speech
    released: list[str] = field(default_factory=list)  # SODA's corpora: Parquet files (globs) of marker strings
    corpus_codebooks: int = 8  # codebooks in these strings; of more than the token space has, the first are taken
    text: list[str] = field(default_factory=list)  # JSONL, Parquet or txt files (globs); `wordnet`: fetched
    text_share: float = 0.05  # of all training tokens (paper: 5 %)
    decoder: str = "soundfile"  # soundfile | dali
    trim: bool = False  # cut off what is no speech at both ends; needs the extra [vad]
    codec: str = "embedded"  # embedded | mimi | encodec | dac
    codec_path: str = ""  # a fitted embedded codec, or a hub id or folder; empty: fit one | the usual hub id
    codebooks: int = 0  # the first so many of the codec; 0: as many as it usually has
    entries: int = 0  # in every codebook; only of the embedded codec, which has 2,048 otherwise
    orders: list[str] = field(default_factory=lambda: ["text-first", "audio-first"])  # see data_prep/interleave.py
    tokenizer: str = ""  # a sentencepiece .model or a tokenizer.json; empty: train one on the transcripts
    text_pieces: int = 512  # ids of a tokenizer that is trained
    # What keeps utterances on one side of the split, if they share it; the sound is compared by its codes.
    split_by: list[str] = field(default_factory=lambda: ["recording", "prompt", "text", "audio"])
    valid_share: float = 0.05  # of the groups of utterances that share nothing with others
    test_share: float = 0.05
    shard_size: int = 256  # utterances that are encoded, kept and made again together
    store: str = "megatron"  # megatron (.bin/.idx) | compact (a third of the size)
    executor: str = "local"  # local | ray
    workers: int = 0  # processes; 0: one a core, or one a GPU for a codec that runs there
    max_rejects: float = 0.1  # stop if more than this share of the utterances cannot be used


@dataclass
class Model:
    """A Qwen3-style decoder. `preset` fills in every size that is left at 0."""

    preset: str = "tiny"
    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    head_dim: int = 0
    tie_embeddings: bool | None = None  # as the preset has it
    norm_epsilon: float = 1e-5
    init: str = ""  # normal | levanter (by fan-in, as the paper's library draws; model/gpt.py) | as the preset has it
    init_std: float = 0.02  # of init=normal
    # Std of a vector that all ids of a class share at the start, in the embedding and in the head. SODA has none. With
    # it a model finds out in a few steps at which slot of a frame it is: small ones learn several times faster.
    embedding_class_std: float = 0.0
    head_class_std: float = 0.0
    rope_theta: int = 500_000
    rope_scaling_factor: float = 8.0  # Llama-3's, with its other constants


LAYOUTS = ("auto", "manifest", "audio", "pairs", "librispeech", "ljspeech", "commonvoice", "emilia", "webdataset", "hf")
SPLIT_BY = ("recording", "prompt", "text", "audio")
ORDERS = (
    *("text-first", "audio-first", "audio-only", "semantic-only", "text-only", "asr", "tts", "conversational"),
    "translation",
)

# layers, hidden, ffn, heads, query groups, head_dim, tied embeddings. 135m to 4b: the paper's SODA-base, section 3.
# 150m: its ablations. 600m-prelim: its multilingual forerunner. And `isoflop-WIDTH`, by the rule of its scaling study.
PRESETS = {
    "tiny": (3, 128, 384, 4, 2, 32, False),
    "135m": (15, 512, 1792, 8, 8, 64, False),
    "150m": (20, 512, 1792, 8, 8, 64, True),
    "600m": (28, 1024, 3072, 16, 8, 128, False),
    "600m-prelim": (28, 1024, 3072, 16, 8, 64, False),
    "1.7b": (28, 2048, 6144, 16, 8, 128, False),
    "4b": (36, 2560, 9728, 32, 8, 128, False),
}


def isoflop_preset(width: int) -> tuple[int, int, int, int, int, int, bool]:
    """The model of a width in the IsoFLOP study (paper, section 6): depth grows with width, ffn 4 x, heads of 128."""
    heads = max(1, width // 128)
    return (round(width / (64 + 4 * math.log2(width) - 7)), width, 4 * width, heads, heads, 128, False)


_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")


@dataclass
class MixStage:
    """Shares of the corpora in the samples, from a step on; those of a stage sum to 1."""

    from_step: int = 0
    shares: dict[str, float] = field(default_factory=dict)


@dataclass
class Data:
    path: str = ""  # folder with the stores train, valid and test; empty: RUN/data
    corpora: dict[str, str] = field(default_factory=dict)  # name: store (no suffix); empty: the one store `train`
    mix: list[MixStage] = field(default_factory=list)  # needed if there are several corpora
    sequence_length: int = 4096
    # Positions count from the start of the window (SODA) or of the document. Attention never leaves a document and
    # rotary positions are relative, so the two differ by rounding alone. Transformer Engine always resets.
    reset_positions: bool = False
    align_windows: bool = False  # no window begins inside an audio frame; costs codebooks - 1 tokens a window
    # What may be another than the model was trained with, because you know: codec, tokenizer, validation.
    accept: list[str] = field(default_factory=list)


@dataclass
class Parallel:
    """Data parallelism takes the processes that are left: world size / (tensor * pipeline * context)."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # parts of a stage that take turns (interleaved schedule)
    context: int = 1  # a sequence is cut between ranks
    sequence: bool = False  # norms and residuals are cut along the sequence between tensor-parallel ranks
    distributed_optimizer: bool = False


@dataclass
class Training:
    steps: int = 1000
    global_batch_size: int = 512  # sequences
    micro_batch_size: int = 1
    optimizer: str = (
        "adamw"  # adamw (the paper's word) | cautious (its code: Cautious AdamW, decay scaled by rate / peak)
    )
    # The mean of the cautious mask: over a matrix of all layers together (stacked, the paper's code) or of one (layer).
    cautious_mask: str = "stacked"
    learning_rate: float = (
        0.0  # peak; 0: the paper's rule, 0.003 sqrt(global batch / 256) sqrt(1024 / max(hidden, 1024))
    )
    schedule: str = "wsd"  # wsd: warm-up, stable, linear decay | cosine | decay: from the peak to 0 since branch_from
    warmup_share: float = 0.1  # of the steps
    decay_share: float = 0.2  # of the steps; wsd only
    branch_from: str = ""  # a checkpoint of another run that a new run starts from, steps and data going on
    weight_decay: float = 0.033
    beta1: float = 0.98
    beta2: float = 0.98
    epsilon: float = 1e-16
    clip_grad: float = 1.0
    z_loss: float = 1e-4
    loss_weights: dict[str, float] = field(default_factory=dict)  # by token class (text, marker, semantic, ..); else 1
    precision: str = "fp32"  # fp32 | bf16 | fp8 (bf16 beside Transformer Engine's FP8 matrix products)
    fp8_recipe: str = "tensorwise"  # delayed | tensorwise | blockwise
    bf16_layers: int = 0  # under fp8: so many layers at either end stay in bf16 (the head always does)
    recompute: bool = False  # activations of a layer are computed again in the backward pass, not kept
    log_every: int = 10
    save_every: int = 250
    async_save: bool = False  # checkpoints are written while training goes on
    keep_last: int = 0  # newest checkpoints that are kept; 0: all
    keep_every: int = 0  # besides, those of every so many steps
    valid_every: int = 250
    valid_windows: int = 16
    backend: str = "auto"  # layers: auto | transformer_engine | local
    peak_tflops: float = 0.0  # of one device, for the MFU; 0: from the table in training/metrics.py
    wandb_project: str = ""  # log to Weights & Biases too


@dataclass
class Evaluate:
    suite: list[str] = field(default_factory=lambda: ["nll", "grammar"])
    split: str = "test"
    documents: int = 0  # 0: all
    generations: int = 100  # of the grammar suite
    max_tokens: int = 400  # of a generation


@dataclass
class Generate:
    tasks: list[str] = field(default_factory=lambda: ["continue", "speak", "transcribe"])
    samples: int = 2  # of each task
    candidates: int = 5  # drawn for each sample; the best and the median of them are kept
    split: str = "test"
    text: str = ""  # speak this instead of held-out sentences
    temperature: float = 0.9
    top_p: float = 0.95
    max_seconds: float = 6.0
    prompt_seconds: float = 1.0  # of a continuation


@dataclass
class Recipe:
    name: str = "soda"
    run: str = "runs/soda"  # the run folder: everything lands here
    seed: int = 1234
    prepare: Prepare = field(default_factory=Prepare)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    training: Training = field(default_factory=Training)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)

    @property
    def data_folder(self) -> Path:
        return Path(self.data.path) if self.data.path else Path(self.run) / "data"


class _Loader(yaml.SafeLoader):
    """YAML in which every scalar is the text that stands there. What it means is said by the type of its key: `no` is a
    language in prepare.languages, and false in parallel.sequence."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012  (merges, <<)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, other in zip(sorted(keys), sorted(keys)[1:], strict=False):
            if key == other:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a YAML recipe (None: all defaults), applies `section.key=value` overrides, checks everything.

    A value is read by the type of its key. Where that is a string an override is taken as it stands, but for quotes
    around all of it; a list of strings is [A,B], with quotes where an element has a comma. All else is YAML. Nothing
    is substituted: `${X}` is four characters.

    Raises SodaError for a file that is not there or not YAML, an unknown key (naming the nearest), a value of the
    wrong type, and values that contradict each other.
    """
    recipe = Recipe()
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SodaError(f"{path}: cannot read the recipe ({error})") from None
        if (values := _yaml(text, f"{path}: not YAML")) is not None:
            _set(recipe, values, "", str(path))
    for override in overrides:
        _override(recipe, override)
    _fill_preset(recipe.model)
    _check(recipe)
    if recipe.training.learning_rate == 0:
        recipe.training.learning_rate = rule_learning_rate(recipe.training.global_batch_size, recipe.model.hidden_size)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    write_text(path, yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True))


def _yaml(text: str, problem: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except Exception as error:  # yaml raises many kinds
        raise SodaError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _override(recipe: Recipe, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SodaError(f"{override!r}: an override is written section.key=value")
    key = _full_key(key)
    owner, prefix, name = recipe, "", key
    section, dot, rest = key.partition(".")
    if dot and is_dataclass(getattr(recipe, section, None)):
        owner, prefix, name = getattr(recipe, section), f"{section}.", rest
    name, dot, entry = name.partition(".")  # an entry of a mapping: data.corpora.NAME
    kind = _kind(owner, name, prefix, override)
    if dot and get_origin(kind) is not dict:
        raise SodaError(f"{override}: unknown key {key}: {prefix}{name} is no section.")
    if dot:
        kind = get_args(kind)[1]
    if kind in (str, str | None):
        value = _unquoted(text)
    elif kind == list[str]:
        value = _elements(text, override)
    else:
        value = _yaml(text, f"{override!r}: the value is not YAML")
    _set(owner, {name: {entry: value} if dot else value}, prefix, override)


_DOUBLE, _SINGLE = r'"(?:[^"\\]|\\.)*"', r"'(?:[^']|'')*'"
_ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{_DOUBLE}|{_SINGLE})\s*|(?P<plain>(?:\[[^\[\]]*\]|[^,])*))(?:,|$)", re.S)


def _unquoted(text: str) -> str:
    """The text, or what is between the quotes around all of it, as a shell has it."""
    if re.fullmatch("'[^']*'", text):
        return text[1:-1]
    return re.sub(r'\\(["\\])', r"\1", text[1:-1]) if re.fullmatch(_DOUBLE, text, re.S) else text


def _elements(text: str, source: str) -> list[str]:
    """The strings of [A,'B',"C"]. A comma between brackets, as in /data/[a,b].txt, is part of an element."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and len(text) > 1):
        raise SodaError(f"{source}: a list is written [A,B], and an empty one []")
    text, at, found = text[1:-1].strip(), 0, []
    while at < len(text) and (match := _ELEMENT.match(text, at)):
        quoted, at = match["quoted"], match.end()
        found.append(_yaml(quoted, f"{source}: {quoted} is not YAML") if quoted else match["plain"].strip())
        if not (quoted or found[-1]):
            raise SodaError(f"{source}: there is nothing between two commas of the list")
    return found


def _set(owner: Any, values: Any, prefix: str, source: str) -> None:
    """Sets fields of a section to values as `_yaml` gives them."""
    if not isinstance(values, dict):
        raise SodaError(f"{source}: a recipe is a mapping of sections")
    for name, value in values.items():
        kind, key = _kind(owner, name, prefix, source), f"{prefix}{name}"
        if not is_dataclass(kind):
            value = _typed(kind, value, key, source)
            setattr(owner, name, {**getattr(owner, name), **value} if isinstance(value, dict) else value)
        elif isinstance(value, dict):
            _set(getattr(owner, name), value, f"{key}.", source)
        else:
            raise SodaError(f"{source}: {key} is a section, not a value: write {key}.KEY=VALUE")


def _kind(owner: Any, name: Any, prefix: str, source: str) -> Any:
    """The type of a field. SodaError if there is none of that name."""
    known = get_type_hints(type(owner))
    if name not in known:
        near = difflib.get_close_matches(str(name), known if prefix else _all_keys(), 1, 0.4)
        hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known here: {', '.join(known)}."
        raise SodaError(f"{source}: unknown key {prefix}{name}.{hint}")
    return known[name]


def _typed(kind: Any, value: Any, key: str, source: str) -> Any:
    """A value of a type that the recipe has. SodaError, naming the key, if it is none."""
    inner = get_args(kind)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise SodaError(f"{source}: {key}: must be a mapping, {{NAME: VALUE}}, not {value!r}")
        return {str(name): _typed(inner[1], one, f"{key}.{name}", source) for name, one in value.items()}
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise SodaError(f"{source}: {key}: must be a list, [A,B], not {value!r}")
        return [_typed(inner[0], one, f"{key}[{number}]", source) for number, one in enumerate(value)]
    if kind is MixStage:
        if not isinstance(value, dict):
            raise SodaError(f"{source}: {key} must have the keys from_step and shares")
        stage = MixStage()
        _set(stage, value, f"{key}.", source)
        return stage
    if type(None) in inner:
        if value in ("", "~", "null"):
            return None
        kind = inner[0]
    what, read = _SCALARS[kind]
    try:
        if not isinstance(value, str):
            raise ValueError
        return read(value)
    except Exception:  # yaml raises many kinds
        raise SodaError(f"{source}: {key}: must be {what}, not {value!r}") from None


def _number(text: str) -> float:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        return float(value)  # 1e-4 is a string to YAML 1.1
    return _one_of((int, float), value)


def _one_of(kinds: tuple[type, ...], value: Any) -> Any:
    if type(value) not in kinds:
        raise ValueError
    return value


_SCALARS: dict[type, tuple[str, Callable[[str], Any]]] = {
    str: ("text", str),
    int: ("a whole number", lambda text: _one_of((int,), yaml.safe_load(text))),
    float: ("a number", lambda text: float(_number(text))),
    bool: ("true or false", lambda text: bool(_one_of((bool, int), yaml.safe_load(text)))),
}


def _all_keys() -> list[str]:
    keys = []
    for f in fields(Recipe):
        keys.append(f.name)
        if is_dataclass(f.default_factory):
            keys += [f"{f.name}.{g.name}" for g in fields(f.default_factory)]  # type: ignore[arg-type]
    return keys


def _full_key(key: str) -> str:
    """A key without its section (`suite`) stands for the one key of that name, if there is just one."""
    owners = [k for k in _all_keys() if k.rpartition(".")[2] == key]
    return owners[0] if "." not in key and len(owners) == 1 else key


def _fill_preset(model: Model) -> None:
    *sizes, tied = preset(model.preset)
    for name, size in zip(_SIZES, sizes, strict=True):
        if getattr(model, name) == 0:
            setattr(model, name, size)
    if model.tie_embeddings is None:
        model.tie_embeddings = tied
    model.init = model.init or ("normal" if model.preset == "tiny" else "levanter")


def preset(name: str) -> tuple[int, int, int, int, int, int, bool]:
    """The sizes of a preset by name; SodaError names the nearest."""
    if name in PRESETS:
        return PRESETS[name]
    family, _, width = name.partition("-")
    if family == "isoflop":
        if width.isdigit() and int(width) >= 128 and int(width) % 128 == 0:
            return isoflop_preset(int(width))
        raise SodaError(f"model.preset={name}: the width must be a multiple of 128, as in isoflop-1024")
    near = difflib.get_close_matches(name, PRESETS, 1, 0)
    known = ", ".join([*PRESETS, "isoflop-WIDTH"])
    raise SodaError(f"model.preset={name}: no such preset. Did you mean {near[0]}? Known: {known}")


def rule_learning_rate(global_batch_size: int, hidden_size: int) -> float:
    """The paper's peak rate (section 4). It treats widths under 1024 as 1024: SODA-135M has 512 and takes 600M's."""
    return 0.003 * math.sqrt(global_batch_size / 256) * math.sqrt(1024 / max(hidden_size, 1024))


def _check(recipe: Recipe) -> None:
    def need(true: bool, message: str) -> None:
        if not true:
            raise SodaError(message)

    m, p, d, t, w = recipe.model, recipe.prepare, recipe.data, recipe.training, recipe.parallel
    for section, names in (
        (m, (*_SIZES, "norm_epsilon", "init_std", "rope_theta", "rope_scaling_factor")),
        (p, ("text_pieces", "shard_size", "corpus_codebooks")),
        (d, ("sequence_length",)),
        (t, ("steps", "global_batch_size", "micro_batch_size", "epsilon", "log_every", "save_every")),
        (t, ("valid_every", "valid_windows")),
        (w, ("tensor", "pipeline", "virtual_pipeline", "context")),
        (recipe.generate, ("candidates", "temperature", "top_p", "max_seconds", "prompt_seconds")),
    ):
        for name in names:
            value = getattr(section, name)
            need(0 < value < math.inf, f"{type(section).__name__.lower()}.{name}={value}: must be above 0")
    for section, names in (
        (m, ("embedding_class_std", "head_class_std")),
        (t, ("learning_rate", "clip_grad", "z_loss", "weight_decay", "bf16_layers", "keep_last", "keep_every")),
        (t, ("peak_tflops",)),
    ):
        for name in names:
            value = getattr(section, name)
            need(0 <= value < math.inf, f"{type(section).__name__.lower()}.{name}={value}: must be 0 or above")
    for section, names in (
        (p, ("text_share", "valid_share", "test_share", "max_rejects")),
        (t, ("warmup_share", "decay_share", "beta1", "beta2")),
    ):
        for name in names:
            value = getattr(section, name)
            need(0 <= value < 1 or (name == "max_rejects" and value == 1), f"{name}={value}: must be in [0, 1)")
    need(p.valid_share + p.test_share < 1, "prepare.valid_share and prepare.test_share leave nothing to train on")
    need(t.warmup_share + t.decay_share <= 1, "training.warmup_share and training.decay_share are over 1 together")
    choice("model.init", m.init, ("normal", "levanter"))
    need(
        m.init == "normal" or m.init_std == Model.init_std,
        f"model.init_std={m.init_std}: model.init={m.init} draws by fan-in; it is of model.init=normal",
    )
    choice("training.optimizer", t.optimizer, ("adamw", "cautious"))
    choice("training.cautious_mask", t.cautious_mask, ("stacked", "layer"))
    choice("training.schedule", t.schedule, ("wsd", "cosine", "decay"))
    choice("training.precision", t.precision, ("fp32", "bf16", "fp8"))
    choice("training.fp8_recipe", t.fp8_recipe, ("delayed", "tensorwise", "blockwise"))
    choice("training.backend", t.backend, ("auto", "transformer_engine", "local"))
    choice("prepare.codec", p.codec, ("embedded", "mimi", "encodec", "dac"))
    choice("prepare.layout", p.layout, LAYOUTS)
    choice("prepare.decoder", p.decoder, ("soundfile", "dali"))
    choice("prepare.store", p.store, ("megatron", "compact"))
    choice("prepare.executor", p.executor, ("local", "ray"))
    for name in p.orders:
        choice("prepare.orders", name, ORDERS)
    for name in p.split_by:
        choice("prepare.split_by", name, SPLIT_BY)
    need("recording" in p.split_by, f"prepare.split_by={p.split_by}: documents are of whole recordings, so these stay")
    need(bool(p.orders), "prepare.orders is empty: which documents are to be made of an utterance?")
    need(
        "semantic-only" not in p.orders or p.orders == ["semantic-only"],
        f"prepare.orders={p.orders}: semantic-only documents have frames of one code and need a store of their own",
    )
    need(
        bool(p.speech or p.units or p.released or p.text),
        "prepare.speech, prepare.units, prepare.released and prepare.text are all empty: nothing to prepare",
    )
    for name in ("codebooks", "entries", "workers"):
        need(getattr(p, name) >= 0, f"prepare.{name}={getattr(p, name)}: must be 0 or above")
    choice("evaluate.split", recipe.evaluate.split, ("train", "valid", "test"))
    choice("generate.split", recipe.generate.split, ("valid", "test"))
    for name in recipe.evaluate.suite:
        choice("evaluate.suite", name, SUITES.names())
    for name in recipe.generate.tasks:
        choice("generate.tasks", name, TASKS.names())
    need(
        m.num_attention_heads % m.num_query_groups == 0,
        f"model.num_query_groups={m.num_query_groups} does not divide "
        f"model.num_attention_heads={m.num_attention_heads}",
    )
    need(m.head_dim % 2 == 0, f"model.head_dim={m.head_dim}: rotary positions need an even number")
    for name, weight in t.loss_weights.items():
        need(0 <= weight < math.inf, f"training.loss_weights.{name}={weight}: must be 0 or above")
    need(
        bool(t.branch_from) or t.schedule != "decay",
        "training.schedule=decay is a leg off another run: set training.branch_from to one of its checkpoints",
    )
    need(
        t.backend != "local" or t.precision != "fp8",
        "training.precision=fp8 needs Transformer Engine; training.backend=local has no FP8",
    )
    need(
        2 * t.bf16_layers < m.num_layers or t.bf16_layers == 0,
        f"training.bf16_layers={t.bf16_layers} at either end leave none of model.num_layers={m.num_layers} in FP8",
    )
    need(
        t.bf16_layers == 0 or t.precision == "fp8",
        f"training.bf16_layers={t.bf16_layers} says which layers are not in FP8; it needs training.precision=fp8",
    )
    need(
        t.bf16_layers == 0 or t.fp8_recipe != "delayed" or t.precision != "fp8",
        "training.bf16_layers cannot be had with training.fp8_recipe=delayed; take tensorwise or blockwise",
    )
    need(
        len(d.corpora) < 2 or bool(d.mix),
        f"data.corpora has {len(d.corpora)} corpora; data.mix must say their shares",
    )
    for name in d.accept:
        choice("data.accept", name, ("codec", "tokenizer", "validation"))
    need(bool(d.corpora) or not d.mix, "data.mix has shares, but data.corpora no corpora")


def choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1, 0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SodaError(f"{key}={value}: must be one of {', '.join(known)}.{hint}")
