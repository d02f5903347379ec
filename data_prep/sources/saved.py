"""Hugging Face datasets on disk: as written by `save_to_disk` (Arrow), or as Parquet shards as on the hub.

Read with pyarrow only. Sounds stay in place: one in an Arrow file is a range of the file's bytes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError
from megatron_soda.files import read_json, reading

from ..utterance import Reject, Utterance
from . import files, manifest, rows
from .files import BadLine
from .rows import Found, Row, Wanted

STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Found:
    """Datasets, their .arrow files or Parquet shards, and folders of these.

    An id is the id column's, preceded by the name of the split or folder for an Arrow dataset; without such a column it
    is the shard's name and the row. Raises SodaError for unsuitable columns and compressed Arrow files.
    """
    failed: list[Reject] = []
    for place in places:
        for file, folder in _shards(place, failed):
            if isinstance(file, Reject):
                yield Reject(files.relative(Path(file.where), root), file.reason)
                continue
            name = files.relative(file, root)
            if files.kind(file) == ".parquet":
                yield from manifest.parquet(file, name, scratch, True, wanted)
            elif file.suffix.lower() == ".arrow":
                prefix = "" if folder == root else f"{files.relative(folder, root)}/"
                yield from _arrow(file, name, prefix, wanted)
            else:
                yield Reject(name, "not a dataset: its name does not end in .arrow or .parquet")
    yield from failed


def is_dataset(names: list[str]) -> bool:
    """Whether save_to_disk made a folder with these files."""
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names)


def _shards(place: Path, failed: list[Reject]) -> Iterator[tuple[Path | Reject, Path]]:
    """Files, each with its dataset's folder."""
    if not place.is_dir():
        yield place, place.parent
        return
    for here, folders, names in files.walk(place, failed):
        if "dataset_dict.json" in names:
            splits = _strings(here / "dataset_dict.json", lambda content: content["splits"])
            # In the dataset's order; a missing split is reported, not skipped.
            yield from ((Reject(str(here / split), "no such split"), here) for split in splits if split not in folders)
            folders[:] = [split for split in splits if split in folders]
        elif "state.json" in names:
            shards = _strings(here / "state.json", lambda content: [one["filename"] for one in content["_data_files"]])
            for shard in shards:
                yield (
                    (here / shard if shard in names else Reject(str(here / shard), "no file: a shard is missing")),
                    here,
                )
            folders.clear()
        else:
            yield from ((here / name, here) for name in names if files.kind(name) in (".arrow", ".parquet"))


def _strings(path: Path, get: Callable[[Any], list[object]]) -> list[str]:
    with reading(path, "not what datasets.save_to_disk writes; save the dataset again"):
        return list(dict.fromkeys(str(one) for one in get(read_json(path))))


def _arrow(file: Path, name: str, prefix: str, wanted: Wanted) -> Found:
    number = 0
    try:
        with pa.memory_map(str(files.regular(file))) as mapped:
            whole = mapped.read_buffer()
    except (pa.ArrowException, OSError, BadLine) as error:
        yield Reject(name, f"cannot be read: {error}")
        return
    try:
        stream = pa.ipc.open_stream(whole)
        column = manifest.sound_column(file, stream.schema, wanted)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Reject(name, f"not an Arrow stream: or it is cut short ({error})")
        return

    known, classes = manifest.known_columns(stream.schema, column, wanted), manifest.class_names(stream.schema)

    def make(row: Row) -> Utterance:
        sound = row[manifest.SOUND]
        if not isinstance(sound, Sound):
            path = rows.string({"audio": sound}, "audio")
            if not path:
                raise BadLine("no 'audio'")
            start, end, seconds = rows.segment(row)
            sound = Sound(str(_path(file.parent, path, wanted)), start=start, end=end, seconds=seconds)
        id = rows.own_id(row, f"{files.stem(name)}:{row[manifest.ROW]}", prefix)
        return rows.utterance(row, sound, id, wanted.needs_text)

    def found() -> Iterator[tuple[str, Row | BadLine]]:
        nonlocal number
        try:
            for batch in stream:
                for row in _rows(file, whole, batch, column, known, classes):
                    yield f"{name}:{number}", {**row, manifest.ROW: number}
                    number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{name}:{number}", BadLine(f"cut short: or damaged ({error})")
            return
        if whole.slice(max(0, whole.size - len(STREAM_END))).to_pybytes() != STREAM_END:
            yield f"{name}:{number}", BadLine("cut short: the Arrow stream has no end")

    yield from rows.collect(found(), make, wanted)


def _rows(
    file: Path, whole: pa.Buffer, batch: pa.RecordBatch, column: str, known: list[str], classes: dict[str, list[str]]
) -> list[dict[str, object]]:
    """The `known` columns of a batch, plus the Sound in `column`, or the path as written there."""
    batch.validate()
    values: dict[str, list[object]] = {}
    for name in known:
        if name != column:
            batch.column(name).validate(full=True)
            values[name] = batch.column(name).to_pylist()
    held: Any = batch.column(column)
    if pa.types.is_struct(held.type):
        values[manifest.SOUND] = _sounds(file, whole, held)
    else:
        held.validate(full=True)
        values[manifest.SOUND] = held.to_pylist()
    found = [{name: held[row] for name, held in values.items()} for row in range(batch.num_rows)]
    return [manifest.with_class_names(row, classes) for row in found]


def _sounds(file: Path, whole: pa.Buffer, structs: Any) -> list[object]:
    """Where a column's bytes are in the file: Arrow returns the mapped file itself, so addresses give the position."""
    content = structs.field("bytes")
    width = np.int64 if pa.types.is_large_binary(content.type) else np.int32
    if not (pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)):
        raise SodaError(f"{file}: the sounds are of the type {content.type}; binary or large_binary is needed.")
    paths: list[Any] = [None] * len(structs)
    if structs.type.get_field_index("path") >= 0:
        structs.field("path").validate(full=True)
        paths = structs.field("path").to_pylist()
    _, places, data = content.buffers()
    size = 0 if data is None else data.size
    # Arrow stores empty data elsewhere.
    base = 0 if data is None or not size else data.address - whole.address
    if not 0 <= base <= base + size <= whole.size:
        raise SodaError(
            f"{file}: its buffers are compressed, so the sounds cannot be read where they are. Save the dataset again "
            "with datasets' save_to_disk, or as Parquet."
        )
    # A column without rows may have no offsets.
    offsets = np.frombuffer(places, width)[content.offset :].astype(np.int64) if len(content) else np.zeros(1, np.int64)
    found: list[object] = []
    valid = np.array(content.is_valid().to_pylist(), bool) & np.array(structs.is_valid().to_pylist(), bool)
    for row, (path, there) in enumerate(zip(paths, valid, strict=True)):
        begin, end = int(offsets[row]) if there else 0, int(offsets[row + 1]) if there else 0
        if not 0 <= begin <= end <= size:
            raise pa.ArrowInvalid(f"row {row} of a batch is outside its buffer")
        name = Path(path).name if isinstance(path, str) else ""
        found.append(Sound(str(file), offset=base + begin, size=end - begin, name=name) if there else path)
    return found


def _path(folder: Path, name: str, wanted: Wanted) -> Path:
    """A path in a dataset is usually absolute, pointing to where the sounds were when it was made, so it may lead
    anywhere unless wanted.audio_root is set."""
    if wanted.audio_root:
        return rows.inside(wanted.audio_root, name)[0]
    return rows.existing(folder, rows.plain_path(name), name)
