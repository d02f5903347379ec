"""`soda tokenizer`: trains a text tokenizer, or adds SODA's tokens to an existing one."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..console import console
from ..errors import SodaError, printable
from ..tokenizer import TextTokenizer, clean_text, train_sentencepiece
from ..vocab import LLAMA3, MARKERS

SENTENCE = 1000  # characters: sentencepiece drops sentences longer than 4,192 bytes

app = typer.Typer(
    help="Train a text tokenizer, or add the markers and audio codes to one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(epilog="Examples:\n\n  soda tokenizer train text.model transcripts.txt 'web/*.jsonl' --pieces 8000")
def train(
    out: Annotated[Path, typer.Argument(metavar="OUT.model", help="The sentencepiece model to write.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXTFILE...", help=".txt, .jsonl or .parquet; globs; folders")],
    pieces: Annotated[int, typer.Option(min=1, help="how many ids")] = 8000,
    sentences: Annotated[int, typer.Option(min=1, help="most lines to train on; more are sampled")] = 500_000,
    seed: Annotated[int, typer.Option(help="of that sample")] = 0,
) -> None:
    """Train a unigram sentencepiece model with byte fallback on lines of text."""
    if out.suffix != ".model":
        raise SodaError(f"{out}: a sentencepiece model must be named *.model")
    if out.exists():
        raise SodaError(f"{out}: exists already; remove it, or choose another name")
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading")
        some, count = [], 0
        draw = random.Random(seed)
        for line in _lines(texts):
            count += 1
            if len(some) < sentences:
                some.append(line)
            elif (place := draw.randrange(count)) < sentences:  # every line is equally likely to be kept
                some[place] = line
            if count % 10_000 == 0:
                progress.update(task, description=f"reading: {count:,} lines")
        if not some:
            raise SodaError(f"{', '.join(texts)}: no text found")
        progress.update(task, description=f"training on {len(some):,} of {count:,} lines")
        train_sentencepiece(out, some, pieces)
    print(printable(f"{out}: {TextTokenizer(out).size:,} ids, learned from {len(some):,} of {count:,} lines"))


@app.command(
    epilog="Examples:\n\n  soda tokenizer extend llama3/tokenizer.json soda-tokenizer\n\n"
    "  soda tokenizer extend text.model soda-tokenizer --codebooks 4\n\n"
    "Then:\n\n  soda prepare recipe.yaml prepare.tokenizer=soda-tokenizer"
)
def extend(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A .model, a tokenizer.json, or a folder with one.")],
    out: Annotated[Path, typer.Argument(metavar="OUTFOLDER", help="The folder to write.")],
    codebooks: Annotated[int, typer.Option(min=1)] = 8,
    entries: Annotated[int, typer.Option(min=1, help="in every codebook")] = 2048,
) -> None:
    """Write a tokenizer for transformers: SOURCE plus the markers and a token for every audio code.

    OUTFOLDER also gets its text part, text_tokenizer.json, so it can be used as prepare.tokenizer.
    """
    from ..hf.load import quiet_transformers
    from ..hf.tokenizer import extend_tokenizer

    quiet_transformers()
    with console.status("extending"):
        space = extend_tokenizer(source, out, codebooks, entries)
    print(printable(f"{out}: {space.size:,} ids"))
    names = ("<|begin_of_text|>", "<|end_of_text|>", *MARKERS, "first audio code", "last audio code")
    ids = (space.bos, space.eos, space.text_start, space.text_end, space.audio_start, space.audio_end)
    for name, number in zip(names, (*ids, space.audio_base, space.size - 1), strict=True):
        print(f"  {name:<20}{number:>10}")


def _lines(texts: list[str]) -> Iterator[str]:
    """The lines of all texts, cleaned as in `soda prepare`, with long ones split."""
    from data_prep.texts import read_texts
    from data_prep.utterance import Reject

    for text in read_texts(texts):
        if isinstance(text, Reject):
            console.note("left out", f" {text.where}: {text.reason}")
            continue
        for line in clean_text(text, LLAMA3).splitlines():
            line = line.strip()
            yield from (line[i : i + SENTENCE] for i in range(0, len(line), SENTENCE))
