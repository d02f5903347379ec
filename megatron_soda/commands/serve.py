"""`soda serve`."""

from typing import Annotated

import typer

from ..errors import SodaError, printable
from .arguments import Codec, FewerBits
from .resolve import find_model

EXAMPLES = (
    "soda serve runs/quickstart",
    "soda serve runs/mine --port 9000 --weights int8",
    "soda serve runs/mine --vllm",
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, or a model that soda exported.")],
    host: Annotated[str, typer.Option(help="The address to listen on; by default only this machine can use it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    codec: Codec = "",
    weights: FewerBits = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Print the command that serves MODEL with vLLM.")] = False,
) -> None:
    """A page to speak with a model, and OpenAI's /v1/audio/speech and /v1/audio/transcriptions."""
    from ..serving.run import check_installed, serve, vllm_command

    if vllm:
        if codec or weights:
            raise SodaError("--codec and --weights are not for vLLM: leave them out")
        print(printable(vllm_command(find_model(model), host, port)))
        return
    check_installed()
    serve(find_model(model), host, port, codec, weights.value if weights else "")
