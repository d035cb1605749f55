"""What repeats say: means and spreads over seeds, paired tests over seeds and over images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import ttest_rel, wilcoxon

from refine_control.evaluate.metrics import sign

REGIONS = ("whole", "hole")
LEAST_SEEDS = 3  # on fewer, nothing is claimed and no spread is told
Results = dict[int, dict[str, Any]]  # seed -> what runs.result_of reads


def value(result: dict[str, Any], domain: str, metric: str, region: str) -> float:
    return result["domains"][domain]["metrics"][metric][region]


def over_seeds(results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """domain -> metric -> region -> mean, and the standard deviation (None for one seed)."""
    means: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for domain, metrics in metrics_of(results).items():
        means[domain], spread[domain] = {}, {}
        for metric in metrics:
            values = {r: [value(one, domain, metric, r) for one in results.values()] for r in REGIONS}
            means[domain][metric] = {r: statistics.mean(v) for r, v in values.items()}
            spread[domain][metric] = {r: statistics.stdev(v) if len(v) > 1 else None for r, v in values.items()}
    return means, spread


def metrics_of(results: Results) -> dict[str, list[str]]:
    """domain -> the metrics that were scored."""
    return {domain: list(scored["metrics"]) for domain, scored in next(iter(results.values()))["domains"].items()}


def duel(ours: Results, theirs: Results, domain: str, metric: str) -> dict[str, Any] | None:
    """How much better ours is than theirs in the hole (above 0: better, whatever the metric's sense), seed by seed.

    mean, sd of the gain; won of n seeds; p_seeds of a paired t-test where there are LEAST_SEEDS or more; p_images of a
    Wilcoxon test over images, each averaged over the seeds, for metrics that every image has. A row that is not trained
    (classical inpainting) is met by every seed of ours. None where they have no seed in common.
    """
    one = next(iter(theirs.values()))
    met = theirs if one["is_trained"] else dict.fromkeys(ours, one)
    pairs = [(mine, met[seed]) for seed, mine in ours.items() if seed in met]
    if not pairs:
        return None
    scores = [(value(a, domain, metric, "hole"), value(b, domain, metric, "hole")) for a, b in pairs]
    gains = [sign(metric) * (a - b) for a, b in scores]
    tested = one["is_trained"] and len(pairs) >= LEAST_SEEDS and any(gains)
    return {
        "mean": statistics.mean(gains),
        "sd": statistics.stdev(gains) if len(gains) > 1 else None,
        "won": sum(gain > 0 for gain in gains),
        "n": len(gains),
        "p_seeds": float(ttest_rel(*zip(*scores, strict=True)).pvalue) if tested else None,
        "p_images": _over_images(pairs, domain, metric),
    }


def _over_images(pairs: list[tuple[Any, Any]], domain: str, metric: str) -> float | None:
    per_image = [[r["domains"][domain]["per_image"].get(metric, {}).get("hole") for r in pair] for pair in pairs]
    if not all(a and b for a, b in per_image):
        return None
    mine, other = (np.mean([pair[side] for pair in per_image], axis=0) for side in (0, 1))
    return float(wilcoxon(mine, other).pvalue) if np.any(mine != other) else None


def beyond_spread(found: Mapping[str, Any]) -> int:
    """1 where ours is better by more than the spread of the gain over seeds, -1 where worse by more, else 0; 0 too on
    fewer than LEAST_SEEDS."""
    if found["n"] < LEAST_SEEDS or abs(found["mean"]) <= found["sd"]:
        return 0
    return 1 if found["mean"] > 0 else -1


def closed(teacher: float, scratch: float, student: float) -> float:
    """How much of the way from scratch to the teacher a student went, less is better: 0 at scratch, 1 at the teacher,
    1 too for a student as good as the teacher or better, 0 where the teacher itself is not better than scratch."""
    if student <= teacher:
        return 1.0
    return (scratch - student) / (scratch - teacher) if scratch > teacher else 0.0
