"""torchrun entry:  torchrun --nproc-per-node N -m megatron_soda.train RECIPE key=value ..."""

import os
import socket
import sys

from .config import load_recipe
from .errors import SodaError, user_message
from .parallel.layout import check_layout
from .parallel.preflight import check_rendezvous


def run(recipe_path: str, overrides: list[str]) -> int:
    """Exit status: 0 done, 130 stopped on request with everything saved, 2 for an error the user can mend."""
    rank = int(os.environ.get("RANK", "0"))
    alone = os.environ.get("LOCAL_RANK", "0") == "0"  # what is wrong with the recipe is said once on each host
    try:
        recipe = load_recipe(recipe_path, overrides)
        check_layout(recipe, int(os.environ.get("WORLD_SIZE", "1")))  # before the seconds that the engine takes
        check_rendezvous()
        alone = True

        from .training.loop import exit_quietly, train

        done = train(recipe)
        exit_quietly()
        return 0 if done else 130
    except (SodaError, OSError) as error:
        if alone:
            where = f" on rank {rank} ({socket.gethostname()})" if rank else ""
            print(f"error{where}: {user_message(error)}", file=sys.stderr, flush=True)
        return 2


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(
            "usage: torchrun --local-addr 127.0.0.1 --nproc-per-node N -m megatron_soda.train RECIPE [key=value ...]\n"
            "\nTrains RECIPE (YAML) on N processes of this machine, going on from the newest checkpoint of its run.\n"
            "--local-addr: torchrun would look up the name of this host. launch.sh does this, and several nodes.\n\n"
            "examples:\n"
            "  torchrun --local-addr 127.0.0.1 --nproc-per-node 2 -m megatron_soda.train recipe.yaml\n"
            "  bash examples/pretrain/launch.sh recipe.yaml parallel.tensor=2\n"
            "  soda train recipe.yaml training.steps=20        (one process)"
        )
        sys.exit(0 if len(sys.argv) > 1 else 2)
    sys.exit(run(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
