"""Loads a checked recipe from YAML files and key=value overrides."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import SodaError
from ..files import check_regular, write_text
from ..log import log
from .fields import near
from .recipe import Recipe
from .renamed import RENAMED
from .yaml_files import UniqueKeys

BASE = "base"  # names another file, whose values apply unless this one overrides them
MOST_VALUES = 100_000  # in a recipe
_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load_recipe(
    path: str | Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads a YAML recipe (None: all defaults), applies `values`, then `section.key=value` overrides, and checks
    everything. `values` are taken as they are: what the program sets itself, such as a path, is not parsed again.

    A value is parsed by the type of its key. For a string, an override is taken literally, except for quotes around the
    whole value; a list of strings is [A,B], with quotes around elements that contain a comma. Everything else is YAML.
    There is no substitution: `${X}` is four characters. A file can build on another one: `base: other.yaml`.

    Raises SodaError for a file that is missing or not YAML, an unknown key (suggesting the nearest), a value of the
    wrong type, and contradictory values.
    """
    merged, old = _Values(), _Renaming()
    if path is not None:
        for file, content in _files(Path(path)):
            merged.merge(old.rename(content, str(file)), str(file))
    merged.merge(dict(values or {}), "the command line")
    for override in overrides:
        merged.merge(old.rename(_override(override), override), override)
    old.tell()
    return merged.validate()


def save_recipe(recipe: Recipe, path: Path) -> None:
    write_text(path, yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True))


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, with which editors complete keys and check values."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_RECIPE.json_schema()}
    schema["properties"] |= {BASE: {"type": "string", "description": "The recipe that this one builds on."}}
    return schema


# ---- files


class _Loader(UniqueKeys):
    """YAML with literal scalars. Their meaning depends on the type of the key: `no` is a language in prepare.languages,
    and false in parallel.sequence."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012  (merges, <<)


def _files(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A recipe's files with their contents, base files first."""
    if path.resolve() in above:
        raise SodaError(f"{above[-1]}: base: {path} builds on this recipe itself")
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SodaError(f"{path}: cannot read the recipe ({error})") from None
    content = _yaml(text, f"{path}: not YAML")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise SodaError(f"{path}: a recipe is a mapping of sections")
    if base := content.pop(BASE, None):
        if not isinstance(base, str):
            raise SodaError(f"{path}: base: must be the path of a recipe, not {base!r}")
        yield from _files(path.parent / Path(base).expanduser(), (*above, path.resolve()))
    yield path, content


def _yaml(text: str, problem: str) -> Any:
    try:
        value = yaml.load(text, _Loader)  # a safe loader
    except Exception as error:  # yaml raises many kinds of errors
        raise SodaError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from None
    left, count = [value], 0
    while left:  # aliases of aliases can make a few lines endless
        one = left.pop()
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        count += 1
        if count > MOST_VALUES:
            raise SodaError(f"{problem}: more than {MOST_VALUES:,} values")
    return value


# ---- overrides


def _override(override: str) -> dict[str, Any]:
    """`section.key=value` as a nested mapping."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SodaError(f"{override!r}: write an override as section.key=value")
    path = _path(_full_key(key, text))
    kind = _kind_of(path)
    if get_origin(kind) is list and all(arg is str or get_origin(arg) is Literal for arg in get_args(kind)):
        value: Any = _elements(text, override)
    elif is_dataclass(kind) or get_origin(kind) in (dict, list):
        value = _yaml(text, f"{override!r}: the value is not YAML")
    else:
        value = _unquoted(text)
    for name in reversed(path):
        value = {name: value}
    return value


def full_key(override: str) -> str:
    """The key that an override sets, with its section."""
    key, _, text = override.partition("=")
    return _full_key(key, text)


def _path(key: str) -> list[str]:
    """The names in a dotted key. The name of a mapping entry may contain dots: data.corpora.yodas2.en"""
    path: list[str] = []
    while key:
        if get_origin(_kind_of(path)) is dict:
            return [*path, key]
        name, _, key = key.partition(".")
        path.append(name)
    return path


def _full_key(key: str, text: str) -> str:
    """A key without a section (`suite`) means the key of that name, if there is exactly one."""
    if "." in key:
        return key
    if is_dataclass(_kind_of([key])) and f"training.{key}" in RENAMED and not text.lstrip().startswith("{"):
        return f"training.{key}"  # `precision=bf16`, which is now a section
    owners = [k for k in all_keys() if k.rpartition(".")[2] == key]
    return owners[0] if len(owners) == 1 else key


def all_keys() -> list[str]:
    """Every key of a recipe, with its section's name if it has one."""
    keys = []
    for name, kind in _hints(Recipe).items():
        keys.append(name)
        if is_dataclass(kind):
            keys += [f"{name}.{f.name}" for f in fields(kind)]
    return keys


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)  # slow, and asked for every key of every file


def _kind_of(path: list[str]) -> Any:
    """A key's type; str if it does not exist, which validation reports."""
    kind: Any = Recipe
    for name in path:
        if is_dataclass(kind):
            kind = _hints(kind).get(name, str)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return str
    return kind


_DOUBLE, _SINGLE = r'"(?:[^"\\]|\\.)*"', r"'(?:[^']|'')*'"
_ELEMENT = re.compile(rf"\s*(?:(?P<quoted>{_DOUBLE}|{_SINGLE})\s*|(?P<plain>(?:\[[^\[\]]*\]|[^,])*))(?:,|$)", re.S)


