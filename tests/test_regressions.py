"""What a night's findings say: each kind, its figures, its sentence, and the cause that is named first."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitferry.pipeline.nightly.apart import apart
from bitferry.pipeline.nightly.changes import MOST_PACKAGES, changed
from bitferry.pipeline.nightly.night import Finding, Point, Result
from bitferry.pipeline.nightly.regressions import findings
from bitferry.pipeline.report.record import Recorded
from bitferry.pipeline.statistics import newcombe_interval
from tests.nights import answers, cell, digest, failed, inputs, nights, result, reused, unmeasured

NAME = "small/openvino/int8"
HISTORY = nights(40)
FIRST, TONIGHT = HISTORY[0], HISTORY[1]


def judged(history: Sequence[Result], reference: int | None = 0) -> tuple[Finding, ...]:
    """Judge the last of a history of one cell, one result a night."""
    *past, tonight = history
    points = [Point.of(night, one) for night, one in zip(HISTORY, past, strict=False)]
    kept = {night: one.inputs for night, one in zip(HISTORY, past, strict=False)}
    against = None if reference is None else (HISTORY[reference], history[reference])
    return findings(HISTORY[len(past)], tonight, against, points, kept.get)


def only(found: tuple[Finding, ...], kind: str) -> Finding:
    (one,) = [finding for finding in found if finding.kind == kind]
    return one


def timed(ratio: float, seed: int, **more: Any) -> Result:
    """Measure a night whose ratio is off by 1 % at random, with 3 % to either side."""
    noisy = ratio * float(np.exp(np.random.default_rng(seed).normal(0, 0.01)))
    return result(ratio=noisy, ratio_spread=0.03, **more)


STABLE = [timed(0.5, seed) for seed in range(12)]


def test_a_night_like_the_reference_finds_nothing() -> None:
    assert judged([result(), result()]) == ()
    assert judged([result(), reused(result())]) == ()
    assert judged(STABLE) == ()
    assert judged([result()], reference=None) == ()
    assert judged([result()], reference=0) == ()


def test_fewer_right_answers_are_told_with_their_figures_and_the_package_that_changed() -> None:
    new = inputs(packages={"pillow": "13.1.0"})
    worse = result(images=4000, percent=90.0, made_from=new)
    found = only(judged([result(images=4000, percent=91.5), worse]), "accuracy")
    assert found.severity == "regression"
    assert found.sentence == f"{NAME} answers 60 of 4,000 images fewer right than on 2026-11-01 (1.50 pp, 1.17 to 1.93)"
    assert found.changed == ("package pillow 13.0.0 → 13.1.0",)
    assert (found.before, found.after, found.unit, found.reference) == (91.5, 90.0, "pp", FIRST)
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < -1.5 < found.upper < 0


def test_more_right_answers_are_an_improvement() -> None:
    found = judged([result(images=4000, percent=90.0), result(images=4000, percent=91.5)])
    assert [(one.kind, one.severity) for one in found] == [("accuracy", "improvement")]
    assert "60 of 4,000 images more right" in found[0].sentence


def test_a_few_flips_are_no_change() -> None:
    assert judged([result(images=4000, percent=91.5), result(images=4000, percent=91.4)]) == ()


def test_a_float_model_that_fell_too_takes_the_blame_off_quantization() -> None:
    before = result(images=4000, percent=91.5, float_percent=92.0)
    found = judged([before, result(images=4000, percent=89.0, float_percent=89.5)])
    assert [one.kind for one in found] == ["accuracy", "float accuracy"]
    told = (
        "the float model lost 2.50 pp too, so the model, the data or the preprocessing is the cause, not quantization"
    )
    assert found[0].sentence.endswith(told)
    assert found[1].sentence.startswith(f"the float model of {NAME} answers 100 of 4,000 images fewer right than on")


def other_pixels(recorded: Recorded) -> Recorded:
    return replace(recorded, digests=~recorded.digests)


def test_other_pixels_of_the_same_files_are_paired_by_position_and_preprocessing_is_named_first() -> None:
    new = inputs(recipe={"preprocessing.mean": "[0.5, 0.5, 0.5]"}, packages={"numpy": "2.9"}, machine={"cpus": "4"})
    after = other_pixels(answers(2000, 0.85, float_fraction=0.86))
    found = only(judged([result(images=2000), result(recorded=after, made_from=new)]), "accuracy")
    assert found.severity == "regression"
    assert "became other pixels, so they are paired by position; the float model lost 6.00 pp too" in found.sentence
    assert found.changed[0] == "recipe preprocessing.mean [0.3, 0.3, 0.3] → [0.5, 0.5, 0.5]"
    assert found.changed[1:] == ("package numpy 2.9 new", "machine cpus 8 → 4")


def test_other_data_are_compared_share_with_share() -> None:
    before, after = answers(4000, 0.915), other_pixels(answers(2000, 0.80))
    new = inputs(data={"evaluation": digest("others")})
    found = only(judged([result(recorded=before), result(recorded=after, made_from=new)]), "accuracy")
    assert found.sentence.endswith("(11.50 pp, 9.58 to 13.49); the data changed, so this is not image by image")
    assert found.changed == (f"data evaluation {digest('evaluation')[:8]} → {digest('others')[:8]}",)


def test_images_that_both_nights_have_are_paired_and_counted() -> None:
    before, after = answers(1000, 0.9), answers(500, 0.9)
    found = apart(before, after, "artifact", same_data=False)
    assert found is not None
    assert found.images == 500
    assert found.how == "only 500 images are in both"


def test_whole_answers_stand_in_for_a_metric_that_is_not_kept_image_by_image() -> None:
    plain = answers(4000, 0.85)
    multi = replace(
        plain, **{n: np.eye(10, dtype=int)[getattr(plain, n)] for n in ("labels", "float_answers", "answers")}
    )
    tonight = result(images=4000, percent=85.0)
    assert tonight.measured is not None
    judged_by = replace(tonight.measured.accuracy.judged, metric="mAP")
    verdict = replace(tonight.measured, accuracy=replace(tonight.measured.accuracy, judged=judged_by))
    good = answers(4000, 0.9)
    first = replace(
        good, **{n: np.eye(10, dtype=int)[getattr(good, n)] for n in ("labels", "float_answers", "answers")}
    )
    found = judged(
        [replace(result(images=4000, percent=90.0), answers=first), replace(tonight, verdict=verdict, answers=multi)]
    )
    assert "answers 200 of 4,000 images fewer right" in found[0].sentence
    assert found[0].sentence.endswith("whole answers are counted, as mAP is not kept image by image")


def maps(share: float) -> Recorded:
    """Answer class maps of two classes, of which that share of each class's pixels is right."""
    rng = np.random.default_rng(0)
    right = rng.binomial(100, share, (300, 2))
    answered = right + (100 - right)[:, ::-1]
    labels = np.full((300, 2, 2), 100)
    packed = np.stack([right, answered], axis=-1)
    return Recorded(answers(300).digests, labels, labels.copy(), packed)


