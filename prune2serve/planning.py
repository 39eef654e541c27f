"""From a parent to a PruningPlan: score, select, refine, compensate; each stage is skipped when it is already done."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from prune2serve.clock import Clock
from prune2serve.errors import Prune2ServeError, UnsupportedArchitectureError
from prune2serve.methods import select
from prune2serve.methods.base import Selection, num_layers_to_remove
from prune2serve.options import BuildOptions
from prune2serve.progress import say
from prune2serve.records import LayerScores, PruningPlan
from prune2serve.stage_store import StageStore
from prune2serve.workbench import Workbench


def make_plan(
    bench: Workbench, num_layers: int, store: StageStore, clock: Clock
) -> tuple[LayerScores | None, PruningPlan]:
    """Decide what goes and what stands for it.

    Raises:
        Prune2ServeError: the options ask for something impossible.
    """
    options = bench.options
    if options.remove is not None:
        scores, plan = None, PruningPlan(num_layers, options.remove, "manual", why="named by the user")
    else:
        scores, plan = scored_plan(bench, num_layers, store, clock)
    if options.refine:
        plan = refined_plan(bench, plan, scores, store, clock)
    if options.compensate != "none" and not options.surgery_only:
        with clock("compensation"):
            plan = compensated_plan(bench, plan, store.directory / f"folds-{os.getpid()}")
    return scores, plan


def scored_plan(bench: Workbench, num_layers: int, store: StageStore, clock: Clock) -> tuple[LayerScores, PruningPlan]:
    """Score the layers and ask the selector."""
    options = bench.options
    num_remove, candidates = how_many(options, num_layers), removable(options, num_layers)
    scores = store.load("scores", LayerScores)
    if scores is None:
        with clock("calibration"):
            bench.prepare_calibration()
        with clock("scores"):
            scores = score(bench)
        store.save("scores", scores)
    plan = store.load("plan", PruningPlan)
    if plan is None:
        with clock("selection"):
            selection = Selection(
                scores,
                num_remove,
                candidates,
                options.seed,
                search=lambda: bench.search,
                model=lambda: bench.model,
                calibration=lambda: bench.calibration,
                work=store.directory,
                options=options.selector,
            )
            plan = select(options.method, selection)
        store.save("plan", plan)
    return scores, plan


def score(bench: Workbench) -> LayerScores:
    """One pass over the score split."""
    from prune2serve.activations import score_layers

    return score_layers(bench.model, bench.calibration.score)


def how_many(options: BuildOptions, num_layers: int) -> int:
    """Turn --ratio or --num-layers (25% when neither is given) into the number of layers to remove."""
    if options.num_layers is None:
        return num_layers_to_remove(0.25 if options.ratio is None else options.ratio, num_layers)
    if not 0 < options.num_layers < num_layers:
        raise Prune2ServeError(
            f"--num-layers {options.num_layers} is not a shallower model: the parent has {num_layers}, give 1 to "
            f"{num_layers - 1}"
        )
    return num_layers - options.num_layers


def removable(options: BuildOptions, num_layers: int) -> tuple[int, ...]:
    """The layers that are not protected."""
    if options.protect_first < 0 or options.protect_last < 0:
        raise Prune2ServeError("--protect-first and --protect-last count layers: give 0 or more")
    return tuple(range(options.protect_first, num_layers - options.protect_last))


def refined_plan(
    bench: Workbench, plan: PruningPlan, scores: LayerScores | None, store: StageStore, clock: Clock
) -> PruningPlan:
    """Local search from the selector's layers; plans that merge or replace are left as they are."""
    from prune2serve.refinement import refine

    if plan.merges or plan.replacements:
        raise Prune2ServeError(
            f"--refine swaps removed layers, but {plan.method} merges or replaces some: drop --refine"
        )
    refined = store.load("refined", PruningPlan)
    if refined is None:
        options = bench.options
        with clock("refinement"):
            refined = refine(
                plan,
                bench.search,
                removable(options, plan.num_layers),
                budget=options.refine,
                seed=options.seed,
                time_limit_s=options.refine_seconds,
                scores=scores,
            )
        store.save("refined", refined)
    return refined


def compensated_plan(bench: Workbench, plan: PruningPlan, directory: Path) -> PruningPlan:
    """Fold what was removed into the layers before the cuts, where that is valid and helps on the search split.

    Raises:
        UnsupportedArchitectureError: it is invalid here, and was asked for by name.
    """
    from prune2serve.compensation import KIND, fold_plan, removed_runs

    if not removed_runs(plan):
        why = "no removed layer follows a kept one that can be folded"
        return replace(plan, settings={**plan.settings, "compensation": {"kind": None, "why": why}})
    asked = bench.options.compensate == KIND
    try:
        folded = fold_plan(bench.model, plan, bench.calibration.score, directory)
    except UnsupportedArchitectureError as error:
        if asked:
            raise
        say(f"No compensation: {error}")
        return replace(plan, settings={**plan.settings, "compensation": {"kind": None, "why": str(error)}})
    before, after = bench.search.evaluate_plan(plan), bench.search.evaluate_plan(folded)
    helps = asked or after.kl < before.kl
    say(f"Linear fold: search KL {before.kl:.3f} to {after.kl:.3f}{'' if helps else ', so it is left out'}")
    found = {
        "kind": KIND if helps else None,
        "search_kl": {"before": before.kl, "after": after.kl},
        "search_perplexity": {"before": before.perplexity, "after": after.perplexity},
    }
    return replace(folded if helps else plan, settings={**plan.settings, "compensation": found})
