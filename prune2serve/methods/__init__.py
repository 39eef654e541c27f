"""Selectors: one a file, each from layer scores (and a model, where it searches) to a PruningPlan."""