def test_class_maps_are_judged_by_their_overlap() -> None:
    first, last = (replace(result(images=300), answers=maps(share)) for share in (0.9, 0.85))
    found = only(judged([first, last]), "accuracy")
    assert found.severity == "regression"
    assert found.sentence.startswith(f"{NAME} has a mIoU lower than on 2026-11-01 (")
    assert judged([first, first]) == ()


def test_a_slow_drift_of_a_nightly_rebuilt_artifact_shows_in_the_nights_together() -> None:
    rng = np.random.default_rng(1)
    shares = [91.5 + rng.normal(0, 0.2) - 1.0 * (night >= 18) for night in range(24)]
    history = [result(images=4000, percent=share, seed=night + 1) for night, share in enumerate(shares)]
    found = only(judged(history), "accuracy")
    assert found.severity == "regression"
    assert found.before is not None
    assert found.after is not None
    assert found.after < found.before


@pytest.mark.parametrize("direction", [1, -1])
def test_a_change_of_pace_names_its_night_and_what_changed_in_it(direction: int) -> None:
    new, newer = inputs(packages={"openvino": "2026.5.0"}), inputs(packages={"openvino": "2026.5.0", "numpy": "3"})
    later = [timed(0.5 * 1.08**direction, 50 + n, made_from=newer if n else new) for n in range(3)]
    found = only(judged([*STABLE, *later]), "latency")
    assert found.severity == ("regression" if direction == 1 else "improvement")
    assert found.since == HISTORY[12]
    assert found.changed == ("package openvino 2026.4.1 → 2026.5.0", "package numpy 3 new")
    assert found.sentence.startswith(f"{NAME} takes ")
    assert " % longer since 2026-11-13 (" in found.sentence or " % less time since 2026-11-13 (" in found.sentence
    assert found.sentence.endswith("against the same runtime in float, timed in the same nights")
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < 1.08**direction < found.upper
    longer = judged([*STABLE, *later, *(timed(0.5 * 1.08**direction, 60 + n, made_from=newer) for n in range(5))])
    assert only(longer, "latency").since == found.since


