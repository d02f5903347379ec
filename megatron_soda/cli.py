"""The `soda` command. Each subcommand is a file in commands/ with its examples, its arguments, and what it calls."""

import contextlib
import signal
import sys
import time

import typer

from .commands import (
    ablate,
    compare,
    continue_,
    convert_store,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    isoflop,
    params,
    prepare,
    report,
    reproduce,
    serve,
    speak,
    tokenizer,
    train,
    transcribe,
    translate,
    validate,
)
from .commands.arguments import examples
from .errors import say, user_message

app = typer.Typer(
    name="soda",
    help="Train native discrete audio models: speech to tokens, tokens to a model, a model to speech.",
    epilog="Start here:  bash examples/quickstart/run.sh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    *(prepare, validate, inspect, convert_store, train, params),
    *(export, import_, evaluate, compare, generate, report, reproduce, doctor),
    *(transcribe, speak, continue_, translate, serve),
)
for _module in COMMANDS:
    _name = _module.__name__.rpartition(".")[2].removesuffix("_").replace("_", "-")
    app.command(_name, epilog=examples(*_module.EXAMPLES))(_module.command)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(isoflop.app, name="isoflop")
app.add_typer(ablate.app, name="ablate")

GOES_ON = ("prepare", "train", "isoflop", "ablate", "evaluate")  # these resume when run again; the others start over


def main() -> None:
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored
            signal.signal(number, signal.default_int_handler)  # ends like Ctrl-C: everything is cleaned up
    try:
        try:
            app()
        finally:
            with contextlib.suppress(BrokenPipeError, ValueError, AttributeError):  # `| head`; closed, or None
                sys.stdout.flush()  # what cannot be written is an error here, and a traceback at the very end
    except Exception as error:
        say(f"error: {user_message(error)}")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # a KeyboardInterrupt, which typer turned into an exit
            goes_on = any(word in GOES_ON for word in sys.argv[1:2])
            what = "Run the same command again to resume." if goes_on else "Run the same command again to start over."
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(f"\nInterrupted after {time.monotonic() - started:.0f} s. {what}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
