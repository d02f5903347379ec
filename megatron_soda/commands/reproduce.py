"""`soda reproduce`."""

import textwrap
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated

import typer

EXAMPLES = ("soda reproduce paper", "soda reproduce paper --markdown > docs/reproduce.md")


class What(StrEnum):
    paper = "paper"


def command(
    what: Annotated[What, typer.Argument(help="The SODA paper, the only one so far.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """Show every known number of the paper: the command, recipe, data and GPU-hours that would give it, and ours.

    Trains nothing."""
    print(to_markdown() if markdown else "\n".join(to_lines()), end="" if markdown else "\n")


ABOUT = """\
Every number of the paper that is publicly known, and what would give it. Ours: - if it was not run; without a date,
what follows from the recipes alone.

From: paper (its abstract, site and model cards), code (the authors' published code), derived (worked out from that
code), notes (others' notes on the paper, not checked against it), later (the author's later experiments).

GPU-hours are of one H100 and train the run from its own start: FLOPs (as `soda params` counts them, for the IsoFLOP
runs as `soda isoflop plan` does) / (MFU x 989 TFLOP/s). They are 0 for what needs no training. A measured MFU is that
of one device (docs/gpu_results.md); many devices reach less. Evaluating and encoding the speech are not counted.

A recipe hash covers everything that determines what a run learns; that of a group covers what its runs share, and the
plan's rows. Commands start in the checkout; RUN is the run's folder, TRAIN the command that trains it (see Runs).
Data are what a command needs besides the run's own (see Runs). Corpora and benchmarks lie in data/, as docs/launch.md
and docs/evaluation.md describe.

Not listed, because no public source has them: the results of the ablations but for a few, those of the 600M model but
for SALMon, the scores of speech-to-speech translation and annealing, and the prefactors of the scaling laws. The
author's later hierarchical models are another architecture, which is not trained here."""

COLUMNS = ("number", "paper", "ours", "from", "run", "recipe hash", "GPU-hours", "data", "command")
Table = tuple[str, str, tuple[str, ...], list[list[str]]]  # title, note, header, rows


def tables(full: bool) -> Iterator[Table]:
    """The numbers by section, then runs and data. full: with commands for each run, instead of RUN and TRAIN."""
    from ..reproduce import load_paper, rows, trained

    paper = load_paper()
    for section in paper.sections:
        body = [
            [
                *(row.what, row.paper, row.ours or "-", row.source, row.run, row.hash),
                *(_hours(row.hours), ", ".join(row.data)),
                f"not supported: {row.not_supported}" if row.not_supported else row.command if full else row.pattern,
            ]
            for row in rows(section)
        ]
        yield section.title, section.note, COLUMNS, body
    header = ("run", "folder", "recipe hash", "tokens", "FLOPs", "GPU-hours", "MFU", "data", "command")
    known = {name: trained(name) for name in paper.runs}
    body = [
        [
            *(name, one.folder, one.hash, f"{one.tokens / 1e9:,.1f}B", f"{one.flops:.2e}"),
            *(_hours(one.hours), one.basis, ", ".join(one.data), one.command),
        ]
        for name, one in known.items()
    ]
    yield "Runs", "", header, body
    body = [[name, one.what, one.size, one.licence] for name, one in paper.data.items()]
    yield "Data", "Licences are the sources' own, as far as known.", ("data", "what", "size", "licence"), body


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def to_lines() -> list[str]:
    """For a terminal: data and command have lines of their own, where they differ from those above."""
    lines = [ABOUT, ""]
    for title, note, header, body in tables(full=False):
        columns = len(header) - 2 if header[-1] == "command" else len(header)
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(columns)]
        lines += [f"== {title}", *textwrap.wrap(note, 120), _aligned(header, widths)]
        above: list[str] = []
        for row in body:
            lines.append(_aligned(row, widths))
            if row[columns:] != above:
                above = row[columns:]
                data, command = above
                lines += [f"    needs {data}"] * bool(data) + [f"    {command}"]
        lines.append("")
    return lines


def _aligned(cells: Sequence[str], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def to_markdown() -> str:
    """docs/reproduce.md."""
    lines = ["# The paper's numbers", "", "Made by `soda reproduce paper --markdown`; do not edit.", "", ABOUT]
    for title, note, header, body in tables(full=True):
        lines += ["", f"## {title}", *([note, ""] if note else []), _line(header), "|---" * len(header) + "|"]
        for *cells, last in body:
            is_command = header[-1] == "command" and not last.startswith("not supported")
            lines.append(_line([*cells, f"`{last}`" if is_command else last]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
