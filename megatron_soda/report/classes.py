"""A run's token classes: their names in order, and their colours."""

import re

from .reading import as_dict

HUES = {"text": ("#b4530a", "#f2a65e"), "marker": ("#6b7280", "#9aa3b2"), "semantic": ("#7c3aed", "#b79cff")}
OTHER_HUE = ("#be185d", "#f58ab8")
ACOUSTIC = (((8, 64, 110), (32, 148, 132)), ((176, 236, 255), (34, 150, 160)))  # from, to; light, dark


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
    """A CSS variable with a light and a dark value for every class; the acoustic ones are shades of one hue."""
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
