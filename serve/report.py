"""The report: one HTML file that needs no network, from a Comparison and the build's Manifest, if there is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prune2serve import __version__
from prune2serve.records import Comparison, ComparisonRow, Manifest
from prune2serve.serve import charts, metrics, rows
from prune2serve.serve.table import label, number

TEMPLATES = Path(__file__).parent / "templates"
LATENCY_NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End-to-end latency",
}
HEADLINES = {
    "mean_tpot": "time per output token",
    "mean_ttft": "time to first token",
    "output_throughput": "output throughput",
    "mean_e2e": "end-to-end latency",
}


def render(comparison: Comparison, manifest: Manifest | None = None) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    jinja.filters |= {"number": number, "label": label, "ratio": lambda v: "–" if v is None else f"{v:.3f}"}
    found = {row.metric: row for row in comparison.rows}
    return jinja.get_template("report.html").render(
        version=__version__,
        c=comparison,
        headlines=[(name, found[metric]) for metric, name in HEADLINES.items() if _has_ratio(found.get(metric))],
        forest=_forest(comparison),
        distributions=_distributions(comparison),
        timelines=_timelines(comparison),
        parts=_parts(comparison),
        model=_model(manifest),
        floor=rows.noise_floor(comparison.noise_floor),
        environment=_environment(comparison),
        commands=_commands(comparison),
        settings={k: v for k, v in comparison.settings.items() if k not in NOT_SETTINGS and v is not None},
    )


NOT_SETTINGS = ("commands", "endpoints", "definitions")


def _has_ratio(row: ComparisonRow | None) -> bool:
    return row is not None and row.ratio is not None


def _forest(comparison: Comparison) -> dict[str, Any]:
    """Place every ratio, its interval and its ideal on one logarithmic strip, in percent of its width."""
    shown = [row for row in comparison.rows if row.ratio]
    bounds = [1.0]
    for row in shown:
        bounds += [row.ratio or 1.0, *(row.interval or ())]
        bounds += [row.ideal_ratio] if row.ideal_ratio else []
    # A few very wide intervals must not squeeze all the others: the strip ends at 4x, and they are cut there.
    low, high = max(min(bounds), 0.25) / 1.05, min(max(bounds), 4.0) * 1.05
    axis = charts.Axis(low, high, 0, 100, log=True)

    def at(value: float) -> float:
        return min(max(axis(value), 0.0), 100.0)

    floors = rows.noise_floor(comparison.noise_floor)
    lines = []
    for row in shown:
        assert row.ratio is not None
        floor = floors.get(row.metric)
        lines.append(
            {
                "row": row,
                "at": at(row.ratio),
                "from": at(row.interval[0]) if row.interval else None,
                "to": at(row.interval[1]) if row.interval else None,
                "ideal": at(row.ideal_ratio) if row.ideal_ratio else None,
                "floor": (at(1 / (1 + floor)), at(1 + floor)) if floor is not None else None,
            }
        )
    ticks = [(at(v), f"{v:g}") for v in (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 3, 4) if low <= v <= high]
    if len(ticks) > 7:
        ticks = [(at(v), f"{v:g}") for v in (0.25, 0.5, 0.75, 1, 1.5, 2, 4) if low <= v <= high]
    return {"lines": lines, "one": at(1.0), "ticks": ticks}


def _distributions(comparison: Comparison) -> list[dict[str, Any]]:
    a = rows.by_round(comparison.requests, "baseline")
    b = rows.by_round(comparison.requests, "candidate")
    made = []
    for name, title in LATENCY_NAMES.items():
        x, y = rows.latency_values(a, name), rows.latency_values(b, name)
        if len(x) and len(y):
            svg = charts.cumulative(x.sorted, y.sorted, "ms", f"{title}: share of values at most x, both arms")
            made.append({"title": title, "svg": svg, "counts": (len(x), len(y))})
    return made


def _timelines(comparison: Comparison) -> list[dict[str, Any]]:
    measured = [t for t in comparison.requests if t.round >= 0 and metrics.has_latency(t)]
    if not measured:
        return []
    start = min(t.start_ns for t in measured)
    made = []
    for title, latency in (("Time to first token", metrics.ttft_ns), ("Time per output token", metrics.tpot_ns)):
        points = [
            (t.arm, (t.start_ns - start) / 1e9, value / metrics.NS_PER_MS)
            for t in measured
            if (value := latency(t)) is not None
        ]
        made.append({"title": title, "svg": charts.timeline(points, "ms", f"{title} of every request over time")})
    return made


def _parts(comparison: Comparison) -> list[dict[str, Any]]:
    """Stack each arm's mean request, and the ideal one, as shares of the longest."""
    parts: dict[str, Any] = comparison.attribution.get("parts", {})
    if not parts:
        return []
    bars = []
    for title, key in (("baseline", "baseline_ms"), ("candidate", "candidate_ms"), ("ideal", None)):
        lengths = {
            name: part[key] if key else part["baseline_ms"] * part.get("ideal_ratio", 1.0)
            for name, part in parts.items()
        }
        bars.append({"title": title, "lengths": lengths, "total": sum(lengths.values())})
    longest = max(bar["total"] for bar in bars)
    for bar in bars:
        bar["shares"] = {name: 100 * length / longest for name, length in bar["lengths"].items()}
    return bars


def _model(manifest: Manifest | None) -> dict[str, Any] | None:
    """Gather what was removed, the scores and the quality."""
    if manifest is None:
        return None
    plan = manifest.plan
    scores = []
    if manifest.scores is not None:
        for name, values in manifest.scores.metrics.items():
            if len(values) == plan.num_layers:
                scores.append(
                    (name.replace("_", " "), charts.layer_bars(values, plan.removed, f"{name} of every layer"))
                )
    else:
        # Without scores the strip still shows which layers went.
        scores.append(("layers", charts.layer_bars([1.0] * plan.num_layers, plan.removed, "layers kept and removed")))
    return {
        "manifest": manifest,
        "plan": plan,
        "scores": scores,
        "quality": manifest.quality,
        "healing": _healing(manifest.healing),
        "parameters_kept": manifest.num_parameters["pruned"] / manifest.num_parameters["parent"],
    }


def _healing(healing: dict[str, Any]) -> Any:
    """Draw the validation curve where the manifest holds one: a list of [tokens, loss] under `curve`."""
    points = [
        (float(p[0]), float(p[1]))
        for p in healing.get("curve") or ()
        if len(p) >= 2 and all(isinstance(v, int | float) and math.isfinite(v) for v in p[:2])
    ]
    return charts.curve(points, "tokens", "healing: validation loss over tokens") if len(points) > 1 else None


def _environment(comparison: Comparison) -> dict[str, str]:
    found = dict(comparison.environment)
    versions = found.pop("versions", {})
    found.pop("command", None)
    if "memory_bytes" in found:
        found["memory"] = f"{found.pop('memory_bytes') / 2**30:.1f} GiB"
    found["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    for arm, facts in comparison.settings.get("endpoints", {}).items():
        found[f"{arm} endpoint"] = ", ".join(f"{k} {v}" for k, v in facts.items())
    return {k.replace("_", " "): ", ".join(v) if isinstance(v, list) else str(v) for k, v in found.items() if v}


def _commands(comparison: Comparison) -> list[str]:
    import shlex

    commands = [comparison.environment.get("command", [])]
    commands += [command for command in comparison.settings.get("commands", {}).values()]
    return [shlex.join(command) for command in commands if command]
