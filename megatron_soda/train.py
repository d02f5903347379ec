"""A rank of a job:  python -m megatron_soda.parallel.one_node --nproc-per-node N -m megatron_soda.train RECIPE .."""

import contextlib
import os
import re
import socket
import sys
import traceback
from pathlib import Path

from .config import load_recipe
from .errors import say, tell_torchrun, user_message
from .parallel.layout import check_layout
from .parallel.preflight import check_rendezvous
from .training.stop import listening

_LOST = re.compile("(closed|reset) by peer|Broken pipe|Connection refused|remote process exited|recvBytes|Timed out")


def run(recipe_path: str, overrides: list[str], folder: Path | None = None) -> int:
    """folder: the run's, instead of the recipe's. Exit status: 0 done, 130 stopped on request with everything saved, 2
    for an error the user can fix, 1 for a bug or because another rank ended."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    speaks = first  # problems with the recipe are reported once per host
    with listening() as stop:
        try:
            recipe = load_recipe(recipe_path, overrides, {"run": str(folder)} if folder else {})
            check_layout(recipe, int(os.environ.get("WORLD_SIZE", "1")))  # before the engine's seconds of loading
            check_rendezvous()
            speaks = True

            from .parallel import watch
            from .training.trainer import exit_quietly, train

            done = train(recipe)
            watch.stop()
            exit_quietly()
            return 0 if done else 130
        except Exception as error:
            stop.phase = "over"  # torchrun stops the other ranks as soon as one fails; this one must still say why
            if not speaks:
                stop.wait(5)  # until the rank that reports has done so
            return _failed(error, speaks)


def _failed(error: Exception, speaks: bool) -> int:
    """Reports why this rank ends, unless it is because of another rank, which reports it itself. Returns the exit
    status."""
    trace = error.__traceback__
    try:
        message = user_message(error)
    except Exception:  # not one that a user can fix
        message = ""
    text = message or f"{type(error).__name__}: {error}"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    lost = several and bool(_LOST.search(text))
    if lost:
        message = text = f"another rank ended, and did not say why ({text.strip().splitlines()[-1]})"
    watch = getattr(sys.modules.get("megatron_soda.parallel.watch"), "current", None)
    where = f" on rank {os.environ.get('RANK', '0')} ({socket.gethostname()})" if several else ""
    if watch is not None:
        watch.over.set()
        with contextlib.suppress(RuntimeError):  # torchrun's store is gone
            cause = (watch.cause(5) if lost else None) or watch.fail(text)
            if cause["rank"] != watch.rank and (lost or cause["message"] == text):
                text, speaks = cause["message"], watch.speaks(cause)
                where = f" on rank {cause['rank']} ({cause['host']})"
    if not message:
        traceback.print_exception(error.with_traceback(trace))
    if speaks:
        say(f"error{where}: {text}")
    tell_torchrun(f"error{where}: {text}")
    return 2 if message and not lost else 1


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(
            "usage: python -m megatron_soda.parallel.one_node --nproc-per-node N "
            "-m megatron_soda.train RECIPE [key=value ...]\n"
            "\nTrains RECIPE (YAML) on N processes of this machine, resuming from the newest checkpoint of its run.\n"
            "one_node is torchrun on the loopback interface. launch.sh uses it, and starts several nodes, too.\n\n"
            "examples:\n"
            "  python -m megatron_soda.parallel.one_node --nproc-per-node 2 -m megatron_soda.train recipe.yaml\n"
            "  bash examples/pretrain/launch.sh recipe.yaml parallel.tensor=2\n"
            "  soda train recipe.yaml training.steps=20        (one process)"
        )
        sys.exit(0 if len(sys.argv) > 1 else 2)
    sys.exit(run(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
