"""A comparison as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prune2serve.records import Comparison, ComparisonRow

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = (
    "mean_ttft",
    "p50_ttft",
    "p95_ttft",
    "mean_tpot",
    "p50_tpot",
    "p95_tpot",
    "p99_itl",
    "mean_e2e",
    "p95_e2e",
    "output_throughput",
    "goodput",
)
"""Rows worth a line on a terminal; the report has all of them."""
SHORT = {"better": "better", "worse": "worse", "not distinguishable": "~"}
"""Verdicts, short enough for 80 columns."""
COLOURS = {"better": "green", "worse": "red", "not distinguishable": "yellow"}


def number(value: float | None) -> str:
    """Four significant digits, never in exponents."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"


def label(row: ComparisonRow) -> str:
    """`p95_ttft` -> `p95 TTFT`."""
    words = row.metric.split("_")
    return " ".join(word.upper() if word in ("ttft", "tpot", "itl", "e2e") else word for word in words)


def table_of(comparison: Comparison) -> Table:
    """Return the table: one line a metric, the ratio beside its interval and the ideal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    settings = comparison.settings
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{comparison.candidate} against {comparison.baseline}",
        caption=f"{settings.get('num_rounds')} rounds, {settings.get('requests_per_arm')} requests an arm, "
        f"{settings.get('seconds')} s. Ratio = candidate / baseline; 95% intervals over rounds; "
        "~ is not distinguishable.",
    )
    table.add_column("metric", no_wrap=True)
    for name in ("baseline", "candidate", "ratio", "95% interval", "ideal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in comparison.rows:
        if row.metric not in SHOWN or row.ratio is None:
            continue
        interval = f"{row.interval[0]:.3f} - {row.interval[1]:.3f}" if row.interval else "-"
        table.add_row(
            f"{label(row).removeprefix('output ')} [dim]{row.unit}[/dim]",
            number(row.baseline),
            number(row.candidate),
            f"{row.ratio:.3f}",
            interval,
            f"{row.ideal_ratio:.3f}" if row.ideal_ratio else "-",
            Text(SHORT.get(row.verdict or "", ""), style=COLOURS.get(row.verdict or "", "")),
        )
    return table


def attribution_lines(comparison: Comparison) -> list[str]:
    """Say in words where the ideal ratio went."""
    found: dict[str, Any] = comparison.attribution
    if not found or not found.get("parts"):
        return []
    lines = [
        f"Layers kept: {found['layers_ratio']:.3f} of the parent's; of the weights read per token (embeddings "
        f"and head stay): {found['weights_ratio']:.3f}."
    ]
    for name, part in found["parts"].items():
        text = f"  {name:8} {number(part['baseline_ms'])} -> {number(part['candidate_ms'])} ms a request"
        if part.get("ratio") is not None and "ideal_ratio" in part:
            text += f", ratio {part['ratio']:.3f}, ideal {part['ideal_ratio']:.3f}"
        if part.get("overhead_interval_ms"):
            low, high = part["overhead_interval_ms"]
            text += "; as ideal, within noise" if low <= 0 else f"; {number(low)} to {number(high)} ms do not shrink"
        lines.append(text)
    return lines
