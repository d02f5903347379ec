"""Builds the report page of a run from whatever the run folder holds so far.

A missing or damaged piece never stops the page: the section says what is missing, and the top of the page lists
what could not be read. Only a folder that is no run at all is an error.
"""

import difflib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from ..errors import SodaError
from ..files import read_json, write_text
from . import plots
from .plots import Chart, Clip, Line

PAGE = "report.html"
SIGNS_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "eval.json")
PAPER = {
    "title": "Scaling Open Discrete Audio Foundation Models with Interleaved Semantic, Acoustic, and Text Tokens",
    "id": "arXiv 2602.16687",
    "url": "https://arxiv.org/abs/2602.16687",
}
TASKS = {
    "continue": ("Continue", "The model hears the prompt and goes on by itself."),
    "speak": ("Speak", "The model is given text and produces the sound."),
    "transcribe": ("Transcribe", "The model is given the sound and writes down the text."),
}
TRACKS = {
    "original": ("Original", "the recording"),
    "codec": ("Codec", "the recording turned into tokens and back: the best the model could sound"),
    "prompt": ("Prompt", "what the model was given"),
    "model": ("Model", "what the model produced"),
}
GRAMMAR = {
    "valid": "follow the token grammar from start to end",
    "duration_exact": "have exactly the duration that was asked for",
    "ended_by_itself": "were ended by the model, not by the length limit",
    "free_valid": "follow the grammar without being held to it",
    "free_legal_mass_mean": "mean probability the model itself puts on tokens the grammar allows",
}
SIDE_CHARTS = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Speed", "tokens/s"),
}
TOTALS = ("acoustic_mean", "all")
NLL_KEYS = ("tokens", "model_nats", "model_bits", "unigram_nats", "unigram_bits")
EVALUATION_KEYS = ("model", "split", "documents", "nll", "grammar")
HUES = {"text": ("#b4530a", "#f2a65e"), "marker": ("#6b7280", "#9aa3b2"), "semantic": ("#7c3aed", "#b79cff")}
OTHER_HUE = ("#be185d", "#f58ab8")
ACOUSTIC = (((8, 64, 110), (32, 148, 132)), ((176, 236, 255), (34, 150, 160)))  # from, to; light, dark
NATS_TO_BITS = 1 / math.log(2)
MOST_REJECTS = 50


