"""Importance of each searched parameter for reaching the best quarter of the configurations. Imports Optuna late.

The method is PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), as implemented by Optuna.
"""

from __future__ import annotations

import warnings
from typing import Any

from tune_ego.errors import UserError
from tune_ego.results.experiment import Experiment, by_configuration
from tune_ego.search.searcher import import_optuna, parameters

_LEAST_CONFIGURATIONS = 12
"""Validated configurations needed: fewer leave under 3 in the best quarter, too few for a distribution."""
_BEST_SHARE = 0.25


def importance_numbers(search: Experiment) -> dict[str, Any]:
    """Return `entries` with a share of the importance for each parameter; the shares sum to 1.

    Each branch of a conditional parameter (`when`) has its own entry. Where the importance cannot be computed,
    `entries` is empty and `why` holds the reason.
    """
    scored = [entry for entry in by_configuration(search.trials) if entry.accuracy is not None]
    base = {"method": "PED-ANOVA (Optuna)", "best_share": _BEST_SHARE, "configurations": len(scored), "entries": []}
    if len(scored) < _LEAST_CONFIGURATIONS:
        why = f"{len(scored)} validated configurations are too few; at least {_LEAST_CONFIGURATIONS} are needed"
        return {**base, "why": why}
    try:
        optuna = import_optuna()
    except UserError:
        return {**base, "why": "Optuna is not installed: pip install 'tune_ego[optuna]'"}
    study = optuna.create_study(direction="maximize")
    for entry in scored:
        values, distributions = parameters(search.space, entry.trials[0].sampled)
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=entry.accuracy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks PED-ANOVA as experimental
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:  # e.g. no parameter varies
            return {**base, "why": f"Optuna cannot compute the importance: {error}"}
    branched = {key for key, branches in search.space.branches.items() if len(branches) > 1}
    entries = []
    for name, share in shares.items():
        key, _, index = name.rpartition("@")
        when = search.space.branches[key][int(index)].when if key in branched else {}
        condition = ", ".join(f"{other} {'/'.join(map(str, allowed))}" for other, allowed in when.items())
        entries.append({"key": key, "when": condition, "share": float(share)})
    total = sum(entry["share"] for entry in entries)
    if not total > 0:
        return {**base, "why": "the values of the best quarter are distributed as those of the other configurations"}
    return {**base, "entries": [{**entry, "share": entry["share"] / total} for entry in entries], "why": ""}
