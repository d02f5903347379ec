"""What preprocess_data.py and convert_checkpoint.py share: flags by Megatron-LM's names."""

import argparse
import difflib
import sys
from collections.abc import Callable

from megatron_soda.errors import SodaError


def parse(parser: argparse.ArgumentParser, elsewhere: dict[str, str]) -> argparse.Namespace:
    """The flags of the command line. `elsewhere`: flags of Megatron-LM's tool that ours lacks, with what to do instead.

    SodaError for a flag that is not ours."""
    found, unknown = parser.parse_known_args()
    if not unknown:
        return found
    name = unknown[0].split("=")[0]
    if name in elsewhere:
        raise SodaError(f"{name}: {elsewhere[name]}")
    if not name.startswith("-"):
        raise SodaError(f"{name}: no flag, and belongs to none")
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(name, known, 1, 0.4)
    raise SodaError(f"{name}: no such flag." + (f" Did you mean {near[0]}?" if near else " See --help."))


def run(main: Callable[[], None]) -> None:
    """A SodaError ends the tool with status 2."""
    try:
        main()
    except SodaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