def test_of_plausible_nights_the_one_that_was_made_from_something_else_is_named() -> None:
    new = inputs(packages={"openvino": "2026.5.0"})
    nearly = timed(0.515, 30, made_from=new)
    found = only(judged([*STABLE, nearly, *(timed(0.535, 70 + n, made_from=new) for n in range(4))]), "latency")
    assert found.since == HISTORY[12]
    assert found.changed == ("package openvino 2026.4.1 → 2026.5.0",)


def test_a_slow_night_is_no_regression_but_a_notice() -> None:
    found = judged([*STABLE, timed(0.65, 3)])
    assert [(one.kind, one.severity) for one in found] == [("latency", "notice")]
    assert found[0].sentence.endswith("; one night is no change yet")
    slow = [replace(one) for one in STABLE]
    assert judged([*slow, timed(0.5, 90, ms=30.0)]) == ()


def test_another_kind_of_machine_is_not_compared_in_pace_or_memory() -> None:
    other = timed(0.9, 5, kind="aarch64", memory_bytes=90_000_000)
    assert judged([*STABLE, other]) == ()


def test_two_nights_are_told_apart_by_their_intervals() -> None:
    found = only(judged([timed(0.5, 0), timed(0.75, 1)]), "latency")
    assert found.severity == "regression"
    assert found.since is None
    assert " longer than on 2026-11-01 (" in found.sentence
    assert judged([timed(0.5, 0), timed(0.51, 1)]) == ()
    twice = only(judged([result(ratio=0.5), result(ratio=1.1)]), "latency").sentence
    assert twice.startswith(f"{NAME} takes 2.2 times as long as on 2026-11-01 (2.1 to 2.3 times), against")


def test_float32_is_told_against_eager() -> None:
    of = cell(precision="float32")
    pair = [result(of, ratio=ratio, ratio_spread=0.02) for ratio in (0.5, 0.7)]
    assert "against eager PyTorch in float" in only(judged(pair), "latency").sentence


def test_an_alarm_stands_on_a_night_that_is_reused() -> None:
    later = [timed(0.56, 50 + n) for n in range(3)]
    fresh, kept = judged([*STABLE, *later]), judged([*STABLE, *later, reused(later[-1])])
    assert only(kept, "latency").since == only(fresh, "latency").since


@pytest.mark.parametrize(("size", "severity"), [(1_020_000, "regression"), (980_000, "improvement")])
def test_size_counts_beyond_1_percent_and_4_kb(size: int, severity: str) -> None:
    found = only(judged([result(), result(file_bytes=size)]), "size")
    assert found.severity == severity
    word = "larger" if severity == "regression" else "smaller"
    assert found.sentence == f"{NAME}: the file is 2.0 % {word} than on 2026-11-01 (1.00 → {size / 1e6:.2f} MB)"
    assert (found.before, found.after, found.unit) == (1_000_000, size, "bytes")
    assert judged([result(), result(file_bytes=1_009_000)]) == ()
    assert judged([result(file_bytes=10_000), result(file_bytes=13_000)]) == ()


def test_memory_counts_beyond_10_percent_and_8_mb_and_beyond_the_usual_night() -> None:
    usual = [result(memory_bytes=100_000_000 + 1_000_000 * n) for n in range(5)]
    found = only(judged([*usual, result(memory_bytes=120_000_000)]), "memory")
    assert found.severity == "regression"
    assert found.sentence == f"{NAME}: the peak of memory is 20.0 % larger than on 2026-11-01 (100.00 → 120.00 MB)"
    lucky = [result(memory_bytes=85_000_000), *usual[1:]]
    assert judged([*lucky, result(memory_bytes=104_000_000)]) == ()
    assert judged([*usual, result(memory_bytes=107_000_000)]) == ()
    stays = [*usual, *(result(memory_bytes=120_000_000) for _ in range(8))]
    assert only(judged(stays), "memory").severity == "regression"


