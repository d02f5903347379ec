"""Makes a wrong launch end at once with a message instead of hanging.

check_rendezvous() in a torchrun process, before torch is loaded: can node 0 be found? compare_ranks(recipe, device)
before megatron-core makes its groups: were all ranks started alike, each on its device? check_groups(facts, device)
after that, before the first step: do sums come out right in every group? python -m megatron_soda.parallel.preflight
what examples/pretrain/launch.sh asks before it starts torchrun
"""

import argparse
import contextlib
import errno
import hashlib
import ipaddress
import json
import os
import platform
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import SodaError, say, user_message

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "megatron-core", "transformer-engine", "megatron-soda")
AXES = ("tensor", "pipeline", "context", "data")
LONGEST_TABLE = 16  # most ranks that get a line each; more are shown by host


# ---- before torch is loaded


def check_rendezvous() -> None:
    """Raises SodaError if torchrun's MASTER_ADDR or MASTER_PORT is missing or invalid."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        resolve(os.environ.get("MASTER_ADDR", ""))
        check_port(os.environ.get("MASTER_PORT", ""))


def resolve(address: str) -> list[str]:
    """The IP addresses of MASTER_ADDR. Raises SodaError if there are none."""
    if not address:
        raise SodaError(
            f"MASTER_ADDR is not set on host {socket.gethostname()}. Set it to the name or address of node 0, or start "
            "with examples/pretrain/launch.sh."
        )
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        raise SodaError(
            f"MASTER_ADDR={address} does not resolve on host {socket.gethostname()} ({error}). Set it to the name or "
            "address of node 0 as this host knows it."
        ) from None


def check_port(port: str) -> int:
    if port.isdigit() and 0 < int(port) < 65536:
        return int(port)
    raise SodaError(f"MASTER_PORT={port or '(not set)'} on host {socket.gethostname()}: must be in 1 to 65535.")


def check_reachable(address: str, nodes: int, first: bool) -> None:
    """Raises SodaError if, with several nodes, this one would look for node 0, or wait for the others, on itself."""
    addresses = resolve(address)
    host = socket.gethostname()
    if nodes == 1:
        return
    # Node 0 may use a loopback address for itself (Debian's 127.0.1.1), but the others must not.
    if all(map(_is_loopback, addresses)) and (not first or address == "localhost" or address in addresses):
        raise SodaError(
            f"MASTER_ADDR={address} is host {host} itself ({', '.join(addresses)}), and there are {nodes} nodes. "
            "Set it to a name or address of node 0 that the other nodes can reach."
        )
    wanted = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    there = [name for _, name in socket.if_nameindex()]
    for name in wanted:
        if name not in there:
            raise SodaError(f"GLOO_SOCKET_IFNAME={name}: host {host} has no such interface; it has {', '.join(there)}.")
    if not wanted and all(map(_is_loopback, _own_addresses(host))):
        others = [name for name in there if name != "lo"]
        raise SodaError(
            f"host {host} knows its own name only as a loopback address, which gloo would give to the other nodes. "
            f"Set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface that leads to them: {', '.join(others)}."
        )


def check_free(port: int) -> None:
    """Raises SodaError if node 0 cannot listen on the port, naming the process that holds it if possible."""
    two = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if two else socket.AF_INET, dualstack_ipv6=two
        ).close()  # torch's store also listens on all addresses
    except OSError as error:
        host = socket.gethostname()
        if error.errno == errno.EADDRINUSE:
            raise SodaError(
                f"MASTER_PORT={port} is taken on host {host}{_holder(port)}. Stop that, or set MASTER_PORT (on every "
                "node) to another port."
            ) from None
        raise SodaError(f"MASTER_PORT={port} cannot be used on host {host}: {error.strerror}.") from None


def _holder(port: int) -> str:
    """` by process 17 (python)`, or empty if this user may not see it."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            taken = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port  # pyright: ignore[reportAttributeAccessIssue]
            if taken and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""


