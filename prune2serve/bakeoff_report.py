"""A bake-off for a person: the table, the chart of quality against size, and a page with both.

A row is on the Pareto front when no other row is at least as small and at least as good, and better in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from markupsafe import Markup, escape

from prune2serve.bakeoff import Bakeoff, BakeoffRow
from prune2serve.records import QualityReport, TaskResult
from prune2serve.serve.charts import Axis, short

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 36
LABEL_WIDTH = 92.0
DODGE = 7.0
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fc9", "#8a6d3b", "#c0392b", "#5b7083",
)  # fmt: skip
"""Okabe and Ito's palette, told apart with any colour vision, and four more; the shapes differ as well."""
SHAPES = ("circle", "square", "triangle", "diamond")

STYLE = """
svg{--ink:#1c2330;--soft:#69707d;--grid:#e3e6eb;--paper:#fff;font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){svg{--ink:#e8eaee;--soft:#a0a7b4;--grid:#333a46;--paper:#14171d}}
svg .paper{fill:var(--paper)}svg text{fill:var(--ink)}svg .tick{fill:var(--soft);font-size:11px}
svg .grid{stroke:var(--grid)}svg .front{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4}
svg .title{font-weight:600}svg .parent{stroke:var(--soft);stroke-width:1.5}
"""


PAGE_STYLE = """
body{font:14px system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}
div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #8884;white-space:nowrap}
svg{max-width:46rem;width:100%}
"""


@dataclass(frozen=True)
class Measure:
    """One way to say how good a row is."""

    title: str
    value: Callable[[QualityReport], float]
    higher_is_better: bool = False
    log: bool = True
    parent: Callable[[QualityReport], float] | None = None
    """The parent's own value, where it is worth a line."""


MEASURES = (
    Measure("KL to the parent, nats per token (lower is better)", lambda q: q.kl),
    Measure("Perplexity, times the parent's (lower is better)", lambda q: q.perplexity.ratio),
    Measure(
        "Zero-shot accuracy, mean over the tasks, % (higher is better)",
        lambda q: 100 * mean_accuracy(q.tasks),
        higher_is_better=True,
        log=False,
        parent=lambda q: 100 * mean_accuracy(q.tasks, "parent"),
    ),
)


def mean_accuracy(tasks: Sequence[TaskResult], of: Literal["parent", "pruned"] = "pruned") -> float:
    """Of each task acc_norm where it has one, else acc."""
    return mean(getattr(task.metrics[headline(tuple(task.metrics))], of) for task in tasks)


def headline(metrics: Sequence[str]) -> str:
    return "acc_norm" if "acc_norm" in metrics else "acc"


def pareto(rows: Sequence[BakeoffRow], measure: Measure) -> list[BakeoffRow]:
    """The rows that no other row beats, smallest model first."""
    done = [(row, cost(row, measure)) for row in rows if row.quality]
    done.sort(key=lambda pair: (pair[0].num_parameters, pair[1]))
    front: list[BakeoffRow] = []
    best = float("inf")
    for row, value in done:
        if value < best or (value == best and row.num_parameters == front[-1].num_parameters):
            front.append(row)
            best = value
    return front


def cost(row: BakeoffRow, measure: Measure) -> float:
    """Lower is better."""
    assert row.quality is not None
    value = measure.value(row.quality)
    return -value if measure.higher_is_better else value


def table(result: Bakeoff) -> tuple[list[str], list[list[str]]]:
    """Header and cells; a `*` marks the rows on the Pareto front of KL against size."""
    front = pareto(result.rows, MEASURES[0])
    tasks = next((row.quality.tasks for row in result.rows if row.quality), ())
    header = ["", "method", "ratio", "removed", "layers", "params", "ppl", "x", "KL", "top-1"]
    header += [f"{task.name} {headline(tuple(task.metrics))}" for task in tasks] + ["verdict", "s", "GiB"]
    parent = next((row.quality for row in result.rows if row.quality), None)
    cells = []
    if parent:
        own = [f"{100 * task.metrics[headline(tuple(task.metrics))].parent:.1f}" for task in tasks]
        size = [str(result.num_layers), f"{result.num_parameters / 1e6:.1f}M"]
        cells.append(
            ["", "parent", "", "", *size, short(parent.perplexity.parent), "1", "0", "100.0", *own, "", "", ""]
        )
    cells += [_cells(row, len(tasks), "*" if any(row is other for other in front) else "") for row in result.rows]
    return header, cells


def _cells(row: BakeoffRow, num_tasks: int, mark: str) -> list[str]:
    start = [mark, row.method, f"{row.ratio:g}"]
    quality = row.quality
    if quality is None:
        return [*start, row.error or "", *([""] * (9 + num_tasks))]
    p = quality.perplexity
    accuracies = [f"{100 * task.metrics[headline(tuple(task.metrics))].pruned:.1f}" for task in quality.tasks]
    return [
        *start, ranges(row.removed), str(row.num_layers), f"{row.num_parameters / 1e6:.1f}M", short(p.pruned),
        f"{p.ratio:.3g}", f"{quality.kl:.3f}", f"{100 * quality.top1_agreement:.1f}", *accuracies,
        quality.verdict or "", f"{sum(row.seconds.values()):.0f}", f"{row.peak_memory_bytes / 2**30:.1f}",
    ]  # fmt: skip


