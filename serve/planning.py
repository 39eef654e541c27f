"""How long a run must be to find an effect: a pilot of a few rounds, then the noncentral t distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from prune2serve.serve import rows, statistics
from prune2serve.serve.compare import Plan, run
from prune2serve.serve.design import StoppingRule

PILOT_ROUNDS = 6


def estimate_rounds(plan: Plan, effect: float, pilot_rounds: int = PILOT_ROUNDS) -> dict[str, Any]:
    """Run a pilot and return, per watched metric, the rounds that find a relative change of `effect`.

    The spread is that of the pilot's rounds; that so few rounds hardly know it is allowed for in the power.
    """
    pilot = replace(plan, stopping=StoppingRule(max_rounds=pilot_rounds), label="Pilot")
    made = run(pilot)
    seconds_per_round = made.seconds / pilot_rounds
    found: dict[str, Any] = {}
    for row in rows.rows_of(made.traces, only=rows.WATCHED, seed=plan.seed):
        if row.interval is None:
            continue
        t = statistics.t_quantile(0.5 + statistics.CONFIDENCE / 2, pilot_rounds - 1)
        error = math.log(row.interval[1] / row.interval[0]) / 2 / t
        per_round = error * math.sqrt(pilot_rounds)
        needed = statistics.rounds_needed(effect, per_round, pilot_rounds)
        found[row.metric] = {
            "spread_per_round": per_round,
            "rounds": needed,
            "seconds": needed * seconds_per_round,
            "power": statistics.power(effect, per_round, needed, pilot_rounds),
        }
    return {
        "effect": effect,
        "confidence": statistics.CONFIDENCE,
        "pilot_rounds": pilot_rounds,
        "seconds_per_round": seconds_per_round,
        "metrics": found,
    }


def explain(found: dict[str, Any]) -> str:
    """The estimate in words."""
    lines = [
        f"To find a change of {found['effect']:.1%} (95% interval, 80% power), judging by a pilot of "
        f"{found['pilot_rounds']} rounds of {found['seconds_per_round']:.1f} s:"
    ]
    for metric, needs in found["metrics"].items():
        lines.append(
            f"  {metric:18} {needs['rounds']:5} rounds, {needs['seconds'] / 60:.1f} min "
            f"(spread of a round {needs['spread_per_round']:.1%}, power {needs['power']:.0%})"
        )
    return "\n".join(lines)