def _own_addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    except OSError:
        return ["127.0.0.1"]  # what gloo uses then


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_soda.parallel.preflight",
        description="Before torchrun: can the nodes of this job find each other? Exit status 2 if not.",
        epilog="example: python -m megatron_soda.parallel.preflight --address node-a --port 29500 --nodes 2 --bind",
    )
    parser.add_argument("--address", default=os.environ.get("MASTER_ADDR", ""), help="node 0; else MASTER_ADDR")
    parser.add_argument("--port", default=os.environ.get("MASTER_PORT", "29500"), help="its port; else MASTER_PORT")
    parser.add_argument("--nodes", type=int, default=os.environ.get("NNODES", "1"), help="how many; else NNODES")
    parser.add_argument("--bind", action="store_true", help="this is node 0: its port must be free")
    options = parser.parse_args()
    try:
        port = check_port(options.port)
        check_reachable(options.address, options.nodes, options.bind)
        if options.bind:
            check_free(port)
    except SodaError as error:
        say(f"error: {error}")
        return 2
    return 0


# ---- with the process group up


def compare_ranks(recipe: Recipe, device: "torch.device") -> list[dict[str, Any]]:
    """Facts about every rank, in order. Raises SodaError on all ranks if they differ or two share a device.

    Uses gloo even where ranks have NCCL, which would fail on a shared device before we could name it.
    """
    import torch
    import torch.distributed as dist

    cpu = torch.device("cpu")
    gloo: Any = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    facts = [json.loads(text) for text in gather(json.dumps(_facts(recipe, device)), cpu, gloo)]
    hosts = [fact["host"] for fact in facts]
    lines = [
        line
        for name in [*PACKAGES, "python"]
        if (line := _difference(name, [fact["versions"][name] for fact in facts], hosts))
    ]
    if len({fact["recipe"] for fact in facts}) > 1:  # all ranks see the same facts, so all of them get here
        recipes = [json.loads(text) for text in gather(json.dumps(_flat(recipe)), cpu, gloo)]
        keys = dict.fromkeys(key for of_rank in recipes for key in of_rank)
        lines += [line for key in keys if (line := _difference(key, [of_rank.get(key) for of_rank in recipes], hosts))]
    if gloo is not None:
        dist.destroy_process_group(gloo)
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise SodaError(
            "the ranks of this job were not started alike:\n  " + "\n  ".join(lines[:10]) + more + "\nStart all of "
            "them from one recipe, with the same key=value settings, and install the same versions on every host."
        )
    devices: dict[tuple[str, str], list[int]] = {}
    for rank, fact in enumerate(facts):
        if fact["device_id"]:
            devices.setdefault((fact["host"], fact["device_id"]), []).append(rank)
    for (host, identity), ranks in devices.items():
        if len(ranks) > 1:
            raise SodaError(
                f"ranks {_ranges(ranks)} on host {host} would use one device "
                f"({facts[ranks[0]]['device']}, {identity}). Start one process a device (NPROC_PER_NODE), and launch "
                "each node once."
            )
    return facts


def check_groups(facts: list[dict[str, Any]], device: "torch.device") -> str:
    """Sums known numbers in every group, and returns the rank map as a table. `facts`: from compare_ranks.

    Raises SodaError on all ranks if a sum is wrong.
    """
    from megatron.core import parallel_state as state

    groups = {
        "all": None,
        "tensor": state.get_tensor_model_parallel_group(),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(),
    }
    wrong = [name for name, group in groups.items() if not _adds_up(group, device)]
    here = {
        "tensor": state.get_tensor_model_parallel_rank(),
        "pipeline": state.get_pipeline_model_parallel_rank(),
        "context": state.get_context_parallel_rank(),
        "data": state.get_data_parallel_rank(),
        "wrong": wrong,
    }
    for fact, text in zip(facts, gather(json.dumps(here), device), strict=True):
        fact |= json.loads(text)
    for name in groups:
        ranks = [rank for rank, fact in enumerate(facts) if name in fact["wrong"]]
        if ranks:
            raise SodaError(
                f"an all-reduce over the {name} group gave a wrong sum on {_who(ranks, [f['host'] for f in facts])}. "
                "Data between these hosts gets corrupted: exclude them, and test them (nccl-tests)."
            )
    return rank_map(facts)


@contextlib.contextmanager
def together(device: "torch.device") -> Iterator[None]:
    """An error inside on any rank becomes a SodaError on all of them, which would otherwise wait for that rank."""
    problem = ""
    try:
        yield
    except (SodaError, OSError) as error:
        try:
            problem = user_message(error)
        except OSError:  # of a kind it has no message for
            problem = str(error)
    share_problem(problem, device)