@pytest.mark.parametrize(
    ("before", "after", "severity"),
    [
        ("pass", "fail", "regression"),
        ("pass", "undecided", "regression"),
        ("undecided", "fail", "regression"),
        ("fail", "pass", "improvement"),
    ],
)
def test_another_verdict_is_told(before: str, after: str, severity: str) -> None:
    found = only(judged([result(outcome=before), result(outcome=after)]), "verdict")
    assert found.severity == severity
    assert found.sentence == f"{NAME} is {after}, and was {before} on 2026-11-01: {after} int8 on openvino"


def test_a_cell_that_can_no_longer_be_measured_is_a_notice() -> None:
    found = judged([result(), unmeasured()])
    assert [(one.kind, one.severity) for one in found] == [("verdict", "notice")]


def test_failures_are_told_from_their_first_night_until_they_are_fixed() -> None:
    first = only(judged([failed()], reference=None), "failure")
    assert (first.severity, first.since) == ("regression", FIRST)
    assert first.sentence == f"{NAME} fails in its first night: conv2d takes no float8"
    broke = only(judged([result(), failed()]), "failure")
    assert broke.sentence == f"{NAME} fails, and gave a verdict before: conv2d takes no float8"
    still = only(judged([result(), failed(), failed(error_kind="machine")]), "failure")
    assert (still.severity, still.since) == ("regression", HISTORY[1])
    assert still.sentence == f"{NAME} fails since 2026-11-02 (the machine was at fault): conv2d takes no float8"
    fixed = judged([result(), failed(), result()])
    assert [(one.kind, one.severity) for one in fixed] == [("failure", "improvement")]


def test_regressions_come_first_and_a_night_of_the_same_day_is_told_with_its_time() -> None:
    pair = result(images=4000, file_bytes=2_000_000), result(images=4000, percent=85.0, file_bytes=1_000_000)
    found = judged(pair)
    assert [one.severity for one in found] == ["regression", "improvement"]
    late = findings("2026-11-01T22:00:00Z", pair[1], (FIRST, pair[0]), (), lambda _: None)
    assert f"than on {FIRST} (" in late[0].sentence


def test_changes_are_named_most_likely_first_and_long_lists_end() -> None:
    many = {f"package-{n}": "1" for n in range(20)}
    after = inputs(
        recipe={"quantization.method": '"minmax"'},
        data={"calibration": digest("more")},
        weights=digest("w"),
        code=digest("new code"),
        commit="2a2b2c2",
        packages={"pillow": "13.1.0", "torch": "2.15", "aiohttp": "4", **many},
        machine={"hostname": "node2"},
    )
    told = changed(inputs(), after)
    assert [one.split()[0] for one in told[:6]] == ["recipe", "weights", "data", "bitferry's", "package", "package"]
    assert told[0] == 'recipe quantization.method "minmax" new'
    assert told[1] == f"weights trained here → {digest('w')[:8]}"
    assert told[3] == "bitferry's code 1f0c9d2 → 2a2b2c2"
    assert told[4:7] == ("package torch 2.14.1 → 2.15", "package pillow 13.0.0 → 13.1.0", "package aiohttp 4 new")
    assert told[4 + MOST_PACKAGES] == f"and {23 - MOST_PACKAGES} more packages"
    assert told[-1] == "machine hostname node1 → node2"
    assert changed(inputs(), inputs()) == ()


def test_code_edited_in_place_and_a_package_that_went_are_told() -> None:
    before = inputs()
    edited = replace(
        before, code=digest("edited"), packages={k: v for k, v in before.packages.items() if k != "pillow"}
    )
    assert changed(before, edited) == (
        f"bitferry's code {digest('code')[:8]} → {digest('edited')[:8]}, edited since its commit",
        "package pillow 13.0.0 gone",
    )
    assert changed(before, replace(before, commit="fffffff")) == ()


def test_newcombes_interval_is_the_published_one() -> None:
    low, high = newcombe_interval((56, 48), (70, 80), 0.975)  # his example (a), method 10
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
