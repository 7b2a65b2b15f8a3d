"""How much each searched parameter had to do with reaching the best quarter of the trials: Optuna's PED-ANOVA."""

from __future__ import annotations

import warnings
from typing import Any

from tune_ego.errors import UserError
from tune_ego.results.experiment import Experiment, by_configuration
from tune_ego.search.searcher import import_optuna, parameters

_LEAST = 12
"""Configurations under which three in the best quarter would be too few to say anything."""
_BEST = 0.25


def importance_numbers(search: Experiment) -> dict[str, Any]:
    """`entries`, shares that add up to 1, of the parameters; a branch of a `when` is a parameter of its own.

    Without them `why`.
    """
    scored = [found for found in by_configuration(search.trials) if found.accuracy is not None]
    base = {"method": "PED-ANOVA (Optuna)", "best_share": _BEST, "configurations": len(scored), "entries": []}
    if len(scored) < _LEAST:
        return {**base, "why": f"{len(scored)} validated configurations are too few; {_LEAST} at least are needed"}
    try:
        optuna = import_optuna()
    except UserError:
        return {**base, "why": "Optuna is not installed: pip install 'tune_ego[optuna]'"}
    study = optuna.create_study(direction="maximize")
    for found in scored:
        values, distributions = parameters(search.space, found.trials[0].sampled)
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=found.accuracy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, says Optuna of half of it
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:  # nothing varies
            return {**base, "why": f"Optuna finds none: {error}"}
    several = {key for key, branches in search.space.branches.items() if len(branches) > 1}
    entries = []
    for name, share in shares.items():
        key, _, index = name.rpartition("@")
        when = search.space.branches[key][int(index)].when if key in several else {}
        told = ", ".join(f"{other} {'/'.join(map(str, allowed))}" for other, allowed in when.items())
        entries.append({"key": key, "when": told, "share": float(share)})
    total = sum(entry["share"] for entry in entries)
    if not total > 0:
        return {**base, "why": "the best quarter is spread over all values as the rest is"}
    return {**base, "entries": [{**entry, "share": entry["share"] / total} for entry in entries], "why": ""}
