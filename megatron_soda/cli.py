"""The `soda` command. Every subcommand takes a recipe, or a run or model folder, and key=value overrides."""

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from . import tokenizer_commands
from .errors import SodaError, user_message

app = typer.Typer(
    name="soda",
    help="Train native discrete audio models: speech to tokens, tokens to a model, a model to speech.",
    epilog="Start here:  bash examples/quickstart/run.sh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Target = Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe (.yaml) or a run folder.")]
ModelTarget = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, a model soda exported, or a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe.")]


app.add_typer(tokenizer_commands.app, name="tokenizer")


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)


@app.command(
    epilog=_examples(
        "soda prepare examples/quickstart/recipe.yaml",
        "soda prepare recipe.yaml prepare.speech=/data/my_speech prepare.workers=8",
        "soda prepare recipe.yaml 'prepare.speech=/data/tars/*.tar' prepare.layout=webdataset --dry-run",
    )
)
def prepare(
    recipe: Target,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count: utterances, hours, tokens, disk.")] = False,
) -> None:
    """Turn speech and text into token stores (RUN/data). Skips what is done."""
    from data_prep.prepare import prepare as run

    from .hf.load import resolve

    run(resolve(recipe, overrides or []), dry_run)


@app.command(
    epilog=_examples(
        "soda validate runs/quickstart",
        "soda validate recipe.yaml data.path=/data/stores",
        "soda validate /data/stores/yodas2-en/train",
    )
)
def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN|STORE", help="A recipe, a run folder, or one store.")],
    overrides: Overrides = None,
) -> None:
    """Check token stores: files whole, ids in range, every document legal and there once. Exit status 1 if not."""
    from .data.validate import SIDES
    from .data.validate import validate as run

    found = _stores(recipe)
    if found and overrides:
        raise SodaError(f"{' '.join(overrides)}: settings go with a recipe or a run, not with stores")
    if found:
        raise typer.Exit(0 if run(found[0], found[1] or SIDES) else 1)
    from .hf.load import resolve

    whole = resolve(recipe, overrides or [])
    names = ["valid"] if whole.data.corpora else SIDES
    raise typer.Exit(0 if run(whole.data_folder, names, whole.data.corpora) else 1)


