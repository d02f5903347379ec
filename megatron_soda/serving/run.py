"""`soda serve`: binds an address and runs the server."""

# pyright: reportMissingImports=false

import importlib.util
import ipaddress
import shlex
import socket
from pathlib import Path
from typing import Any

from ..console import console
from ..errors import SodaError
from ..files import read_json
from ..hf.load import read_export
from ..inference.decoder import Weights
from .slots import PROCESSOR

NEEDED = ("starlette", "uvicorn", "python_multipart")
END_SECONDS = 3  # for answers in progress when the server is stopped


def check_installed() -> None:
    """SodaError, saying what to install, unless the packages of the extra `serve` are there."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        named = " and ".join(name.replace("_", "-") for name in missing)
        raise SodaError(f"soda serve needs {named}: pip install 'megatron-soda[serve]'")


def vllm_command(folder: Path, host: str, port: int) -> str:
    """The command that serves an exported model with vLLM, under the slot grammar. SodaError if the folder is not as it
    was exported."""
    described, config = read_export(folder), read_json(folder / "config.json")
    options = {
        "host": host,
        "port": port,
        "served-model-name": described["name"],
        "dtype": config.get("dtype", "auto"),  # vLLM would make float32 models 16-bit
        "logits-processors": PROCESSOR,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return shlex.join(["vllm", "serve", str(folder.resolve()), *flags])


def serve(folder: Path, host: str, port: int, codec: str = "", weights: Weights = "") -> None:
    """Serves the exported model in `folder` until it is stopped. SodaError if the address cannot be used."""
    import uvicorn

    from ..inference.own import open_studio
    from .app import build_app

    listening = bind(host, port)
    with listening:
        local = is_loopback(listening.getsockname()[0])
        app = build_app(open_studio(folder, codec, weights), local)
        shown = f"[{host}]" if ":" in host else host
        console.print(f"http://{shown}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
        if not local:
            console.note("warning ", "everybody who can reach this address can use the model: there is no password")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=END_SECONDS)
        uvicorn.Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """Listens on the first of the host's addresses that this machine has: localhost may also be ::1 where there is no
    IPv6. It listens at once, because two servers that only bind an address can both have it."""
    why: Exception = OSError("it has no address")
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                return _listening(family, address)
            except OSError as error:
                why = error
    except (OSError, UnicodeError) as error:
        why = error
    told = getattr(why, "strerror", None) or why
    raise SodaError(f"--host {host} --port {port}: cannot listen there ({told})")


def _listening(family: int, address: Any) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
