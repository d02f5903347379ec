"""Images and sound for the report: matplotlib charts as inline SVG, log-mel spectrograms as PNG, clips as WAV.

Charts have no colours of their own. They are drawn in stand-in colours, which are then replaced by the page's CSS
variables, so that one drawing works in the light and dark schemes and in print.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import soundfile
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

INK, MUTED, GRID = "#010101", "#010102", "#010103"
STAND_INS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
MOST_POINTS = 500  # points per line; longer runs are averaged down, or the page would grow with the run

MELS, TOP_HERTZ, RANGE_DB = 80, 8000.0, 70.0
PIXELS_WIDE = 1200
MOST_SECONDS = 60  # of a clip to show and play
MOST_SAMPLES = 8_000_000  # over all channels to decode from it


@dataclass
class Line:
    """One line in a chart. `colour` is the name of one of the page's CSS variables, such as "--c0"."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dots: bool = False  # dots joined by a thin line (few, exact points) instead of a plain line
    smooth: bool = False  # draw the values faintly and their running mean on top


@dataclass
class Chart:
    title: str  # read by screen readers; the visible heading is part of the page
    lines: list[Line]
    level: float | None = None  # a dashed horizontal line, such as a baseline
    y_name: str = ""
    log_y: bool = False
    top: float | None = None  # the upper end of the y axis, for lines that start far above the rest
    size: tuple[int, int] = (1000, 340)
    colours: dict[str, str] = field(default_factory=dict, repr=False)

    def stand_in(self, variable: str) -> str:
        """A stand-in colour for the CSS variable `variable`."""
        for stand_in, value in self.colours.items():
            if value == f"var({variable})":
                return stand_in
        stand_in = f"#0201{len(self.colours):02x}"
        self.colours[stand_in] = f"var({variable})"
        return stand_in


def draw(chart: Chart, key: str) -> Markup:
    """The chart as an inline <svg>; `key` makes the ids inside it unique on the page."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "text.parse_math": False,
        "font.size": 11,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        width, height = chart.size
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in chart.lines:
            draw_line(axes, line, chart.stand_in(line.colour), small=width < 500)
        if chart.level is not None:
            axes.axhline(chart.level, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        dress(axes, chart)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return inline(buffer.getvalue(), chart, key)


def draw_line(axes: Axes, line: Line, colour: str, small: bool) -> None:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if not x.size:
        return
    if line.dots or x.size == 1:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.45, zorder=2)
        axes.plot(x, y, color=colour, linewidth=0, marker="o", markersize=3 if small else 4, zorder=3)
        return
    if line.smooth and x.size >= 30:
        axes.plot(*thinned(x, y), color=colour, linewidth=0.8, alpha=0.28, zorder=2)
        y = running_mean(y, max(3, x.size // 40))
    axes.plot(*thinned(x, y), color=colour, linewidth=1.5 if small else 1.8, zorder=2.5)


def dress(axes: Axes, chart: Chart) -> None:
    """Axes, grid and ticks, quiet enough to leave the page to the lines."""
    narrow = chart.size[0] < 500
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel(chart.y_name, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.015, y=0.08)
    if chart.top is not None:
        axes.set_ylim(top=chart.top)
        shown = [y for line in chart.lines for y in line.y if np.isfinite(y) and y <= chart.top]
        low = min(shown, default=0.0)
        axes.set_ylim(bottom=low - 0.08 * (chart.top - low))


def inline(svg: str, chart: Chart, key: str) -> Markup:
    """Turns matplotlib's SVG file into an element of the page: no XML header, unique ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    body = svg[svg.index(">") + 1 :]
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{key}-", body)
    body = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", body)
    for stand_in, value in (STAND_INS | chart.colours).items():
        body = body.replace(stand_in, value)
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = chart.size
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, height, chart.title
    )
    return head + Markup(body)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points, each the mean of equally many neighbours."""
    if x.size <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(x.size), MOST_POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """The centred mean over `width` values; over fewer at the steep start, one-sided at the flat end."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(y.size)
    half = np.minimum(width // 2, index)
    first, end = index - half, np.minimum(index + half + 1, y.size)
    return (total[end] - total[first]) / (end - first)


def short(value: float) -> str:
    """A number for an axis: 25000 is 25k, 0.0003 is 3e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


class Clip(NamedTuple):
    samples: np.ndarray  # mono, float32, within -1 to 1
    rate: int
    whole: float = 0.0  # seconds of the whole file, if these samples are only its beginning

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def read_clip(path: Path) -> Clip:
    """The first MOST_SECONDS of a file, fewer if it has many channels, because the page embeds everything read."""
    facts = soundfile.info(path)
    most = min(MOST_SECONDS * facts.samplerate, MOST_SAMPLES // max(1, facts.channels))
    samples, rate = soundfile.read(path, frames=most, dtype="float32", always_2d=True)
    mono = np.nan_to_num(samples.mean(axis=1), posinf=1.0, neginf=-1.0).clip(-1.0, 1.0)
    return Clip(mono.astype(np.float32), rate, facts.duration if facts.frames > most else 0.0)


def wav_uri(clip: Clip) -> str:
    """The clip as a data URI. 16-bit WAV: every browser plays it, and it is lossless, so codecs can be compared."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip.samples, clip.rate, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def log_mel(clip: Clip) -> np.ndarray:
    """Log-mel energies in decibels, [MELS, frames], lowest band first; bands above the clip's own top are empty."""
    window = max(16, round(0.032 * clip.rate))
    padded = 2 ** int(np.ceil(np.log2(0.08 * clip.rate)))
    hop = max(1, round(0.008 * clip.rate), -(-len(clip.samples) // PIXELS_WIDE))
    mode = "reflect" if len(clip.samples) > window else "constant"  # silence would add a click at either end
    samples = np.pad(clip.samples, (window // 2, window), mode=mode)
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop][: max(1, len(clip.samples) // hop)]
    power = np.abs(np.fft.rfft(frames * np.hanning(window), padded)) ** 2
    return 10 * np.log10(power @ mel_filters(clip.rate, padded).T + 1e-10).T


def mel_filters(rate: int, size: int) -> np.ndarray:
    """Triangular filters, evenly spaced on the mel scale from 0 to TOP_HERTZ at every sampling rate."""
    edges = 700 * (10 ** (np.linspace(0, hertz_to_mel(TOP_HERTZ), MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(size, 1 / rate)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(0)


def hertz_to_mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


def spectrogram_uri(mel: np.ndarray, peak: float) -> str:
    """The spectrogram as a PNG data URI: brightest at `peak` decibels, black from RANGE_DB below it."""
    level = ((mel - peak) / RANGE_DB + 1).clip(0, 1)
    image = Image.fromarray(np.round(level[::-1] * 255).astype(np.uint8)).convert("P")
    image.putpalette((matplotlib.colormaps["magma"](range(256))[:, :3] * 255).round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def time_ticks(seconds: float) -> list[float]:
    """Round times from 0, at most eight, for the axis below a spectrogram."""
    if seconds <= 0:
        return [0.0]
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600) if seconds / s <= 7), seconds / 7)
    return [round(index * step, 3) for index in range(int(seconds / step) + 1)]
