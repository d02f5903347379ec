"""The stores a run trains and validates on, and checks that they are the ones its checkpoint was trained on."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..config import Recipe
from ..data.files import checksum, sampled_checksum, store_file
from ..data.mixture import Mixture, Stage
from ..data.packed import Packed, name_documents, without_response
from ..data.store import Store
from ..data.windows import Corpus, Samples, Windows
from ..errors import SodaError, user_message
from ..parallel import preflight, ranks
from ..vocab import TokenSpace
from .origin import Origin

_READ_WHOLE = 1 << 30  # bytes: up to this size, every byte of a store is checked at startup; above it, samples are


@dataclass
class Stores:
    train: dict[str, Store]  # by corpus
    valid: Store

    @property
    def space(self) -> TokenSpace:
        return self.valid.space

    @property
    def slots(self) -> set[int]:
        """Codes of a frame: all codebooks, or 1 in semantic-only stores."""
        return {store.slots for store in self.all()}

    @property
    def made_by(self) -> dict[str, str]:
        """Fingerprints of the codec and the tokenizer; Mixture has checked that all corpora share them."""
        return {kind: value for store in self.train.values() for kind, value in store.made_by.items()}

    def all(self) -> list[Store]:
        return [*self.train.values(), self.valid]


def open_stores(recipe: Recipe, device: torch.device) -> Stores:
    """All ranks call this. Raises SodaError on all of them if one cannot read a store or sees a different one, or if a
    store's bytes have changed since it was written, or if one has documents without a response (data.prompt_spans)."""
    with preflight.together(device):
        named = recipe.data.corpora or {"train": str(recipe.data_folder / "train")}
        stores = Stores({name: Store(path) for name, path in named.items()}, Store(recipe.data_folder / "valid"))
        for store in stores.train.values():
            store.check_space(stores.space, f"the validation data ({stores.valid.path})")
        stores.valid.check_made_by(stores.made_by, "the training data", recipe.data.accept)
    preflight.compare_stores({str(store.path): _identity(store) for store in stores.all()}, device)
    with preflight.together(device):
        for store in stores.all() if ranks.is_first() else ():
            if problem := _changed_bytes(store) or without_response(
                store, recipe.data.prompt_spans, recipe.data.sequence_length
            ):
                raise SodaError(problem)
    return stores


def _identity(store: Store) -> dict[str, str]:
    """Identifies a store, with a checksum over samples of its bytes."""
    samples = [sampled_checksum(path) for _, path in sorted(store.files.items())]
    found = {"fingerprint": store.fingerprint, "format": store.format, "sampled": "-".join(samples)}
    return {**found, **store.made_by}


def _difference(was: dict[str, str], now: dict[str, str]) -> str:
    """Empty if both hold the same ids, in whatever format; otherwise the difference, before `from the one ..`."""
    for kind in ("codec", "tokenizer"):
        if was.get(kind) != now.get(kind):
            return f"made by a different {kind} ({now.get(kind)}, was {was.get(kind)})"
    if was["fingerprint"] != now["fingerprint"]:
        return f"a different store (fingerprint {now['fingerprint']}, was {was['fingerprint']})"
    if was["format"] == now["format"] and was["sampled"] != now["sampled"]:
        return "a store with different bytes, though its .json is the same (see `soda validate`),"
    return ""


def _changed_bytes(store: Store) -> str:
    """What has changed in a small store since it was written; large ones are left to `soda validate`."""
    written = store.meta.get("files") or {}  # early stores have no checksums
    if sum(path.stat().st_size for path in store.files.values()) > _READ_WHOLE:
        return ""
    for suffix, path in store.files.items():
        if suffix in written and checksum(path) != written[suffix]["crc32"]:
            return (
                f"{path}: its bytes have changed since it was written. Put the file back as it was, or run "
                "`soda prepare` again."
            )
    return ""


class Source(Samples, Protocol):
    """The stream of training samples. Sample n is the same on every rank and at every layout; `str` describes the
    stream."""

    length: int  # tokens per sample

    def consumed(self, sample: int) -> dict[str, int]:
        """How many of the first `sample` samples came from each corpus."""
        ...


