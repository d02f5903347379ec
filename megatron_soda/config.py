"""The recipe: one typed tree, from a YAML file and key=value overrides. An unknown key is an error.

recipe = load_recipe("examples/quickstart/recipe.yaml", ["training.steps=20", "model.preset=135m"])
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import SodaError
from .files import write_text


@dataclass
class Prepare:
    """From speech to token stores."""

    speech: str = "asterisk"  # `asterisk`: the free prompts, fetched; or a folder of audio with a manifest
    languages: list[str] = field(default_factory=lambda: ["en", "es", "fr"])  # of the prompts
    downloads: str = "downloads"  # where fetched material is kept
    codec: str = "embedded"  # embedded | mimi
    codec_path: str = ""  # a fitted embedded codec, or Mimi's hub id or folder; empty: fit one | kyutai/mimi
    codebooks: int = 8
    entries: int = 2048  # in every codebook; only the embedded codec lets one choose
    tokenizer: str = ""  # a sentencepiece .model or a tokenizer.json; empty: train one on the transcripts
    text_pieces: int = 512  # ids of a tokenizer that is trained
    text: list[str] = field(default_factory=list)  # text files, a document a line; `wordnet`: fetched
    text_share: float = 0.05  # of all training tokens (paper: 5 %)
    valid_share: float = 0.05  # of the prompts
    test_share: float = 0.05
    workers: int = 0  # processes that encode; 0: one a core
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
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    # Std of a vector that all ids of a class share at the start, in the embedding and in the head. SODA has none. With
    # it a model finds out in a few steps at which slot of a frame it is: small ones learn several times faster.
    embedding_class_std: float = 0.0
    head_class_std: float = 0.0
    rope_theta: int = 500_000
    rope_scaling_factor: float = 8.0  # Llama-3's, with its other constants


# layers, hidden, ffn, heads, query groups, head_dim (soda_135m .. soda_4b: paper, section 3)
PRESETS = {
    "tiny": (3, 128, 384, 4, 2, 32),
    "135m": (15, 512, 1792, 8, 8, 64),
    "600m": (28, 1024, 3072, 16, 8, 128),
    "1.7b": (28, 2048, 6144, 16, 8, 128),
    "4b": (36, 2560, 9728, 32, 8, 128),
}
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")


@dataclass
class Data:
    path: str = ""  # folder with the stores train, valid and test; empty: RUN/data
    sequence_length: int = 4096


@dataclass
class Parallel:
    """Data parallelism takes the processes that are left: world size / (tensor * pipeline)."""

    tensor: int = 1
    pipeline: int = 1
    distributed_optimizer: bool = False


@dataclass
class Training:
    steps: int = 1000
    global_batch_size: int = 512  # sequences
    micro_batch_size: int = 1
    learning_rate: float = 3e-3
    warmup_share: float = 0.1  # of the steps
    decay_share: float = 0.2
    weight_decay: float = 0.033
    beta1: float = 0.98
    beta2: float = 0.98
    epsilon: float = 1e-16
    clip_grad: float = 1.0
    z_loss: float = 1e-4
    precision: str = "fp32"  # fp32 | bf16
    log_every: int = 10
    save_every: int = 250
    valid_every: int = 250
    valid_windows: int = 16
    backend: str = "auto"  # layers: auto | transformer_engine | local


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


def load_recipe(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a YAML recipe (None: all defaults), applies `section.key=value` overrides, checks everything.

    Raises SodaError for a file that is not there or not YAML, an unknown key (naming the nearest), a value of the
    wrong type, and values that contradict each other.
    """
    tree = OmegaConf.structured(Recipe)
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SodaError(f"{path}: cannot read the recipe ({error})") from None
        try:
            loaded = OmegaConf.create(text)  # omegaconf's loader is a safe one
        except Exception as error:  # yaml raises many kinds
            raise SodaError(f"{path}: not YAML: {error}") from None
        tree = _merge(tree, loaded, str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise SodaError(f"{override!r}: an override is written section.key=value")
        key = _full_key(key)
        try:
            parsed = OmegaConf.from_dotlist([f"{key}={value}"])
        except Exception as error:
            raise SodaError(f"{override!r}: the value is not YAML: {error}") from None
        tree = _merge(tree, parsed, override)
    recipe = OmegaConf.to_object(tree)
    assert isinstance(recipe, Recipe)
    _fill_preset(recipe.model)
    _check(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(asdict(recipe))))


def _merge(tree: Any, other: Any, source: str) -> Any:
    plain = OmegaConf.to_container(other)
    if plain is None:
        return tree
    if not isinstance(plain, dict):
        raise SodaError(f"{source}: a recipe is a mapping of sections")
    _check_keys(Recipe, plain, "", source)
    try:
        return OmegaConf.merge(tree, other)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise SodaError(f"{source}: {key}: {str(error).splitlines()[0]}") from None


