"""torchrun for the processes of one machine, reachable from nowhere else:

    python -m megatron_soda.parallel.one_node --nproc-per-node N -m megatron_soda.train RECIPE key=value ...

torchrun's own store listens on every address, and its c10d rendezvous (--standalone) unpickles what is in it. Here the
store listens on 127.0.0.1, on a free port, and so do gloo and NCCL. Takes torchrun's options.
"""

import os
import socket
import sys
from datetime import timedelta
from typing import Any

LOOPBACK = "127.0.0.1"


def stay_on_loopback() -> None:
    """Makes gloo and NCCL listen on the loopback interface, whatever interface the environment names: it is meant for
    jobs of several nodes. Without this they listen on the address that the host's name resolves to."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")


def loopback_store(wait: timedelta = timedelta(minutes=15)) -> Any:
    """A TCPStore with its server, which others find at LOOPBACK and its `port`. By itself it would listen on all
    addresses."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    return TCPStore(LOOPBACK, port, 1, True, wait, master_listen_fd=listening.detach())


def main() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return "loopback"

    def rendezvous(parameters: RendezvousParameters) -> Loopback:
        store = loopback_store()
        found = Loopback(LOOPBACK, store.port, 0, 1, parameters.run_id, timeout=900)
        found._store = store
        return found

    stay_on_loopback()
    rendezvous_handler_registry.register("loopback", rendezvous)
    run.main(["--rdzv-backend", "loopback", "--rdzv-endpoint", LOOPBACK, "--local-addr", LOOPBACK, *sys.argv[1:]])


if __name__ == "__main__":
    main()