class Corpora:
    """`source` provides training samples, `valid` the validation data, and `description` what a checkpoint records
    about them. Raises SodaError if the data or their order do not match the steps already trained."""

    def __init__(self, recipe: Recipe, stores: Stores, origin: Origin) -> None:
        d = recipe.data
        self.stores = stores
        corpora = {  # those of the same size must not use their windows in the same order: their documents may be too
            name: _windows(recipe, store, recipe.seed + zlib.crc32(name.encode()), d.align_windows)
            for name, store in stores.train.items()
        }
        self.source: Source = _open_mixture(recipe, corpora, origin)
        self.valid = _windows(recipe, stores.valid, recipe.seed)
        wanted = recipe.training.valid_windows
        self.valid_count = min(wanted, self.valid.count)
        batch = recipe.training.global_batch_size if len(corpora) == 1 else 0  # of several, the mix decides
        self.notes = [  # messages for the user
            *(note for name, corpus in corpora.items() for note in _about_packing(f"corpus {name}", corpus, batch)),
            *_about_packing("validation", self.valid, 0),
        ]
        if self.valid_count < wanted:
            self.notes.append(
                f"validation is over the {self.valid_count} windows that {stores.valid.path} has, not over "
                f"training.valid_windows={wanted}."
            )
        self.made_by = {**origin.saved.get("made_by", {}), **stores.made_by}
        order = {"seed": recipe.seed, **{key: getattr(d, key) for key in _ORDER if key != "seed"}}
        now = {n: {**_identity(s), "tokens": s.size, **order} for n, s in stores.train.items()}
        # Corpora no longer in the mix have still been used, and may come back.
        self.description: dict[str, Any] = {
            "corpora": {**_saved_corpora(origin), **now},
            "valid": _identity(stores.valid),
        }
        self._seen = {store.path: (_stamp(store), _identity(store)) for store in stores.all()}
        self._check_same(recipe, origin)

    @property
    def space(self) -> TokenSpace:
        return self.stores.space

    def _check_same(self, recipe: Recipe, origin: Origin) -> None:
        """The steps behind us must have used up what the recipe says they have, or data would be lost or repeated; and
        the model must know what the ids mean."""
        if origin.kind == "weights only":  # no step is done, but the model knows some ids
            for store in self.stores.train.values():
                store.check_made_by(origin.saved["made_by"], f"the model ({origin.folder})", recipe.data.accept)
        if origin.kind in ("fresh", "weights only"):
            return
        saved, samples = origin.saved, origin.first_sample(origin.step)
        if saved["samples"] != samples:
            raise SodaError(
                f"the checkpoint of step {saved['step']} has seen {saved['samples']} samples, and by this recipe "
                f"it would be {samples}: training.global_batch_size={recipe.training.global_batch_size} is not what it "
                "was. Set it back, or branch off a new run: training.branch_from"
            )
        used = (saved["consumed"], self.source.consumed(samples))
        before, now = ({name: count for name, count in of.items() if count} for of in used)
        if before != now:
            raise SodaError(
                f"the shares of steps that are done were changed: by data.mix, step {saved['step']} has used up "
                f"{now} samples, but the checkpoint says {before}. Leave finished stages as they were, and "
                f"add one with from_step: {saved['step']} or later"
            )
        for name, store in self.stores.train.items():
            if before.get(name):  # the others cannot be repeated
                self._check_corpus(name, origin)
            store.check_made_by(saved.get("made_by", {}), f"the model ({origin.folder})", recipe.data.accept)
        if "valid" not in saved.get("data", {}):
            self.notes.append(
                f"{origin.folder} does not say which stores it was trained on (an earlier version wrote it): "
                "the recipe's stores are used unchecked."
            )
            return
        problem = _difference(saved["data"]["valid"], self.description["valid"])
        if not problem:
            return
        told = (
            f"{self.stores.valid.path} is {problem} from the one that {origin.folder} used: losses are not comparable"
        )
        if origin.kind == "branched" or "validation" in recipe.data.accept:
            self.notes.append(f"{told}.")
            return
        raise SodaError(
            f"{told}, and the new one may contain documents that were trained on. Restore it, or accept "
            "it: data.accept=[validation]"
        )

    def _check_corpus(self, name: str, origin: Origin) -> None:
        """The used windows must be the first ones in the recipe's order."""
        now: dict[str, Any] = self.description["corpora"][name]
        # An earlier version did not record all of it.
        was = {**now, "pack": False, **_saved_corpora(origin).get(name, {})}
        saved = f"when the checkpoint of step {origin.step} was written"
        for key, setting in _ORDER.items():
            if was[key] != now[key]:
                raise SodaError(
                    f"{setting} was {was[key]} {saved}, and is {now[key]}: corpus {name} would be cut into different "
                    f"windows or be read in a different order, so used data could not be skipped. {_WAYS_OUT}"
                )
        problem = _difference(was, now)
        if was["tokens"] != now["tokens"]:
            problem = f"a different store ({now['tokens']:,} tokens, was {was['tokens']:,})"
        if problem:
            raise SodaError(
                f"corpus {name}: {self.stores.train[name].path} is {problem} from the one that {origin.folder} was "
                f"trained on: data would be repeated or left out. {_WAYS_OUT}"
            )

    def overwritten(self) -> str:
        """What happened to a store since the run began; empty: nothing. Costs a few calls of stat, unless something
        did."""
        for store in self.stores.all():
            stamp, identity = self._seen[store.path]
            if (now := _stamp(store)) == stamp:
                continue
            try:
                again = Store(store.path)
                problem = _difference(identity, _identity(again)) or _changed_bytes(again)
            except (SodaError, OSError) as error:
                problem = user_message(error)
            if problem:
                return f"{store.path} was written to while the run was training on it: {problem}"
            self._seen[store.path] = now, identity
        return ""


