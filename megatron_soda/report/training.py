"""The training section: charts of the loss, of every token class, and of the run itself."""

from typing import Any

from . import plots
from .plots import Chart, Line
from .reading import as_dict
from .words import finite, plain

START = 0.05  # share of the steps that counts as the start of a run
SIDE_CHARTS = {
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Speed", "tokens/s"),
    "mfu": ("Model FLOPs utilisation", "of the peak"),
    "memory_gib": ("Memory", "GiB"),
}


def charts(train: list[dict], valid: list[dict], evaluated: list[dict], colours: dict, nll: dict) -> dict[str, Any]:
    """Draws all charts; the big ones twice, for wide and for narrow screens."""
    baseline = {row["name"]: row["baseline"] for row in nll["classes"]}
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
        top = cut_start(lines, level)[0]
        picture = plots.draw(Chart(spoken, lines, level=level, top=top, size=(240, 150)), f"class{len(panels)}")
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
        "loss_cut": cut_start(loss)[1],
        "classes": both_widths("Loss of every token class over the run", together, "every") if together else None,
        "classes_cut": cut_start(together)[1],
        "panels": panels,
        "side": side,
        "evaluations": evaluations(evaluated),
        "validated": bool(loss[1].x),
    }


def evaluations(points: list[dict]) -> list[dict[str, Any]]:
    """A chart of every figure of the suites that were measured while training."""
    found = []
    for key in dict.fromkeys(key for point in points for key in as_dict(point["evaluation"])):
        steps, values = series(points, "evaluation", key)
        if steps:
            name = plain(key)
            spoken = f"{name}: from {values[0]:.4g} to {values[-1]:.4g}"
            chart = Chart(spoken, [Line(name, steps, values, "--accent", dots=True)], size=(330, 170))
            found.append({"name": name, "picture": plots.draw(chart, f"evaluation{len(found)}")})
    return found


def cut_start(lines: list[Line], level: float | None = None) -> tuple[float | None, str]:
    """Where to end the axis, with a note, if the first steps would squeeze everything else. Only they are cut, so that
    no later spike is hidden. (None, "") if they fit."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True)]
    until = START * max((x for x, _ in points), default=0.0)
    later = [y for x, y in points if x > until]
    first = [(y, x) for x, y in points if x <= until]
    if not later or not first:
        return None, ""
    high: float = max(later if level is None else [*later, level])
    spread = (high - min(later)) or 1e-9
    peak, step = max(first)
    if peak <= high + 0.3 * spread:
        return None, ""
    return high + 0.1 * spread, f"The start is cut off: {peak:.3g} at step {step:,.0f} is above the axis."


def series(points: list[dict], *path: str) -> tuple[list[float], list[float]]:
    """Steps and values of `path` in every point that has it."""
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


def smoothed(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    if len(values) < 30:
        return steps, values
    return steps, plots.running_mean(plots.np.array(values), max(3, len(values) // 40)).tolist()


def both_widths(spoken: str, lines: list[Line], key: str) -> dict[str, Any]:
    top = cut_start(lines)[0]
    wide = Chart(spoken, lines, y_name="nats per token", top=top)
    narrow = Chart(spoken, lines, top=top, size=(340, 260))
    return {"wide": plots.draw(wide, key), "narrow": plots.draw(narrow, f"{key}-narrow")}


def spoken_range(*lines: tuple[Any, Any]) -> str:
    """The start and end of every line in words, for readers who cannot see the chart."""
    words = [
        f"{name} from {values[0]:.3f} to {values[-1]:.3f} nats"
        for name, (_, values) in zip(("training", "validation"), lines, strict=False)
        if len(values)
    ]
    return ", ".join(words) or "no points"
