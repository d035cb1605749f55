"""Known answers: means, gains and tests over seeds and images; claims worked out from them."""

from typing import Any

import pytest
from scipy.stats import ttest_rel, wilcoxon

from refine_control.compare.claims import claims, gate_failures
from refine_control.compare.statistics import Results, beyond_spread, closed, duel, over_seeds


def results(
    psnr: list[float],
    fid: list[float] | None = None,
    images: list[list[float]] | None = None,
    rival: str | None = None,
    is_trained: bool = True,
) -> Results:
    """A result a seed, of one domain with these scores in the hole."""
    found: dict[int, dict[str, Any]] = {}
    for seed, value in enumerate(psnr):
        metrics = {"psnr": {"whole": value + 6, "hole": value}}
        if fid:
            metrics["fid[x]"] = {"whole": fid[seed], "hole": fid[seed]}
        per_image = {"psnr": {"hole": images[seed], "whole": images[seed]}} if images else {}
        scored = {"labelled": {"metrics": metrics, "per_image": per_image}}
        found[seed] = {"domains": scored, "rival": rival, "is_trained": is_trained}
    return found


def test_means_and_spreads() -> None:
    means, spread = over_seeds(results([10, 12, 14]))
    assert means["labelled"]["psnr"] == {"whole": 18, "hole": 12}
    assert spread["labelled"]["psnr"]["hole"] == 2
    assert over_seeds(results([10]))[1]["labelled"]["psnr"]["hole"] is None


def test_a_gain_is_above_0_where_ours_is_better_whatever_the_metric() -> None:
    ours, theirs = results([12, 13, 15], [90, 91, 95]), results([11, 13.5, 13], [100, 100, 100])
    up, down = (duel(ours, theirs, "labelled", m) for m in ("psnr", "fid[x]"))
    assert up is not None
    assert down is not None
    assert up["mean"] == pytest.approx((1 - 0.5 + 2) / 3)
    assert (up["won"], up["n"]) == (2, 3)
    assert down["mean"] == pytest.approx(8)
    assert down["won"] == 3
    assert up["p_seeds"] == pytest.approx(ttest_rel([12, 13, 15], [11, 13.5, 13]).pvalue)


def test_images_are_tested_on_their_means_over_seeds() -> None:
    mine, other = [[10.0, 11, 14, 12], [12.0, 11, 15, 13]], [[9.0, 10, 13, 12.5], [10.0, 10, 13, 12]]
    found = duel(results([1, 2], images=mine), results([1, 1], images=other), "labelled", "psnr")
    expected = wilcoxon([11, 11, 14.5, 12.5], [9.5, 10, 13, 12.25]).pvalue
    assert found is not None
    assert found["p_images"] == pytest.approx(expected)
    assert found["p_seeds"] is None, "two seeds are no test"


def test_a_row_without_seeds_is_met_by_every_seed_and_tested_over_images_alone() -> None:
    found = duel(results([12, 13, 14]), results([11], is_trained=False), "labelled", "psnr")
    assert found is not None
    assert (found["mean"], found["won"], found["n"], found["p_seeds"]) == (2, 3, 3, None)


def test_a_trained_row_is_met_on_common_seeds_alone() -> None:
    found = duel(results([12, 13, 14]), results([11]), "labelled", "psnr")
    assert found is not None
    assert (found["mean"], found["n"]) == (1, 1)
    assert duel({0: results([1])[0]}, {7: results([1])[0]}, "labelled", "psnr") is None


def test_beyond_the_spread() -> None:
    gains: list[dict[str, Any]] = [{"mean": mean, "sd": 0.5, "n": 3} for mean in (1.0, -1.0, 0.4)]
    assert [beyond_spread(found) for found in gains] == [1, -1, 0]
    assert beyond_spread({"mean": 9.0, "sd": None, "n": 1}) == 0
    assert beyond_spread({"mean": 9.0, "sd": 0.5, "n": 2}) == 0, "two seeds tell no spread"


