"""What the proof has to show (the headline), worked out from the results: each claim with its figures, held or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refine_control.compare.statistics import (
    LEAST_SEEDS,
    Results,
    beyond_spread,
    closed,
    duel,
    metrics_of,
    over_seeds,
    value,
)
from refine_control.evaluate.metrics import sign

MAY_LOSE, LEAST_SHARE, LEAST_CLOSED = 1, 0.95, 0.5
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
    """Shares of the teacher's PSNR and SSIM, of the way from scratch in the others; seed by seed."""
    mine, began = results[ours], results.get("scratch", {})
    both = [seed for seed in mine if seed in began]
    teachers = over_seeds(results["teacher"])[0][domain]
    found = []
    for metric in metrics:
        teacher = teachers[metric]["hole"]
        if sign(metric) > 0:
            text = f"{domain}: {LEAST_SHARE:.0%} of the teacher's {metric}"
            shares = [value(one, domain, metric, "hole") / teacher for one in mine.values()]
            found.append(_share(text, shares, LEAST_SHARE))
        elif len(both) >= LEAST_SEEDS:
            text = f"{domain}: {metric} at least half of the way from scratch to the teacher"
            pairs = [[value(some[seed], domain, metric, "hole") for some in (began, mine)] for seed in both]
            found.append(_share(text, [closed(teacher, *pair) for pair in pairs], LEAST_CLOSED))
    return found


def _share(text: str, shares: Sequence[float], least: float) -> Claim:
    """shares: one of each seed; their mean decides."""
    mean, reach = statistics.mean(shares), sum(one >= least for one in shares)
    spread = 100 * statistics.stdev(shares)
    return Claim(text, mean >= least, f"{100 * mean:.1f} % ± {spread:.1f}; in {reach} of {len(shares)} seeds")
