"""Types and checks for the fields of the recipe's sections."""

import difflib
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from ..errors import SodaError

# The docstring below a field becomes its description in the JSON schema.
SECTION = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


def _empty_is_none(value: object) -> object:
    return None if value in ("", "~", "null") else value


OrNone = BeforeValidator(_empty_is_none)


def near(word: str, known: Sequence[str], cutoff: float = 0.4) -> str:
    """ " Did you mean ..?" with the nearest known word, or an empty string."""
    found = difflib.get_close_matches(word, known, 1, cutoff)
    return f" Did you mean {found[0]}?" if found else ""


def choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raises SodaError, with the nearest known value, if `value` is not one of them."""
    if value not in known:
        raise SodaError(f"{key}={value}: must be one of {', '.join(known)}.{near(value, known)}")


def need(holds: bool, message: str) -> None:
    if not holds:
        raise SodaError(message)
