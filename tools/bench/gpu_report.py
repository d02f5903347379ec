"""Prints what gpu.sh measured as the tables of docs/gpu_results.md and as one JSON line, an aim beside each figure.

In a table the aim is in brackets, and a figure that misses it is bold.

    python tools/bench/gpu_report.py runs/gpu
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.errors import SodaError, run_tool
from megatron_soda.files import to_json

MFU = {"135m": 0.45, "600m": 0.50, "1.7b": 0.55, "4b-18": 0.55}
FP8 = {"1.7b": 1.15, "4b-18": 1.15}  # times BF16's speed
KINDS = ("settings", "recipes"), ("135m", "1.7b"), ("bf16", "fp8")
SETTINGS = {"training.head_rows=legal": 1.5}  # times the speed without
GAP = 0.03  # nats that FP8 may be from BF16, as BF16 from FP32 in tests/gpu
GENERATE = {1: 2.0, 16: 1.5}  # times as fast as transformers' generate, by batch; docs/benchmarks.md
HEAD = {"times_faster": 1.3, "times_smaller": 10.0}  # of megatron-core's


@dataclass
class Figure:
    """One cell of a table."""

    row: str
    column: str
    value: float | None  # None: it was not measured
    aim: float | None = None  # to be reached; None: there is none
    most: bool = False  # the aim is the most it may be

    @property
    def met(self) -> bool | None:
        if self.value is None or self.aim is None:
            return None
        return self.value <= self.aim if self.most else self.value >= self.aim


Results = dict[str, dict[str, Any]]  # the last of each step: exit (None: there was no time for it), result


def read(folder: Path) -> Results:
    path = folder / "results.jsonl"
    if not path.is_file():
        raise SodaError(f"{path}: no such file. Give the folder that gpu.sh wrote to.")
    return {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}


def result(results: Results, step: str) -> dict[str, Any]:
    """What a step printed; {} if it was not run or failed."""
    row = results.get(step, {})
    return (row.get("result") or {}) if row.get("exit") == 0 else {}


def side(results: Results, step: str, name: str = "ours") -> dict[str, Any]:
    return result(results, step).get("rows", {}).get(name, {})


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


# ---- sections


def tests(folder: Path) -> Iterator[Figure]:
    """By pytest's last line, and the sanitizer's."""
    for name in ("tests-kernels", "tests-cuda", "sanitizer"):
        path = folder / f"{name}.log"
        end = path.read_text(errors="replace")[-2000:] if path.is_file() else ""
        counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error|skipped)", end)}
        failed = counts.get("failed", 0) + counts.get("error", 0)
        yield Figure(name, "passed", counts.get("passed", 0) if counts else None)
        yield Figure(name, "failed", failed if counts else None, 0, True)
        yield Figure(name, "skipped", counts.get("skipped", 0) if counts else None)
        if name == "sanitizer":
            summary = re.search(r"ERROR SUMMARY: (\d+)", end)
            yield Figure(name, "errors", int(summary[1]) if summary else None, 0, True)


def training(results: Results) -> Iterator[Figure]:
    whole = result(results, "versions").get("gib")
    for size in MFU:
        both = {precision: side(results, f"train-{size}-{precision}") for precision in ("bf16", "fp8")}
        for precision, row in both.items():
            speed, share = row.get("tokens_per_second"), row.get("mfu")
            aim = MFU[size] if precision == "bf16" else None
            name = f"{size}, {precision.upper()}"
            yield Figure(name, "tokens/s", speed, speed * aim / share if speed and aim and share else None)
            yield Figure(name, "MFU", share, aim)
            yield Figure(name, "GiB", row.get("gib"), whole, True)
        faster = ratio(both["fp8"].get("tokens_per_second"), both["bf16"].get("tokens_per_second"))
        yield Figure(f"{size}, FP8", "x BF16", faster, FP8.get(size, 1.0))
    for precision in ("bf16", "fp8"):
        step, name = f"train-135m-8-{precision}", f"135m, {precision.upper()}, 8 at once"
        ours, theirs = side(results, step), side(results, step, "megatron-core")
        yield Figure(name, "tokens/s", ours.get("tokens_per_second"))
        yield Figure(name, "MFU", ours.get("mfu"))
        yield Figure(name, "GiB", ours.get("gib"), theirs.get("gib"), True)
        faster = ratio(ours.get("tokens_per_second"), theirs.get("tokens_per_second"))
        yield Figure(name, "x megatron-core", faster, 1.0)


def settings(results: Results) -> Iterator[Figure]:
    """On, against off."""
    for step in (f"{kind}-{size}-{precision}" for kind, size, precision in product(*KINDS)):
        off = side(results, step)
        for name, on in result(results, step).get("rows", {}).items():
            if name == "ours":
                continue
            row = f"{step.partition('-')[2]}, {name}"
            speed = ratio(on.get("tokens_per_second"), off.get("tokens_per_second"))
            yield Figure(row, "x tokens/s", speed, SETTINGS.get(name))
            yield Figure(row, "MFU", on.get("mfu"))
            yield Figure(row, "GiB", on.get("gib"), off.get("gib") if "recompute" in name else None, True)


def head(results: Results) -> Iterator[Figure]:
    for preset in ("135m", "1.7b"):
        found = result(results, f"head-{preset}").get("ratios", {}).get("megatron-core / ours", {})
        for name, aim in HEAD.items():
            yield Figure(preset, f"{name.replace('_', ' ')} than megatron-core's", found.get(name), aim)


def kernels(results: Results) -> Iterator[Figure]:
    rows = [row for row in result(results, "kernels").get("rows", []) if row["against"] == "device copy"]
    for name in ("unpack", "batch"):
        row = next((row for row in rows if row["section"] == name), {})
        yield Figure(name, "GB/s written", row.get("rate"))
        yield Figure(name, "of a device copy", row.get("ratio"), row.get("bar", 0.6))


def fp8(results: Results) -> Iterator[Figure]:
    for recipe in ("tensorwise", "delayed", "blockwise"):
        found = result(results, f"gap-fp8-{recipe}")
        slow, fast = found.get("tokens_per_second", (None, None))
        yield Figure(recipe, "steps", found.get("steps"), 200)
        yield Figure(recipe, "nats above BF16 at the end", (found.get("loss") or {}).get("gap"), GAP, True)
        yield Figure(recipe, "x BF16's tokens/s", ratio(fast, slow))


def codecs(results: Results) -> Iterator[Figure]:
    for name in ("mimi", "encodec", "dac"):
        found = result(results, f"codec-{name}")
        length, seconds = found.get("sound_seconds"), found.get("seconds", {})
        yield Figure(name, "x real time", ratio(length, seconds.get("ours")))
        yield Figure(name, "x one wave at a time", found.get("times_faster"), 5.0)
        yield Figure(name, "from files, x real time", ratio(length, seconds.get("files, decoded ahead")))
        yield Figure(name, "decoded ahead, x in between", found.get("decoded_ahead"), 1.0)
        yield Figure(name, "files, DALI, x real time", ratio(length, seconds.get("files, DALI")))


def generate(results: Results) -> Iterator[Figure]:
    for row in result(results, "generate").get("rows", []):
        name = f"{row['model']}, {row['weights']}, batch {row['batch']}"
        yield Figure(name, "tokens/s", row["tokens_per_second"], 100.0)  # a stream of sound
        yield Figure(name, "x transformers' generate", row["ratio"], GENERATE.get(row["batch"]))
        yield Figure(name, "of the limit of the memory", row["of_the_limit"])


SECTIONS: dict[str, Callable[[Results], Iterator[Figure]]] = {
    "Training": training,
    "Settings, on against off": settings,
    "The head alone": head,
    "FP8 against BF16, on tokens": fp8,
    "csrc's kernels": kernels,
    "Codecs": codecs,
    "Generation": generate,
}


def table(figures: list[Figure]) -> Iterator[str]:
    """Lines of Markdown."""
    columns = list(dict.fromkeys(figure.column for figure in figures))
    rows: dict[str, dict[str, str]] = {}
    for figure in figures:
        rows.setdefault(figure.row, {})[figure.column] = cell(figure)
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for row, cells in rows.items():
        yield f"| {row} | {' | '.join(cells.get(column, '') for column in columns)} |"


def cell(figure: Figure) -> str:
    found = number(figure.value)
    if figure.aim is not None:
        found += f" ({'at most ' if figure.most else ''}{number(figure.aim)})"
    return f"**{found}**" if figure.met is False else found


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def main(folder: Annotated[Path, typer.Argument(help="gpu.sh's OUT")]) -> None:
    """Prints tables and one JSON line. In brackets the aims; bold is what misses its own.

    python tools/bench/gpu_report.py runs/gpu
    """
    results = read(folder)
    found = {"Tests": list(tests(folder))} | {title: list(make(results)) for title, make in SECTIONS.items()}
    machine, failed = result(results, "versions"), sorted(step for step, row in results.items() if row["exit"] != 0)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if machine.get("device") == "CPU":
        print("A rehearsal: its figures mean nothing.")
    for title, figures in found.items():
        if figures:
            print(f"\n## {title}", *table(figures), sep="\n")
    if failed:
        print(f"\nFailed or unfinished: {', '.join(failed)}.")
    rows = {title: [{**asdict(one), "met": one.met} for one in figures] for title, figures in found.items()}
    print(to_json({"machine": machine, "failed": failed, "figures": rows}))


if __name__ == "__main__":
    run_tool(main)