def build_report(run: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path."""
    run = Path(run)
    if not run.is_dir():
        raise SodaError(f"{run}: no such folder. Give the folder of a run, the one that holds recipe.yaml.")
    if not any((run / name).exists() for name in SIGNS_OF_A_RUN):
        raise SodaError(f"{run}: not a run folder: it holds none of {', '.join(SIGNS_OF_A_RUN)}.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "fixed": fixed, "exact": exact, "span": span, "plain": plain}
    target = run / PAGE
    write_text(target, environment.get_template("template.html").render(collect(run)))
    return target


def collect(run: Path) -> dict[str, Any]:
    """Everything the template shows."""
    warnings: list[str] = []
    train, valid = read_metrics(run / "metrics.jsonl", warnings)
    evaluation = as_dict(load(run, "eval.json", warnings))
    facts = as_dict(load(run, "environment.json", warnings))
    data = as_dict(load(run, "data/prepare.json", warnings))
    stages = timings(as_dict(load(run, "timings.json", warnings)))
    recipe_file = run / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else ""
    nll = nll_table(as_dict(evaluation.get("nll")))
    grammar = grammar_rows(as_dict(evaluation.get("grammar")))
    colours = class_colours(class_names(train, valid, nll))
    return {
        "title": title(evaluation, recipe, run),
        "verdict": verdict(nll, bool(train)),
        "header": header(evaluation, facts, data, train),
        "tiles": tiles(train, valid, nll, grammar, data),
        "warnings": warnings,
        "colours": colours,
        "charts": charts(train, valid, colours, nll),
        "has_metrics": bool(train or valid),
        "nll": nll,
        "grammar": grammar,
        "evaluation": {
            "split": evaluation.get("split"),
            "documents": evaluation.get("documents"),
            "more": flatten({k: v for k, v in evaluation.items() if k not in EVALUATION_KEYS}),
        },
        "tasks": samples(run, warnings),
        "data": data_summary(data),
        "recipe": recipe,
        "environment": groups(facts),
        "stages": stages,
        "attribution": data.get("attribution"),
        "paper": PAPER,
    }


# Reading


def load(run: Path, name: str, warnings: list[str]) -> Any:
    """The JSON file `name` of the run, or None where there is none; a damaged one is reported on the page."""
    if not (run / name).exists():
        return None
    try:
        return read_json(run / name)
    except (SodaError, OSError) as error:
        reason = str(error).removeprefix(f"{run / name}: ")
        warnings.append(f"{name} could not be read and is left out: {reason}")
        return None


def read_metrics(path: Path, warnings: list[str]) -> tuple[list[dict], list[dict]]:
    """Training and validation points in order of step. Of a step written twice (a resumed run) the last counts."""
    if not path.is_file():
        return [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    train: dict[float, dict] = {}
    valid: dict[float, dict] = {}
    damaged: list[int] = []
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except ValueError:
            damaged.append(index)
            continue
        step = finite(as_dict(point).get("step"))
        if step is None:
            damaged.append(index)
        elif "valid_nll" in point or "valid_loss" in point:
            valid[step] = point
        else:
            train[step] = point
    if damaged == [len(lines)]:
        warnings.append("The last line of metrics.jsonl is half written and is left out (is the run still going?).")
    elif damaged:
        warnings.append(f"metrics.jsonl: {plural(len(damaged), 'unreadable line')} left out, first line {damaged[0]}.")
    lost = [step for step, point in train.items() if "loss" in point and finite(point["loss"]) is None]
    if lost:
        warnings.append(f"The loss was not a finite number at {plural(len(lost), 'step')}, first at {lost[0]:,.0f}.")
    return [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)]


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """All scalars of a nested value, each with its path as a label."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in flatten(part, f"{name} › {key}" if name else str(key))]
    if isinstance(value, list):
        if not any(isinstance(part, dict | list) for part in value):
            return [(name, ", ".join(map(number, value)) or "none")]
        return [row for index, part in enumerate(value, 1) for row in flatten(part, f"{name} › {index}")]
    return [(name, value)]


def groups(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Scalars first under no heading, then each nested part under its own."""
    nested = {key: part for key, part in facts.items() if isinstance(part, dict | list) and part}
    plain_facts = [(key, part) for key, part in facts.items() if key not in nested]
    named = [(key, flatten(part)) for key, part in nested.items()]
    return ([("", plain_facts)] if plain_facts else []) + named


# Words and numbers


def number(value: Any) -> str:
    """Any scalar, for reading."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not a number" if math.isnan(value) else "infinite"
        if value == int(value) and abs(value) < 1e15:
            return f"{value:,.0f}"
        if abs(value) >= 1000:
            return f"{value:,.1f}"
        return f"{value:.4g}"
    return str(value)


def fixed(value: Any) -> str:
    """With three decimals, for columns that are compared."""
    return f"{value:,.3f}" if finite(value) is not None else number(value)


def exact(value: Any) -> str:
    """The same in full, for the attribute of a <data> element."""
    return json.dumps(value) if isinstance(value, int | float) else str(value)


def big(value: float) -> str:
    """1234567 is 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f} {unit}"
    return number(value)


def span(seconds: float | None) -> str:
    """A length of time in the two units that matter."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def plain(name: Any) -> str:
    """acoustic_3 is acoustic 3."""
    return str(name).replace("_", " ")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# Header


def title(evaluation: dict, recipe: str, run: Path) -> str:
    named = re.search(r"^name:[ \t]*[\"']?([^\"'#\n]+)", recipe, re.MULTILINE)
    model = str(evaluation.get("model") or "").rstrip("/")
    return Path(model).name or (named and named[1].strip()) or run.resolve().name


def verdict(nll: dict[str, Any], trained: bool) -> tuple[str, str]:
    """One line that says how the run came out, and its tone: good, mixed, bad or none."""
    compared = [row for row in nll["classes"] if row["change"] is not None]
    won = [row for row in compared if row["change"] < 0]
    if not compared:
        return "Not evaluated yet" if trained else "Not trained yet", "none"
    if len(won) == len(compared):
        return "Beats the per-slot unigram baseline on every class of token", "good"
    lost = ", ".join(plain(row["name"]) for row in compared if row not in won)
    if won:
        text = f"Beats the per-slot unigram baseline on {len(won)} of {len(compared)} classes of token; not on {lost}"
        return text, "mixed"
    return "Does not beat the per-slot unigram baseline on any class of token yet", "bad"


def parameters(*places: dict) -> float | None:
    names = ("parameters", "n_parameters", "num_parameters", "parameter_count", "params")
    found = (finite(as_dict(place).get(name)) for place in places for name in names)
    return next((value for value in found if value is not None), None)


def header(evaluation: dict, facts: dict, data: dict, train: list[dict]) -> list[str]:
    """Short facts below the name of the model."""
    count = parameters(evaluation, facts, as_dict(facts.get("model")), train[0] if train else {})
    tokens = last(train, "tokens")
    codec = as_dict(data.get("codec")).get("name")
    return [
        *([f"{big(count)} parameters"] if count is not None else []),
        *([f"{big(tokens)} training tokens"] if tokens is not None else []),
        *([f"{span(hours * 3600)} of audio"] if (hours := finite(data.get("hours"))) is not None else []),
        *([f"codec {codec}"] if codec else []),
        *([str(facts["device"])] if isinstance(facts.get("device"), str) else []),
    ]


def last(points: list[dict], key: str) -> float | None:
    values = (finite(point.get(key)) for point in reversed(points))
    return next((value for value in values if value is not None), None)


def tiles(train: list[dict], valid: list[dict], nll: dict, grammar: dict, data: dict) -> list[dict[str, str]]:
    """The key figures: name, value, and a word on what it means."""
    found: list[dict[str, str]] = []

    def tile(name: str, value: str, note: str) -> None:
        found.append({"name": name, "value": value, "note": note})

    points, key = (valid, "valid_loss") if last(valid, "valid_loss") is not None else (train, "loss")
    end, start = last(points, key), last(points[::-1], key)
    if end is not None:
        kind = "Validation loss" if points is valid else "Training loss"
        tile(kind, f"{end:.3f}", "nats per token" + (f", from {start:.3f}" if start not in (None, end) else ""))
    for row, name in ((nll["all"], "All tokens"), (nll["acoustic_mean"], "Acoustic tokens")):
        if row and row["change"] is not None:
            bits = row["change"] * NATS_TO_BITS
            tile(name, f"{abs(bits):.2f} bits", f"{'saved' if bits < 0 else 'lost'} per token against the unigram")
    for share in (share for share in grammar["shares"] if share["key"] == "valid"):
        tile("Valid generations", f"{share['percent']:.3g} %", f"{share['count']:,} of {share['of']:,} sampled")
    tokens, step = last(train, "tokens"), last(train, "step")
    if tokens is not None:
        tile("Tokens trained", big(tokens), f"in {step:,.0f} steps" if step is not None else "")
    speeds = sorted(s for point in train if (s := finite(point.get("tokens_per_second"))) is not None)
    if speeds:
        tile("Speed", f"{big(speeds[len(speeds) // 2])}/s", "tokens per second, median")
    seconds = last(train, "seconds")
    if seconds is not None:
        tile("Training time", span(seconds), "wall clock, from start to last step")
    hours, utterances = finite(data.get("hours")), finite(data.get("utterances"))
    if hours is not None:
        tile("Data", span(hours * 3600), f"of audio in {utterances:,.0f} utterances" if utterances else "of audio")
    return found


# Training


def class_names(train: list[dict], valid: list[dict], nll: dict) -> list[str]:
    """All token classes of the run: text, marker, semantic, the acoustic ones in order, then any others."""
    parts = [as_dict(point.get("nll")) for point in train] + [as_dict(point.get("valid_nll")) for point in valid]
    names = {str(name) for part in parts for name in part} | {row["name"] for row in nll["classes"]}
    return sorted(names, key=class_order)


def class_order(name: str) -> tuple[int, int, str]:
    first = ["text", "marker", "semantic"]
    if name in first:
        return first.index(name), 0, name
    level = re.fullmatch(r"acoustic_(\d+)", name)
    return (3, int(level[1]), name) if level else (4, 0, name)


def class_colours(names: list[str]) -> dict[str, dict[str, str]]:
    """A CSS variable and its light and dark value for every class; the acoustic ones run through one hue."""
    acoustic = [name for name in names if class_order(name)[0] == 3]
    colours: dict[str, dict[str, str]] = {}
    for index, name in enumerate(names):
        if name in acoustic:
            share = acoustic.index(name) / max(1, len(acoustic) - 1)
            light, dark = (
                "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))
                for ends in ACOUSTIC
            )
        else:
            light, dark = HUES.get(name, OTHER_HUE)
        colours[name] = {"variable": f"--c{index}", "light": light, "dark": dark}
    return colours


def series(points: list[dict], *path: str) -> tuple[list[float], list[float]]:
    """Steps and values of what lies at `path` in every point that has it."""
    steps: list[float] = []
    values: list[float] = []
    for point in points:
        value: Any = point
        for key in path:
            value = as_dict(value).get(key)
        if (value := finite(value)) is not None:
            steps.append(float(point["step"]))
            values.append(value)
    return steps, values


def charts(train: list[dict], valid: list[dict], colours: dict, nll: dict) -> dict[str, Any]:
    """All charts, drawn; the big ones twice, for wide and for narrow screens."""
    baseline = {row["name"]: row["unigram_nats"] for row in nll["classes"]}
    loss = [
        Line("training", *series(train, "loss"), "--accent", smooth=True),
        Line("validation", *series(valid, "valid_loss"), "--second", dots=True),
    ]
    together: list[Line] = []
    panels = []
    for name, colour in colours.items():
        variable = colour["variable"]
        learned, checked = series(train, "nll", name), series(valid, "valid_nll", name)
        if not learned[0] and not checked[0]:
            continue
        lines = [Line("training", *learned, variable, smooth=True), Line("validation", *checked, variable, dots=True)]
        together += [Line("training", *smoothed(*learned), variable), lines[1]]
        level = finite(baseline.get(name))
        spoken = f"Loss of {plain(name)} tokens: {spoken_range(learned, checked)}"
        picture = plots.draw(Chart(spoken, lines, level=level, size=(240, 150)), f"class{len(panels)}")
        panels.append({"name": name, "variable": variable, "picture": picture, "baseline": level is not None})
    side = []
    for key, (name, unit) in SIDE_CHARTS.items():
        steps, values = series(train, key)
        if steps:
            spread = min(values) > 0 and max(values) > 30 * sorted(values)[len(values) // 2]
            line = Line(name, steps, values, "--accent", smooth=key == "tokens_per_second")
            picture = plots.draw(Chart(name, [line], log_y=spread, size=(330, 170)), f"side{len(side)}")
            side.append({"name": name, "log": spread, "unit": unit, "picture": picture})
    spoken = f"Loss over the run: {spoken_range(*((line.x, line.y) for line in loss))}"
    return {
        "loss": both_widths(spoken, loss, "loss") if any(line.x for line in loss) else None,
        "classes": both_widths("Loss of every token class over the run", together, "every") if together else None,
        "panels": panels,
        "side": side,
        "validated": bool(loss[1].x),
    }


def smoothed(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    if len(values) < 30:
        return steps, values
    return steps, plots.running_mean(plots.np.array(values), max(3, len(values) // 40)).tolist()


def both_widths(spoken: str, lines: list[Line], key: str) -> dict[str, Any]:
    wide = Chart(spoken, lines, y_name="nats per token")
    narrow = Chart(spoken, lines, size=(340, 260))
    return {"wide": plots.draw(wide, key), "narrow": plots.draw(narrow, f"{key}-narrow")}


def spoken_range(*lines: tuple[Any, Any]) -> str:
    """The start and end of every line in words, for those who do not see the chart."""
    words = [
        f"{name} from {values[0]:.3f} to {values[-1]:.3f} nats"
        for name, (_, values) in zip(("training", "validation"), lines, strict=False)
        if len(values)
    ]
    return ", ".join(words) or "no points"


# Evaluation


def nll_table(nll: dict[str, Any]) -> dict[str, Any]:
    """Rows of the table; `change` is model minus unigram in nats, negative where the model is better."""
    classes = [nll_row(str(name), row) for name, row in as_dict(nll.get("classes")).items() if isinstance(row, dict)]
    classes.sort(key=lambda row: class_order(row["name"]))
    totals = {name: nll_row(name, nll[name]) if isinstance(nll.get(name), dict) else None for name in TOTALS}
    rows = classes + [row for row in totals.values() if row]
    shown = [value for row in rows for value in (row["model_nats"], row["unigram_nats"])]
    top = max((value for value in map(finite, shown) if value is not None), default=1.0) or 1.0
    for row in rows:
        for name in ("model", "unigram"):
            value = finite(row[f"{name}_nats"])
            row[f"{name}_percent"] = None if value is None else max(0.0, 100 * value / top)
    rest = {key: value for key, value in nll.items() if key not in ("classes", *TOTALS)}
    return {"classes": classes, "rows": rows, **totals, "more": flatten(rest)}


def nll_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    model, unigram = finite(row.get("model_nats")), finite(row.get("unigram_nats"))
    change = None if model is None or unigram is None else model - unigram
    found = {key: row.get(key) for key in NLL_KEYS}
    rest = flatten({key: value for key, value in row.items() if key not in NLL_KEYS})
    bits = None if change is None else change * NATS_TO_BITS
    return {"name": name, "change": change, "change_bits": bits, "total": name in TOTALS, "more": rest, **found}


def grammar_rows(grammar: dict[str, Any]) -> dict[str, Any]:
    """Counts out of all generations and probabilities as bars; everything else as plain facts."""
    of = finite(grammar.get("generations"))
    shares: list[dict[str, Any]] = []
    for key, meaning in GRAMMAR.items():
        value = finite(grammar.get(key))
        if value is None:
            continue
        if key == "free_legal_mass_mean":
            shares.append({"key": key, "meaning": meaning, "value": value, "percent": 100 * value, "of": None})
        elif of and value <= of:
            count = {"value": int(value), "count": int(value), "of": int(of)}
            shares.append({"key": key, "meaning": meaning, "percent": 100 * value / of, **count})
    shown = {share["key"] for share in shares}
    counts = [share for share in shares if share["of"]]
    masses = [share for share in shares if not share["of"]]
    return {"shares": counts, "masses": masses, "more": flatten({k: v for k, v in grammar.items() if k not in shown})}


# Samples


def samples(run: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """The samples by task, each with its sounds and its texts."""
    listed = load(run, "samples/samples.json", warnings)
    found: dict[str, list[dict]] = {task: [] for task in TASKS}
    for sample in as_list(listed):
        if isinstance(sample, dict):
            found.setdefault(str(sample.get("task", "other")), []).append(card(run / "samples", sample))
    return [
        {"task": task, "name": TASKS.get(task, (plain(task).capitalize(), ""))[0], "cards": cards, "meaning": meaning}
        for task, cards in found.items()
        if cards and (meaning := TASKS.get(task, ("", ""))[1]) is not None
    ]


def card(folder: Path, sample: dict[str, Any]) -> dict[str, Any]:
    audio = {str(key): str(value) for key, value in as_dict(sample.get("audio")).items() if value}
    order = [key for key in TRACKS if key in audio] + [key for key in audio if key not in TRACKS]
    clips: dict[str, Clip | str] = {key: clip_or_reason(folder, audio[key]) for key in order}
    good = {key: clip for key, clip in clips.items() if isinstance(clip, Clip)}
    mels = {key: plots.log_mel(clip) for key, clip in good.items()}
    peak = max((float(mel.max()) for mel in mels.values()), default=0.0)
    longest = max((clip.seconds for clip in good.values()), default=0.0)
    tracks = []
    for key, clip in clips.items():
        name, meaning = TRACKS.get(key, (plain(key).capitalize(), ""))
        track: dict[str, Any] = {"key": key, "name": name, "meaning": meaning, "problem": ""}
        if isinstance(clip, Clip):
            track |= {
                "seconds": clip.seconds,
                "rate": clip.rate,
                "percent": 100 * clip.seconds / longest,
                "sound": plots.wav_uri(clip),
                "picture": plots.spectrogram_uri(mels[key], peak),
            }
        else:
            track["problem"] = clip
        tracks.append(track)
    return {
        "id": str(sample.get("id", "")),
        "language": str(sample.get("language") or ""),
        "note": str(sample.get("note") or ""),
        "tracks": tracks,
        "ticks": [{"label": f"{tick:g}", "percent": 100 * tick / longest} for tick in plots.time_ticks(longest)]
        if longest
        else [],
        **texts(sample),
    }


def clip_or_reason(folder: Path, name: str) -> Clip | str:
    """The clip, or in words why there is none."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return f"{name} lies outside the samples folder and is not shown."
    if not path.is_file():
        return f"{name} is missing."
    try:
        clip = plots.read_clip(path)
    except (plots.soundfile.SoundFileError, OSError, ValueError):
        return f"{name} is no sound file that could be read."
    return clip if len(clip.samples) else f"{name} is empty."


def texts(sample: dict[str, Any]) -> dict[str, Any]:
    """The texts of a sample; reference and output word by word where they are meant to agree."""
    prompt, reference, output = (sample.get(f"{key}_text") for key in ("prompt", "reference", "output"))
    found = {"prompt": prompt, "reference": None, "output": None, "agreement": ""}
    if reference is not None and output is not None and sample.get("task") != "continue":
        found["reference"], found["output"], found["agreement"] = compared(str(reference), str(output))
    else:
        found["reference"] = None if reference is None else [("same", str(reference))]
        found["output"] = None if output is None else [("same", str(output))]
    return found


def compared(reference: str, output: str) -> tuple[list, list, str]:
    """Both texts in pieces marked "same" or "differs", and how much of the reference was found again."""
    words = " " in reference.strip()
    left, right = (re.findall(r"\S+\s*" if words else r"\S\s*", text) for text in (reference, output))
    bare = [[re.sub(r"[\W_]+", "", part.lower()) or part.strip() for part in parts] for parts in (left, right)]
    pieces: tuple[list, list] = ([], [])
    agreed = 0
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        mark = "same" if kind == "equal" else "differs"
        agreed += (b - a) if kind == "equal" else 0
        for into, part in zip(pieces, ("".join(left[a:b]), "".join(right[c:d])), strict=True):
            marked = part if mark == "same" else part.rstrip()  # the space after a marked word stays unmarked
            into += [(sort, text) for sort, text in ((mark, marked), ("same", part[len(marked) :])) if text]
    unit = "word" if words else "character"
    return *pieces, f"{agreed} of {plural(len(left), unit)} of the reference found again in order"


# Data and times


def data_summary(data: dict[str, Any]) -> dict[str, Any] | None:
    if not data:
        return None
    rejects = as_list(data.get("rejects"))
    rows = [
        {"where": as_dict(reject).get("where"), "reason": as_dict(reject).get("reason")}
        if isinstance(reject, dict)
        else {"where": None, "reason": reject}
        for reject in rejects
    ]
    languages = [
        {"name": str(name), "utterances": row.get("utterances"), "seconds": finite(row.get("seconds"))}
        for name, row in as_dict(data.get("languages")).items()
        if isinstance(row, dict)
    ]
    languages.sort(key=lambda row: -(row["seconds"] or 0))
    longest = max((row["seconds"] or 0 for row in languages), default=0) or 1
    for row in languages:
        row["percent"] = 100 * (row["seconds"] or 0) / longest
    documents, tokens = as_dict(data.get("documents")), as_dict(data.get("tokens"))
    known = ("rejects", "languages", "documents", "tokens", "codec", "attribution", "classes")
    return {
        "facts": flatten({key: value for key, value in data.items() if key not in known}),
        "codec": flatten(data.get("codec")) if data.get("codec") else [],
        "splits": [
            {"name": name, "documents": documents.get(name), "tokens": tokens.get(name)} for name in documents | tokens
        ],
        "classes": flatten(data.get("classes")) if data.get("classes") else [],
        "languages": languages,
        "rejects": rows[:MOST_REJECTS],
        "reject_count": len(rows),
        "reject_reasons": Counter(str(row["reason"]) for row in rows).most_common(8),
    }


def timings(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Each stage with its total and its parts; the bars share one scale."""
    found = []
    for stage, parts in stages.items():
        named = parts if isinstance(parts, dict) else {"seconds": parts}
        rows = [(name, value) for name, value in flatten(named) if name != "seconds"]
        timed = [{"name": name, "seconds": value} for name, part in rows if (value := finite(part)) is not None]
        other = [(name, value) for name, value in rows if finite(value) is None]
        total = finite(named.get("seconds"))
        if total is None and timed:
            total = sum(part["seconds"] for part in timed)
        found.append({"name": stage, "seconds": total, "parts": timed, "other": other})
    top = max((part["seconds"] or 0 for stage in found for part in [stage, *stage["parts"]]), default=0) or 1
    for stage in found:
        for part in [stage, *stage["parts"]]:
            part["percent"] = 100 * max(0, part["seconds"] or 0) / top
    return found