_ORDER = {
    "seed": "seed",
    "sequence_length": "data.sequence_length",
    "align_windows": "data.align_windows",
    "pack": "data.pack",
}  # of checkpoint.json: settings
_WAYS_OUT = (
    "Set it back. To continue from this checkpoint with other data, give them a new name in data.corpora and "
    "branch off in a new run folder (training.branch_from)."
)


def _saved_corpora(origin: Origin) -> dict[str, dict[str, Any]]:
    """By name, what the checkpoint records about the corpora it was trained on."""
    data = origin.saved.get("data", {})
    if "corpora" in data:
        return data["corpora"]
    order = {key: data[setting] for key, setting in _ORDER.items() if setting in data}  # from an earlier version
    return {name: {"tokens": tokens, **order} for name, tokens in data.get("tokens", {}).items()}


def _stamp(store: Store) -> list[tuple[int, int, int] | None]:
    stamps: list[tuple[int, int, int] | None] = []
    for path in (store_file(store.path, "json"), *store.files.values()):
        try:
            found = os.stat(path)
            stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
        except FileNotFoundError:
            stamps.append(None)
    return stamps


def _windows(recipe: Recipe, store: Store, seed: int, aligned: bool = False) -> Corpus:
    d = recipe.data
    if d.pack:
        return Packed(store, d.sequence_length, seed, d.prompt_spans)
    return Windows(store, d.sequence_length, seed, aligned)


def _about_packing(what: str, corpus: Corpus, batch: int) -> Iterator[str]:
    """How the documents of a corpus are packed, and which are left out. batch: windows a step, all of this corpus;
    0: not trained on, or others are mixed in."""
    if not isinstance(corpus, Packed):
        return
    packed, left_out = len(corpus.store) - len(corpus.too_long), corpus.too_long.tolist()
    epoch = f"; an epoch is {corpus.count / batch:,.1f} steps" if batch else ""
    yield f"{what}: {packed:,} documents in {corpus.count:,} windows, {corpus.fill:.0%} full{epoch}."
    if left_out:
        yield (
            f"{what}: {len(left_out):,} of {len(corpus.store):,} documents of {corpus.store.path} are longer than "
            f"data.sequence_length={corpus.length} + 1 tokens and are left out: {name_documents(left_out)}. "
            f"The longest has {int(corpus.lengths.max()):,} tokens."
        )


def _open_mixture(recipe: Recipe, corpora: dict[str, Corpus], origin: Origin) -> Mixture:
    """The training data as a stream of samples from the recipe's corpora, by their shares."""
    d, branch = recipe.data, origin.branch
    # Stages are counted from step 0 of the original run, so that the same mix continues with the same samples.
    stages = [Stage(origin.first_sample(stage.from_step), stage.shares) for stage in d.mix]
    if stages and d.mix[0].from_step > branch.step:
        raise SodaError(
            f"data.mix: the first stage is from_step {d.mix[0].from_step}, but training begins at step {branch.step}"
        )
    stages = stages or [Stage(branch.samples, {next(iter(corpora)): 1.0})]
    return Mixture(corpora, stages, branch.samples, branch.consumed)