def any_rank(here: bool, device: "torch.device") -> bool:
    """Whether it is so on any rank."""
    import torch
    import torch.distributed as dist

    found = torch.tensor([float(here)], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def share_problem(problem: str, device: "torch.device") -> None:
    """Raises SodaError on all ranks if any has a problem (empty: none)."""
    if not any_rank(bool(problem), device):
        return
    told = [json.loads(text) for text in gather(json.dumps([socket.gethostname(), problem]), device)]
    hosts, problems = [host for host, _ in told], [text for _, text in told]
    first = next(filter(None, problems))
    whose = [rank for rank, text in enumerate(problems) if text == first]
    raise SodaError(first if len(whose) == len(told) else f"{first} (Seen by {_who(whose, hosts)}.)")


def compare_stores(stores: dict[str, Any], device: "torch.device") -> None:
    """Raises SodaError on all ranks if they do not see the same stores. `stores`: identifying facts by name."""
    told = [json.loads(t) for t in gather(json.dumps([socket.gethostname(), stores], sort_keys=True), device)]
    hosts = [host for host, _ in told]
    lines = [_difference(name, [seen.get(name) for _, seen in told], hosts) for name in stores]
    if any(lines):
        raise SodaError(
            "the ranks of this job do not see the same data:\n  " + "\n  ".join(filter(None, lines)) + "\nThe stores "
            "must be the same on every host: put them on a shared disk, or copy them again."
        )


def rank_map(facts: list[dict[str, Any]]) -> str:
    """The table: one line per rank, or per host if there are many ranks."""
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    versions = ", ".join(f"{name} {version or 'none'}" for name, version in facts[0]["versions"].items())
    if len(facts) <= LONGEST_TABLE:
        rows: list[list[Any]] = [["rank", "host", "local", "device", *AXES]]
        for rank, fact in enumerate(facts):
            rows.append([rank, fact["host"], fact["local_rank"], fact["device"], *(fact[axis] for axis in AXES)])
    else:
        rows = [["ranks", "host", "devices", *AXES]]
        for host in hosts:
            ranks = [rank for rank, fact in enumerate(facts) if fact["host"] == host]
            names = dict.fromkeys(facts[rank]["device"] for rank in ranks)
            axes = [_ranges(facts[rank][axis] for rank in ranks) for axis in AXES]
            rows.append([_ranges(ranks), host, f"{len(ranks)} x {' and '.join(names)}", *axes])
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]
    return "\n".join([f"{_count(len(facts), 'rank')} on {_count(len(hosts), 'host')}; {versions}", *lines])


def _facts(recipe: Recipe, device: "torch.device") -> dict[str, Any]:
    import torch

    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        # Not the index: if every process sees only its own device, each calls it 0.
        "device_id": str(torch.cuda.get_device_properties(device).uuid) if cuda else "",
        "versions": _versions(),
        "recipe": hashlib.sha256(json.dumps(_flat(recipe), sort_keys=True).encode()).hexdigest(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {**versions, "python": platform.python_version()}


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `section.key: value`."""
    flat: dict[str, Any] = {}
    for name, value in asdict(recipe).items():
        flat.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def gather(text: str, device: "torch.device", group: Any = None) -> list[str]:
    """Every rank's text, in order. Sent as bytes, so nothing from another process is unpickled."""
    import torch
    import torch.distributed as dist

    world = dist.get_world_size()
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(texts, padded, group=group)
    return [t[: int(size)].cpu().numpy().tobytes().decode() for t, size in zip(texts, sizes, strict=True)]


def _adds_up(group: Any, device: "torch.device") -> bool:
    """Whether an all-reduce gives the right sum, over exactly the ranks that the group should have."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(group)
    numbers = torch.arange(1, 9, device=device)  # integers, whose sum is exact in any order
    total = numbers * (dist.get_rank() + 1)
    dist.all_reduce(total, group=group)
    return bool(torch.equal(total, numbers * sum(rank + 1 for rank in ranks)))


# ---- words


def _difference(name: str, by_rank: list[Any], hosts: list[str]) -> str:
    """`seed: 1 on rank 0 (a), 2 on ranks 1-3 (a, b)`; empty if all are the same."""
    sides: dict[str, list[int]] = {}
    for rank, value in enumerate(by_rank):
        sides.setdefault("none" if value is None else json.dumps(value), []).append(rank)
    return f"{name}: " + ", ".join(f"{v} on {_who(r, hosts)}" for v, r in sides.items()) if len(sides) > 1 else ""


def _who(ranks: list[int], hosts: list[str]) -> str:
    theirs = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(theirs) - 4} more" if len(theirs) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)} ({', '.join(theirs[:4])}{more})"


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3 and 6."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
