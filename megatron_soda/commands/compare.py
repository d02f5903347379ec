"""`soda compare`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaError

EXAMPLES = ("soda compare runs/base/eval.json runs/warm/eval.json",)


def command(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="The eval.json of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="That of another run.")],
) -> None:
    """Compare two results of `soda evaluate`: B minus A, with 95 % intervals over the items that both measured.

    Suites that were not measured in the same way, on the same data, are refused with the reason."""
    from ..evaluation.compare import compare, table

    found, refused = compare(first, second)
    print("\n".join(table(found)) if found else "")
    if refused:
        raise SodaError("not compared:\n" + "\n".join(f"  {line}" for line in refused))