def _check_keys(kind: Any, values: dict, prefix: str, source: str) -> None:
    known = {f.name: f for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), _all_keys() if not prefix else list(known), 1, 0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else f" Known here: {', '.join(known)}."
            raise SodaError(f"{source}: unknown key {prefix}{key}.{hint}")
        section = known[key].default_factory
        if is_dataclass(section):
            if not isinstance(value, dict):
                raise SodaError(f"{source}: {prefix}{key} is a section, not a value: write {prefix}{key}.KEY=VALUE")
            _check_keys(section, value, f"{prefix}{key}.", source)


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
    if model.preset not in PRESETS:
        near = difflib.get_close_matches(model.preset, PRESETS, 1, 0)
        raise SodaError(
            f"model.preset={model.preset}: no such preset. Did you mean {near[0]}? Known: {', '.join(PRESETS)}"
        )
    for name, size in zip(_SIZES, PRESETS[model.preset], strict=True):
        if getattr(model, name) == 0:
            setattr(model, name, size)


def _check(recipe: Recipe) -> None:
    def need(true: bool, message: str) -> None:
        if not true:
            raise SodaError(message)

    m, p, d, t, w = recipe.model, recipe.prepare, recipe.data, recipe.training, recipe.parallel
    for section, names in (
        (m, (*_SIZES, "norm_epsilon", "init_std", "rope_theta", "rope_scaling_factor")),
        (p, ("codebooks", "entries", "text_pieces")),
        (d, ("sequence_length",)),
        (t, ("steps", "global_batch_size", "micro_batch_size", "learning_rate", "epsilon", "log_every", "save_every")),
        (t, ("valid_every", "valid_windows")),
        (w, ("tensor", "pipeline")),
        (recipe.generate, ("temperature", "top_p", "max_seconds", "prompt_seconds")),
    ):
        for name in names:
            value = getattr(section, name)
            need(value > 0, f"{type(section).__name__.lower()}.{name}={value}: must be above 0")
    for section, names in (
        (p, ("text_share", "valid_share", "test_share", "max_rejects")),
        (t, ("warmup_share", "decay_share", "beta1", "beta2")),
    ):
        for name in names:
            value = getattr(section, name)
            need(0 <= value < 1 or (name == "max_rejects" and value == 1), f"{name}={value}: must be in [0, 1)")
    need(p.valid_share + p.test_share < 1, "prepare.valid_share and prepare.test_share leave nothing to train on")
    need(t.warmup_share + t.decay_share <= 1, "training.warmup_share and training.decay_share are over 1 together")
    for name in ("embedding_class_std", "head_class_std"):
        need(getattr(m, name) >= 0, f"model.{name}={getattr(m, name)}: must be 0 or above")
    need(t.clip_grad >= 0 and t.z_loss >= 0 and t.weight_decay >= 0, "clip_grad, z_loss and weight_decay must be >= 0")
    choice("training.precision", t.precision, ("fp32", "bf16"))
    choice("training.backend", t.backend, ("auto", "transformer_engine", "local"))
    choice("prepare.codec", p.codec, ("embedded", "mimi"))
    choice("evaluate.split", recipe.evaluate.split, ("train", "valid", "test"))
    choice("generate.split", recipe.generate.split, ("valid", "test"))
    for name in recipe.evaluate.suite:
        choice("evaluate.suite", name, ("nll", "grammar"))
    for name in recipe.generate.tasks:
        choice("generate.tasks", name, ("continue", "speak", "transcribe"))
    need(
        m.num_attention_heads % m.num_query_groups == 0,
        f"model.num_query_groups={m.num_query_groups} does not divide "
        f"model.num_attention_heads={m.num_attention_heads}",
    )
    need(m.head_dim % 2 == 0, f"model.head_dim={m.head_dim}: rotary positions need an even number")


def choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, 1, 0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SodaError(f"{key}={value}: must be one of {', '.join(known)}.{hint}")


def check_layout(recipe: Recipe, world_size: int) -> int:
    """The data-parallel size, or a SodaError that names what does not divide."""
    m, w, t = recipe.model, recipe.parallel, recipe.training
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(m, name) % w.tensor:
            raise SodaError(f"parallel.tensor={w.tensor} does not divide model.{name}={getattr(m, name)}")
    if m.num_layers % w.pipeline:
        raise SodaError(f"parallel.pipeline={w.pipeline} does not divide model.num_layers={m.num_layers}")
    if world_size % (w.tensor * w.pipeline):
        raise SodaError(
            f"{world_size} processes cannot be laid out as parallel.tensor={w.tensor} x "
            f"parallel.pipeline={w.pipeline}: start a multiple of {w.tensor * w.pipeline} (torchrun --nproc-per-node)"
        )
    data_parallel = world_size // (w.tensor * w.pipeline)
    if t.global_batch_size % (t.micro_batch_size * data_parallel):
        raise SodaError(
            f"training.global_batch_size={t.global_batch_size} is not a multiple of training.micro_batch_size="
            f"{t.micro_batch_size} times {data_parallel} data-parallel ranks"
        )
    return data_parallel