def ranges(layers: Sequence[int]) -> str:
    """(3, 4, 5, 9) -> `3-5,9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def chart(result: Bakeoff) -> Markup:
    """One SVG file: a panel a measure, quality against size, the Pareto front dashed, a legend below.

    Raises:
        ValueError: no row was measured.
    """
    rows = [row for row in result.rows if row.quality]
    if not rows:
        raise ValueError("no row was measured")
    measures = [m for m in MEASURES if m.title.startswith(("KL", "Perplexity")) or rows[0].quality.tasks]  # type: ignore[union-attr]
    methods = list(dict.fromkeys(row.method for row in rows))
    parts = [_panel(result, rows, methods, measure, i * HEIGHT) for i, measure in enumerate(measures)]
    top = len(measures) * HEIGHT
    parts.append(_legend(methods, top))
    height = top + 24 * -(-len(methods) // 3) + 34
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Quality against size of {len(rows)} pruned models"><style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>{"".join(parts)}</svg>'
    )


def _panel(result: Bakeoff, rows: Sequence[BakeoffRow], methods: Sequence[str], measure: Measure, top: int) -> str:
    values = [measure.value(row.quality) for row in rows if row.quality]
    sizes = [row.num_parameters / 1e6 for row in rows]
    parent = measure.parent(rows[0].quality) if measure.parent and rows[0].quality else None
    spread = values if parent is None else [*values, parent]
    margin = max(max(sizes) - min(sizes), max(sizes) * 0.02) * 0.1
    x = Axis(min(sizes) - margin, max(sizes) + margin, LEFT, WIDTH - RIGHT)
    log = measure.log and min(values) > 0
    pad = (max(spread) - min(spread) or 1) * 0.08
    low, high = (min(spread) / 1.12, max(spread) * 1.12) if log else (min(spread) - pad, max(spread) + pad)
    y = Axis(low, high, top + HEIGHT - BOTTOM, top + TOP, log)
    parts = [f'<text class="title" x="{LEFT}" y="{top + 20}">{escape(measure.title)}</text>']
    for value in y.ticks(5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(_tick(LEFT - 8, y(value) + 4, short(value), "end"))
    base, labelled = top + HEIGHT - BOTTOM, -LABEL_WIDTH
    for size in sorted(set(sizes)):
        share = size * 1e6 / result.num_parameters
        parts.append(f'<line class="grid" x1="{x(size)}" x2="{x(size)}" y1="{top + TOP}" y2="{base}"/>')
        if x(size) - labelled > LABEL_WIDTH:
            labelled = x(size)
            parts.append(_tick(labelled, base + 16, f"{size:.1f}M ({share:.0%})"))
    if parent is not None:
        parts.append(f'<line class="parent" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(parent)}" y2="{y(parent)}"/>')
        parts.append(_tick(LEFT + 4, y(parent) + 14, "parent", "start"))

    def place(row: BakeoffRow, value: float) -> tuple[float, float]:
        """Methods of one size stand side by side, so that equal ones are both seen."""
        aside = (methods.index(row.method) - (len(methods) - 1) / 2) * min(DODGE, DODGE * 6 / len(methods))
        return x(row.num_parameters / 1e6) + aside, y(value)

    front = [place(row, measure.value(row.quality)) for row in pareto(rows, measure) if row.quality]
    parts.append(f'<polyline class="front" points="{" ".join(f"{a:.2f},{b:.2f}" for a, b in sorted(front))}"/>')
    for row, value in zip(rows, values, strict=True):
        title = f"{row.method} at {row.ratio:g}: {value:.4g}, layers {ranges(row.removed)} removed"
        parts.append(_point(methods.index(row.method), *place(row, value), title))
    return "".join(parts)


def _tick(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'


def _point(index: int, x: float, y: float, title: str = "") -> str:
    colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)]
    style = f'fill="{colour}" fill-opacity="0.85" stroke="var(--paper)"'
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="5" {style}>{inner}</circle>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -5.5), (5.5, 4.5), (-5.5, 4.5)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.2f},{y + dy:.2f}" for dx, dy in corners)
    return f'<polygon points="{points}" {style}>{inner}</polygon>'


def _legend(methods: Sequence[str], top: int) -> str:
    parts = []
    for i, method in enumerate(methods):
        x, y = LEFT + (i % 3) * 220, top + 14 + 24 * (i // 3)
        parts.append(_point(i, x, y - 4))
        parts.append(f'<text x="{x + 12}" y="{y}">{escape(method)}</text>')
    y = top + 14 + 24 * -(-len(methods) // 3)
    parts.append(f'<line class="front" x1="{LEFT - 6}" x2="{LEFT + 22}" y1="{y - 4}" y2="{y - 4}"/>')
    parts.append(f'<text class="tick" x="{LEFT + 30}" y="{y}">Pareto front: no smaller model is as good</text>')
    return "".join(parts)


def page(result: Bakeoff) -> str:
    """A self-contained HTML page: the chart and the table."""
    header, cells = table(result)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    name = escape(result.model.rstrip("/").split("/")[-1])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>Bake-off of {name}</title><style>{PAGE_STYLE}</style></head><body>"
        f"<h1>{name}: {len(result.rows)} pruned models</h1><p>Measured on {escape(result.text.split('/')[-1])}. "
        f"A star marks the Pareto front of KL against size.</p>{chart(result)}"
        f"<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></body></html>\n"
    )
