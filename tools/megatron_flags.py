"""Megatron-LM's flags, shared by preprocess_data.py and convert_checkpoint.py."""

import argparse
import difflib
import sys
from collections.abc import Callable

from megatron_soda.errors import SodaError, say


def parse(parser: argparse.ArgumentParser, elsewhere: dict[str, str]) -> argparse.Namespace:
    """Parses the command line. `elsewhere`: flags of Megatron-LM's tool that ours lacks, with what to do instead.

    Raises SodaError for an unknown flag."""
    found, unknown = parser.parse_known_args()
    if not unknown:
        return found
    name = unknown[0].split("=")[0]
    if name in elsewhere:
        raise SodaError(f"{name}: {elsewhere[name]}")
    if not name.startswith("-"):
        raise SodaError(f"{name}: not a flag, and not a value of one")
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(name, known, 1, 0.4)
    raise SodaError(f"{name}: no such flag." + (f" Did you mean {near[0]}?" if near else " See --help."))


def run(main: Callable[[], None]) -> None:
    """Runs the tool. A SodaError exits with status 2."""
    try:
        main()
    except SodaError as error:
        say(f"error: {error}")
        sys.exit(2)
