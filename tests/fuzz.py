"""Damage, seeded: a small sample of it in the default suite, thousands in tests/full/test_fuzz.py."""

import contextlib
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from megatron_soda.data import validate as validating
from megatron_soda.data.store import Store, convert, write_store
from megatron_soda.data.validate import validate
from megatron_soda.errors import SodaError
from tests.helpers import SPACE, documents


def damaged(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """What was done, and the bytes after it: one fault of the kinds that disks, networks and editors make."""
    kind = draw.choice(("bit", "byte", "cut", "insert", "delete", "swap", "zeros", "repeat", "append"))
    size = len(whole)
    at, length = draw.randrange(size), draw.choice((1, 4, 8, 64, max(1, size // 4)))
    block = whole[at : at + length]
    if kind == "bit":
        return kind, whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    if kind == "byte":
        return kind, whole[:at] + draw.randbytes(1) + whole[at + 1 :]
    if kind == "cut":
        return kind, whole[:at]
    if kind == "insert":
        return kind, whole[:at] + draw.randbytes(length) + whole[at:]
    if kind == "delete":
        return kind, whole[:at] + whole[at + length :]
    if kind == "swap":
        other = draw.randrange(size)
        first, second = sorted((at, other))
        length = min(length, second - first, size - second)
        middle = whole[first + length : second]
        swapped = whole[second : second + length] + middle + whole[first : first + length]
        return kind, whole[:first] + swapped + whole[second + length :]
    if kind == "zeros":
        return kind, whole[:at] + bytes(len(block)) + whole[at + len(block) :]
    if kind == "repeat":
        return kind, whole[:at] + block + whole[at:]
    return kind, whole + draw.randbytes(length)


ODD = (  # in place of a value: text, as no JSON writer would write some of them
    *("null", "true", "[]", "{}", '""', "-1", "0", "1.5", "1e999", "-1e999", "NaN", "Infinity", '"\\ud800"'),
    *("1" * 5000, "9223372036854775808", '"x"', "[[1]]", '{"a": 1}', "[" * 3000 + "]" * 3000, '"../../x"', "[null]"),
    *('{"a":' * 2000 + "1" + "}" * 2000, '"' + "x" * 100_000 + '"', "1e-400", '"16"', "[1, 2]", '"\\u0000"'),
)


def edited(value: Any, draw: random.Random) -> tuple[str, bytes]:
    """A JSON value with a key renamed, gone or added, or another value somewhere; or as a file that is not UTF-8."""
    value = json.loads(json.dumps(value))
    kind = draw.choice(("value", "value", "value", "value", "rename", "remove", "add", "file"))
    text = json.dumps(value)
    if kind == "file":
        encoding = draw.choice(("utf-16", "utf-8-sig", "nul", "latin-1", "empty", "twice"))
        if encoding in ("utf-16", "utf-8-sig"):
            return encoding, text.encode(encoding)
        changed = {"nul": b"\0" + text.encode(), "latin-1": text.encode() + b" \xe9", "empty": b""}
        return encoding, changed.get(encoding, (text + text).encode())
    holders = list(_holders(value))
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    mark = "\x01here\x01"
    if isinstance(holder, list) or kind == "value":
        kind, holder[key] = "value", mark
    elif kind == "rename":
        holder[f"{key}s"] = holder.pop(key)
    elif kind == "remove":
        del holder[key]
    else:
        holder["zzz"] = mark
    odd = draw.choice(ODD)
    return f"{kind} {key} {odd[:20]}", json.dumps(value).replace(json.dumps(mark), odd).encode()


def _holders(value: Any) -> Iterator[Any]:
    """All dicts and lists in a value that hold something."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for one in value.values() if isinstance(value, dict) else value:
            yield from _holders(one)


# ---- stores


def fuzz_stores(folder: Path, count: int, seed: int) -> Counter[str]:
    """Damages one file of a store at a time. What is not as it was written must be named by `soda validate` and refused
    by `soda convert-store`; opening and reading may also do well, but not crash."""
    draw, found = random.Random(seed), Counter[str]()
    quiet = Console(file=io.StringIO())
    made = documents(12, seed)
    others = {"megatron": "compact", "compact": "megatron"}
    whole: dict[str, dict[Path, bytes]] = {}
    for format in others:
        path = folder / format / "s"
        write_store(path, made, SPACE, format, codec="0123456789abcdef", tokenizer="fedcba9876543210")
        whole[format] = {file: file.read_bytes() for file in path.parent.iterdir()}
    for number in range(count):
        format = draw.choice(list(others))
        path = folder / format / "s"
        for file in path.parent.iterdir():
            if file not in whole[format]:
                file.unlink()
        for file, content in whole[format].items():
            file.write_bytes(content)
        victim = draw.choice(sorted(whole[format]))
        if victim.suffix == ".json" and draw.random() < 0.7:
            what, content = edited(json.loads(whole[format][victim]), draw)
        else:
            what, content = damaged(whole[format][victim], draw)
        victim.write_bytes(content)
        where = f"seed {seed}, mutant {number}: {victim.name}, {what}"
        same = content == whole[format][victim] or (victim.suffix == ".json" and _same(content, whole[format][victim]))

        said = io.StringIO()
        with contextlib.redirect_stdout(said), mock.patch.object(validating, "console", quiet):
            valid = validate(path.parent, ["s"])
        assert valid == same, f"{where}: {said.getvalue()}"
        assert valid or "s." in said.getvalue(), where

        with contextlib.suppress(SodaError):
            store = Store(path)
            for index in range(len(store)):
                store.document(index)
            store.read(0, min(store.size, 1000))
            list(store.parts())

        out = folder / "out" / "s"
        shutil.rmtree(out.parent, ignore_errors=True)
        refused = ""
        try:
            convert(Store(path), out, others[format])
        except SodaError as error:
            refused = str(error)
        found[f"{victim.suffix[1:]}: {'refused' if refused else 'harmless'}"] += 1
        assert bool(refused) != same, f"{where}: {refused or 'converted'}"
        if refused:
            assert not list(out.parent.glob("s.*")), where
            continue
        again = Store(out)
        assert again.meta["codec"] == "0123456789abcdef"
        assert all(np.array_equal(again.document(i), document) for i, document in enumerate(made)), where
    return found


def _same(content: bytes, whole: bytes) -> bool:
    """Whether two JSON files hold the same values."""
    try:
        return json.loads(content.decode("utf-8-sig")) == json.loads(whole) and b"true" not in content
    except ValueError:
        return False
    except RecursionError:
        return False
