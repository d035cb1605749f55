"""What the proof has to show (the headline), worked out from the results: each claim with its figures, held or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from refine_control.compare.statistics import Results, beyond_spread, closed, duel, metrics_of, over_seeds, value
from refine_control.evaluate.metrics import sign

LEAST_SEEDS, MAY_LOSE, LEAST_SHARE, LEAST_CLOSED = 3, 1, 0.95, 0.5
CLASSICAL = ("mean-fill", "telea", "navier-stokes", "biharmonic", "patchmatch")


class Claim(NamedTuple):
    """against: the row that the method is to be above; None where it is held to the teacher."""

    text: str
    holds: bool
    figures: str
    against: str | None = None


def claims(ours: str, results: Mapping[str, Results]) -> list[Claim]:
    """In the hole, on every domain: above every other row, above scratch in all metrics, near the teacher.

    Claims whose rows are not there are left out; with fewer than LEAST_SEEDS of ours there is none.
    """
    found: list[Claim] = []
    if len(results.get(ours, {})) < LEAST_SEEDS:
        return found
    for domain, metrics in metrics_of(results[ours]).items():
        for rival in (name for name in results if name not in (ours, "scratch", "teacher")):
            found += _above(ours, rival, results, domain, metrics, len(metrics) - MAY_LOSE)
        if "scratch" in results:
            found += _above(ours, "scratch", results, domain, metrics, len(metrics))
        if "teacher" in results:
            found += _near_teacher(ours, results, domain, metrics)
    return found


def gate_failures(results: Mapping[str, Results]) -> list[str] | None:
    """What the teacher is not better in than the classical rows that are there: a table on it is marked so.

    The gate is LPIPS, FID and CMMD in the hole, on held-out concepts of the labelled domain: PSNR and SSIM reward the
    blur that classical inpainting is. None where there is no teacher, or no classical row.
    """
    classical = {name: some for name, some in results.items() if next(iter(some.values()))["rival"] in CLASSICAL}
    if "teacher" not in results or not classical:
        return None
    failures = []
    teacher, _ = over_seeds(results["teacher"])
    for rival, result in classical.items():
        theirs, _ = over_seeds(result)
        for metric in (m for m in teacher["labelled"] if sign(m) < 0):
            if teacher["labelled"][metric]["hole"] >= theirs["labelled"][metric]["hole"]:
                failures.append(f"{metric} against {rival}")
    return failures


def _above(
    ours: str, rival: str, results: Mapping[str, Results], domain: str, metrics: list[str], least: int
) -> list[Claim]:
    """Better on average in `least` metrics or more, in none worse by more than the spread. No claim on few seeds."""
    duels = {m: found for m in metrics if (found := duel(results[ours], results[rival], domain, m))}
    if any(found["n"] < LEAST_SEEDS for found in duels.values()) or not duels:
        return []
    won = [m for m, found in duels.items() if found["mean"] > 0]
    clear = [m for m, found in duels.items() if beyond_spread(found) > 0]
    worse = [m for m, found in duels.items() if beyond_spread(found) < 0]
    n = min(found["n"] for found in duels.values())
    figures = f"better in {len(won)}, beyond the spread in {len(clear)}, worse beyond it in {len(worse)}; {n} seeds"
    if worse:
        figures += f" (worse: {', '.join(worse)})"
    text = f"{domain}: above {rival} in {least} of {len(metrics)}"
    return [Claim(text, len(won) >= least and not worse, figures, rival)]


def _near_teacher(ours: str, results: Mapping[str, Results], domain: str, metrics: list[str]) -> list[Claim]:
    means = {name: over_seeds(results[name])[0][domain] for name in (ours, "teacher", "scratch") if name in results}
    found = []
    for metric in metrics:
        mine, teacher = means[ours][metric]["hole"], means["teacher"][metric]["hole"]
        seeds = {seed: value(result, domain, metric, "hole") for seed, result in results[ours].items()}
        if sign(metric) > 0:
            text = f"{domain}: {LEAST_SHARE:.0%} of the teacher's {metric}"
            found.append(_share(text, mine / teacher, [one / teacher for one in seeds.values()], LEAST_SHARE))
        elif len(results.get("scratch", ())) >= LEAST_SEEDS:
            began = {seed: value(result, domain, metric, "hole") for seed, result in results["scratch"].items()}
            text = f"{domain}: {metric} at least half of the way from scratch to the teacher"
            ways = [closed(teacher, began[seed], one) for seed, one in seeds.items() if seed in began]
            found.append(_share(text, closed(teacher, means["scratch"][metric]["hole"], mine), ways, LEAST_CLOSED))
    return found


def _share(text: str, held: float, shares: list[float], least: float) -> Claim:
    """held: the share of the mean scores, which decides. shares: seed by seed, scratch too."""
    reach = sum(one >= least for one in shares)
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    figures = f"{100 * held:.1f} %{spread}; in {reach} of {len(shares)} seeds"
    return Claim(text, held >= least, figures)