def _unquoted(text: str) -> str:
    """The text without quotes around the whole of it, as in a shell."""
    if re.fullmatch("'[^']*'", text):
        return text[1:-1]
    return re.sub(r'\\(["\\])', r"\1", text[1:-1]) if re.fullmatch(_DOUBLE, text, re.S) else text


def _elements(text: str, source: str) -> list[str]:
    """The strings in [A,'B',"C"]. A comma inside brackets, as in /data/[a,b].txt, is part of an element."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and len(text) > 1):
        raise SodaError(f"{source}: write a list as [A,B], an empty one as []")
    text, at, found = text[1:-1].strip(), 0, []
    while at < len(text) and (match := _ELEMENT.match(text, at)):
        quoted, at = match["quoted"], match.end()
        found.append(_yaml(quoted, f"{source}: {quoted} is not YAML") if quoted else match["plain"].strip())
        if not (quoted or found[-1]):
            raise SodaError(f"{source}: the list has an empty element")
    return found


# ---- values


class _Renaming:
    """Renames keys of earlier versions, and reports it once."""

    def __init__(self) -> None:
        self.told: dict[str, list[str]] = {}

    def rename(self, values: dict[str, Any], source: str) -> dict[str, Any]:
        renamed: dict[str, Any] = {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}
        for old, new in RENAMED.items():
            (section, name), (new_section, new_name) = old.split("."), new.split(".")
            of_old = renamed.get(section)
            if not (isinstance(of_old, dict) and name in of_old):
                continue
            if renamed.get(new_section) in ("", None):
                renamed[new_section] = {}
            of_new = renamed[new_section]
            if not isinstance(of_new, dict):
                raise SodaError(f"{source}: {new_section} is a section, not a value: write {new_section}.KEY=VALUE")
            if new_name in of_new:
                raise SodaError(f"{source}: {old} is now {new}, and both are given. Remove {old}.")
            of_new[new_name] = of_old.pop(name)
            self.told.setdefault(source, []).append(f"{old} is now {new}")
        return renamed

    def tell(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return  # one rank per host reports it
        for source, changes in self.told.items():
            log.warning(f"{source}: keys have new names: {', '.join(changes)}")


class _Values:
    """Values as strings, by key, and where each was given."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[tuple[str, ...], str] = {}

    def merge(self, values: dict[str, Any], source: str) -> None:
        self._merge(self.values, values, (), source)

    def _merge(self, into: dict[str, Any], values: dict[str, Any], path: tuple[str, ...], source: str) -> None:
        for name, value in values.items():
            here = (*path, str(name))
            kind = _kind_of(list(here))
            if value == "" and is_dataclass(kind):  # `training:` with nothing below it
                continue
            if isinstance(value, dict) and isinstance(into.get(name), dict):
                self._merge(into[name], value, here, source)
            else:
                into[str(name)] = {} if isinstance(value, dict) else value
                if isinstance(value, dict):
                    self._merge(into[str(name)], value, here, source)
            self.sources[here] = source

    def validate(self) -> Recipe:
        try:
            return _RECIPE.validate_python(self.values)
        except ValidationError as error:
            lines = [self._message(problem) for problem in error.errors(include_url=False)]
            raise SodaError("\n".join(dict.fromkeys(lines))) from None

    def _message(self, problem: Any) -> str:
        location = tuple(part for part in problem["loc"] if part != "[key]")
        key = _dotted(location)
        names = tuple(str(part) for part in location if not isinstance(part, int))
        while names and names not in self.sources:
            names = names[:-1]
        source, kind, value = self.sources.get(names, "recipe"), problem["type"], problem["input"]
        if kind == "unexpected_keyword_argument":
            return f"{source}: unknown key {key}.{_nearest(location)}"
        if kind == "dataclass_type" and isinstance(location[-1], int):
            return f"{source}: {key} must be a mapping with the keys from_step and shares"
        if kind == "dataclass_type":
            return f"{source}: {key} is a section, not a value: write {key}.KEY=VALUE"
        if kind in _TYPES:
            return f"{source}: {key}: must be {_TYPES[kind]}, not {value!r}"
        file = f"{source}: " if "=" not in source else ""
        hint = ""
        if kind == "literal_error":
            known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            must, hint = f"one of {', '.join(k for k in known if k)}", near(str(value), known)
        else:
            must = str(_MUST.get(kind, problem["msg"])).format(**problem.get("ctx", {}))
        shown = value if isinstance(value, str) else repr(value)
        return f"{file}{key}={shown}: must be {must}.{hint}" if hint else f"{file}{key}={shown}: must be {must}"


_MUST = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or above",
    "less_than": "below {lt:g}",
    "less_than_equal": "{le:g} or below",
    "finite_number": "a finite number",
}
_TYPES = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, [A,B]",
    "dict_type": "a mapping, {NAME: VALUE}",
}


def _dotted(location: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _nearest(location: tuple[Any, ...]) -> str:
    """ " Did you mean ..?" for an unknown key, or the known keys."""
    *path, name = location
    kind = _kind_of([str(part) for part in path if not isinstance(part, int)])
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    known = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    if elsewhere := [key for key in all_keys() if path and key.endswith(f".{name}")]:
        return f" Did you mean {elsewhere[0]}?"
    if hint := near(str(name), known if path else all_keys()):
        return hint.replace("mean ", f"mean {_dotted(tuple(path))}." if path else "mean ")
    return f" Known here: {', '.join(known)}."