def test_the_way_from_scratch_to_the_teacher() -> None:
    assert closed(teacher=100, scratch=200, student=130) == pytest.approx(0.7)
    assert closed(teacher=100, scratch=200, student=90) == 1
    assert closed(teacher=120, scratch=100, student=110) == 1
    assert closed(teacher=120, scratch=100, student=130) == 0


def test_claims_hold_by_their_figures() -> None:
    table = {
        "teacher": results([20], [100], is_trained=False),
        "scratch": results([10, 10, 10], [300, 300, 300]),
        "output-kd": results([18, 18.2, 18.1], [160, 161, 160]),
        "fitnets": results([18, 18.2], [190, 190]),
        "telea": results([18.9], [200], rival="telea", is_trained=False),
        "refine-control": results([19, 19.1, 19.3], [180, 183, 181]),
    }
    found = {c.text: c for c in claims("refine-control", table)}
    assert found["labelled: above scratch in 2 of 2"].holds
    assert {claim.against for claim in found.values()} == {"scratch", "output-kd", "telea", None}
    assert found["labelled: above telea in 1 of 2"].holds, "one result meets every seed"
    assert not found["labelled: above output-kd in 1 of 2"].holds, "one is worse beyond the spread"
    assert "worse: fid[x]" in found["labelled: above output-kd in 1 of 2"].figures
    assert not any("fitnets" in text for text in found), "two seeds are no claim"
    assert found["labelled: 95% of the teacher's psnr"].holds
    assert (
        found["labelled: fid[x] at least half of the way from scratch to the teacher"].figures
        == "59.3 % ± 0.8; in 3 of 3 seeds"
    )
    assert claims("absent", table) == []
    assert claims("refine-control", table | {"refine-control": results([19, 19], [1, 1])}) == [], "two are no claim"
    few = {claim.text for claim in claims("refine-control", table | {"scratch": results([10, 10], [300, 300])})}
    assert not any("scratch" in text for text in few)
    assert "labelled: 95% of the teacher's psnr" in few


def test_a_teacher_that_classical_inpainting_beats_is_named() -> None:
    table = {
        "teacher": results([20], [100], is_trained=False),
        "fast": results([15], [90], rival="telea", is_trained=False),
        "biharmonic": results([15], [110], rival="biharmonic", is_trained=False),
    }
    assert gate_failures(table) == ["fid[x] against fast"]
    assert gate_failures({"telea": results([1], [1], rival="telea")}) is None
    assert gate_failures({"teacher": table["teacher"]}) is None, "nothing beside it"


def test_the_spread_of_a_share_is_of_both_ends_seed_by_seed() -> None:
    table = {
        "teacher": results([20], [100], is_trained=False),
        "scratch": results([10, 10.2, 10.1], [300, 320, 310]),
        "refine-control": results([19, 19.1, 19.3], [200, 210, 205]),
    }
    (found,) = (claim for claim in claims("refine-control", table) if "half of the way" in claim.text)
    assert found.figures == "50.0 % ± 0.0; in 3 of 3 seeds", "each is half-way from its own scratch"


def test_the_way_from_scratch_is_that_of_the_seeds_that_both_have() -> None:
    table = {
        "teacher": results([20], [100], is_trained=False),
        "scratch": results([10, 10.2, 10.1, 10, 10], [300, 320, 310, 600, 600]),
        "refine-control": results([19, 19.1, 19.3], [220, 232, 226]),
    }
    (found,) = (claim for claim in claims("refine-control", table) if "half of the way" in claim.text)
    assert not found.holds, "against the mean of all five it would be 0.63"
    assert found.figures == "40.0 % ± 0.0; in 0 of 3 seeds"
    apart = {seed + 9: one for seed, one in table["scratch"].items()}
    assert not any("half of the way" in one.text for one in claims("refine-control", table | {"scratch": apart}))


def test_rows_that_come_out_alike_have_no_p() -> None:
    found = duel(results([1, 2, 3]), results([1, 2, 3]), "labelled", "psnr")
    assert found is not None
    assert found["p_seeds"] is None