@app.command(
    epilog=_examples(
        "soda inspect runs/quickstart/data/train",
        "soda inspect runs/quickstart/data/test --document 17 --audio heard/",
    )
)
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store, without suffix.")],
    document: Annotated[int, typer.Option(min=0, help="The first document to show.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    audio: Annotated[Path | None, typer.Option(metavar="DIR", help="Write what is spoken there, as wav files.")] = None,
) -> None:
    """Show documents of a token store: markers, text, codes; and let them be heard."""
    from .data.inspect import inspect as run

    run(store, document, count, audio)


@app.command(
    "convert-store",
    epilog=_examples(
        "soda convert-store runs/quickstart/data/train compact",
        "soda convert-store runs/quickstart compact",
        "soda convert-store data/train megatron --out /scratch/train",
        "soda convert-store runs/quickstart compact --out /scratch/data",
    ),
)
def convert_store(
    target: Annotated[str, typer.Argument(metavar="STORE|RUN", help="A store, without suffix, or all three of a run.")],
    format: Annotated[str, typer.Argument(metavar="compact|megatron", help="The format that is wanted.")],
    out: Annotated[
        Path | None, typer.Option(metavar="STORE|FOLDER", help="Keep what is there; write another one, ready to train.")
    ] = None,
) -> None:
    """Change the format of token stores: compact (a third of the size) or megatron (.bin/.idx). Nothing is lost."""
    from .data.convert import convert_stores
    from .hf.load import resolve

    folder, names = _stores(target) or (resolve(target, []).data_folder, [])
    convert_stores(folder, names, format, out)


def _stores(target: str) -> tuple[Path, list[str]] | None:
    """The folder and the name of a store; of a data folder no name, nor of a run that has no recipe.yaml yet, as
    training writes it. None for a recipe or another run."""
    path = Path(target)
    if path.name and not path.is_dir() and path.with_name(f"{path.name}.json").is_file():
        return path.parent, [path.name]
    if (path / "train.json").is_file():
        return path, []
    is_prepared = (path / "data" / "train.json").is_file() and not (path / "recipe.yaml").is_file()
    return (path / "data", []) if is_prepared else None


@app.command(
    epilog=_examples(
        "soda train examples/quickstart/recipe.yaml training.steps=20",
        "bash examples/pretrain/launch.sh recipe.yaml parallel.tensor=2",
    )
)
def train(recipe: Target, overrides: Overrides = None) -> None:
    """Train on one process, from the newest checkpoint on. For more processes use launch.sh (see below)."""
    from .train import run

    path = Path(recipe)
    here = [f"run={path}"] if path.is_dir() else []
    raise typer.Exit(run(str(path / "recipe.yaml" if here else path), [*here, *(overrides or [])]))


@app.command(
    epilog=_examples("soda params 135m", "soda params isoflop-1024 --json", "soda params examples/pretrain/4b.yaml")
)
def params(
    model: Annotated[str, typer.Argument(metavar="PRESET|RECIPE|RUN", help="A preset's name, a recipe or a run.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Count parameters and the FLOPs of a token, without making the weights."""
    import json

    from .config import load_recipe
    from .hf.load import resolve
    from .model.size import describe, space_of

    is_path = model.endswith((".yaml", ".yml")) or Path(model).is_dir()
    recipe = resolve(model, overrides or []) if is_path else load_recipe(None, [f"preset={model}", *(overrides or [])])
    space = space_of(recipe)
    size = describe(recipe.model, space, recipe.data.sequence_length)
    if as_json:
        print(json.dumps({"model": recipe.model.preset, "vocabulary": space.size, **size}))
    else:
        print(f"{recipe.model.preset}, {space.size:,} ids, windows of {recipe.data.sequence_length}")
        for name, value in size.items():
            print(f"  {name.replace('_', ' '):<22}{value:>22,}")


@app.command(epilog=_examples("soda export runs/quickstart"))
def export(recipe: Target, overrides: Overrides = None) -> None:
    """Write RUN/hf, a stock Qwen3ForCausalLM, and compare its logits with ours."""
    from .hf.export import export as run
    from .hf.load import resolve

    run(resolve(recipe, overrides or []))


@app.command(
    epilog=_examples(
        "soda evaluate runs/quickstart",
        "soda evaluate runs/quickstart suite=[nll] split=valid",
        "soda evaluate some/hf/folder data.path=runs/quickstart/data",
    )
)
def evaluate(model: ModelTarget, overrides: Overrides = None) -> None:
    """Measure the NLL vector on held-out documents, and how generations keep the grammar (RUN/eval.json)."""
    from .evaluation.run import evaluate as run

    run(model, overrides or [])


@app.command(
    epilog=_examples(
        "soda generate runs/quickstart",
        'soda generate runs/quickstart tasks=[speak] generate.text="good morning"',
    )
)
def generate(model: ModelTarget, overrides: Overrides = None) -> None:
    """Continue, speak and transcribe held-out utterances; wav files go to RUN/samples."""
    from .inference.run import generate as run

    run(model, overrides or [])


@app.command(epilog=_examples("soda report runs/quickstart"))
def report(recipe: Target, overrides: Overrides = None) -> None:
    """Write RUN/report.html: one page that shows and plays the run."""
    from .hf.load import resolve
    from .report import build_report

    print(build_report(Path(resolve(recipe, overrides or []).run)))


@app.command()
def doctor() -> None:
    """Say what is installed, what is accelerated, what falls back, and what to install for more."""
    from .doctor import print_report

    print_report()


GOES_ON = ("prepare", "train")  # given again, these go on where they were; the others start over


def main() -> None:
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, signal.default_int_handler)  # the same end as Ctrl-C: everything is cleaned up
    try:
        app()
    except Exception as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # a KeyboardInterrupt: typer has made an exit of it
            goes_on = any(word in GOES_ON for word in sys.argv[1:2])
            what = "The same command goes on from here." if goes_on else "Run the same command again to start over."
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"\nInterrupted after {time.monotonic() - started:.0f} s. {what}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
