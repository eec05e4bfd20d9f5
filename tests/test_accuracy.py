"""What `measure` reports, each figure against a plain slow loop; the verdict on accuracy; multi-label models whole."""

import itertools
import math
import re
import time
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitferry.device.arrays import Outputs
from bitferry.device.errors import InputError, StageFailed
from bitferry.pipeline import dataset, recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import leaks
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.figures import Bin, Change
from bitferry.pipeline.load import load
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.measure.accuracy import judge_accuracy, measure, percent
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.statistics import paired_bootstrap, tango_interval
from bitferry.pipeline.train import train
from tests.conftest import Project, subset


def a_recipe(classes: int, *, task: str = "classification", **budget: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "classes": [f"class {i}" for i in range(classes)],
            "task": task,
            "model": {"source": "torchvision:resnet18"},
            "preprocessing": {"height": 8, "width": 8},
            "data": {"calibration": "c", "evaluation": "e"},
            "budget": budget,
        }
    )


def a_split(labels: Labels) -> Split:
    n = len(labels)
    images = np.zeros((n, 1, 1, 3), np.uint8)
    return Split("evaluation", images, labels, tuple(f"{i}.png" for i in range(n)), (), key="k")


def simulated(images: int, classes: int, *, noise: float = 0.7, seed: int = 0) -> tuple[Outputs, Outputs, Labels]:
    """Give scores of a float model that is often right, of an artifact near it, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    baseline: Outputs = rng.normal(size=(images, classes)).astype(np.float32)
    baseline[np.arange(images), labels] += 2
    scores: Outputs = (baseline + noise * rng.normal(size=baseline.shape)).astype(np.float32)
    return baseline, scores, labels


def simulated_labels(
    images: int, classes: int, *, noise: float = 0.5, seed: int = 0
) -> tuple[Outputs, Outputs, Labels]:
    """Give the same for multi-label data: a fifth of the labels set, rounded scores so that many are equal."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, classes)) < 0.2).astype(np.int64)
    baseline = 2 * labels - 1.3 + rng.normal(size=labels.shape)
    scores = baseline + noise * rng.normal(size=labels.shape)
    rounded: list[Outputs] = [(np.round(one * 4) / 4).astype(np.float32) for one in (baseline, scores)]
    return rounded[0], rounded[1], labels


def softmax_row(row: NDArray[np.float32]) -> list[float]:
    powers = [math.exp(float(v)) for v in row]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_counts_are_those_of_a_plain_loop() -> None:
    baseline, scores, labels = simulated(300, 7)
    found = measure(baseline, scores, a_split(labels), a_recipe(7))
    count: Counter[str] = Counter()
    for before, after, label in zip(baseline, scores, labels, strict=True):
        was, now = int(np.argmax(before)), int(np.argmax(after))
        count["flipped"] += was != now
        count["lost"] += was == label != now
        count["gained"] += now == label != was
        for name, row in (("float 5", before), ("5", after)):
            count[name] += label in sorted(range(7), key=lambda k: (-row[k], k))[:5]
    flips = found.flips
    assert (flips.lost, flips.gained, flips.flipped) == (count["lost"], count["gained"], count["flipped"])
    assert found.judged.drop_pp == pytest.approx((count["lost"] - count["gained"]) / 3)
    lower, upper = tango_interval(count["lost"], count["gained"], 300, 0.95)
    assert (found.judged.drop_lower_pp, found.judged.drop_upper_pp) == (100 * lower, 100 * upper)
    top_5 = found.others[0]
    assert (top_5.metric, top_5.method) == ("top-5", "tango")
    assert top_5.float_percent == pytest.approx(count["float 5"] / 3)
    assert top_5.percent == pytest.approx(count["5"] / 3)


def test_top_5_of_equal_scores_takes_the_lower_index_as_argmax_does() -> None:
    scores = np.ones((8, 8), np.float32)
    scores[7] = 2  # equal scores again, but not one answer for every image
    found = measure(scores, scores, a_split(np.arange(8)), a_recipe(8))
    assert found.judged.percent == pytest.approx(100 / 8)
    assert found.others[0].percent == pytest.approx(500 / 8)


def test_top_5_is_left_out_where_it_says_nothing() -> None:
    baseline, scores, labels = simulated(50, 5)
    assert not measure(baseline, scores, a_split(labels), a_recipe(5)).others


def test_recall_of_each_class_before_and_after() -> None:
    baseline, scores, labels = simulated(300, 6)
    labels[labels == 4] = 1  # no image is left of class 4
    found = measure(baseline, scores, a_split(labels), a_recipe(6))
    for k, change in enumerate(found.classes):
        mine = [i for i in range(300) if labels[i] == k]
        assert change.images == len(mine)
        for model, recall in ((baseline, change.float_percent), (scores, change.percent)):
            right = sum(int(np.argmax(model[i])) == k for i in mine)
            assert recall == (pytest.approx(100 * right / len(mine)) if mine else None)
    assert found.classes[4].percent is None


def test_confusions_are_those_that_changed_most() -> None:
    baseline, scores, labels = simulated(600, 8)
    found = measure(baseline, scores, a_split(labels), a_recipe(8)).confusions
    expected = []
    for truth, answer in itertools.permutations(range(8), 2):
        was, now = (
            sum(int(labels[i]) == truth and int(np.argmax(m[i])) == answer for i in range(600))
            for m in (baseline, scores)
        )
        if was != now:
            expected.append((-abs(now - was), -max(now, was), truth, answer, was, now))
    expected = sorted(expected)[:20]
    assert [(c.truth, c.answer, c.float_images, c.images) for c in found] == [
        (f"class {truth}", f"class {answer}", was, now) for _, _, truth, answer, was, now in expected
    ]
    assert not measure(baseline, baseline, a_split(labels), a_recipe(8)).confusions


def plain_error(decisions: list[tuple[float, bool]]) -> tuple[float, int]:
    """Compute the expected calibration error from (confidence, right) pairs; and how many bins are not empty."""
    error, used = 0.0, 0
    for m in range(15):
        mine = [(c, r) for c, r in decisions if m / 15 < c <= (m + 1) / 15]
        if mine:
            used += 1
            gap = abs(sum(c for c, _ in mine) - sum(r for _, r in mine))
            error += gap / len(decisions)
    return 100 * error, used


def test_calibration_error_and_confidence_of_a_plain_loop() -> None:
    baseline, scores, labels = simulated(400, 5)
    found = measure(baseline, scores, a_split(labels), a_recipe(5)).reliability
    means = []
    for model, error, bins in (
        (baseline, found.float_ece_percent, found.float_bins),
        (scores, found.ece_percent, found.bins),
    ):
        rows = [softmax_row(row) for row in model]
        decisions = [(max(row), row.index(max(row)) == label) for row, label in zip(rows, labels, strict=True)]
        expected, used = plain_error(decisions)
        assert error == pytest.approx(expected, abs=1e-3)
        assert len(bins) == used
        assert sum(one.images for one in bins) == 400
        means.append(100 * sum(c for c, _ in decisions) / 400)
    assert found.float_confidence_percent == pytest.approx(means[0], abs=1e-3)
    assert found.confidence_shift_pp == pytest.approx(means[1] - means[0], abs=1e-3)


def test_a_certain_answer_is_in_the_last_bin() -> None:
    scores = np.array([[100, 0], [101, 0]], np.float32)
    found = measure(scores, scores, a_split(np.array([0, 1])), a_recipe(2)).reliability
    assert found.bins == (Bin(2, 100.0, 50.0),)
    assert found.ece_percent == pytest.approx(50)


def test_the_worst_images_are_those_whose_probabilities_changed_most() -> None:
    baseline, scores, labels = simulated(200, 4)
    found = measure(baseline, scores, a_split(labels), a_recipe(4)).worst
    was, now = [softmax_row(row) for row in baseline], [softmax_row(row) for row in scores]
    changes = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(was, now, strict=True)]
    expected = sorted(range(200), key=lambda i: -changes[i])[:12]
    assert [one.index for one in found] == expected
    for one in found:
        i = one.index
        assert one.source == f"{i}.png"
        assert one.truth == f"class {labels[i]}"
        assert one.float_answer == f"class {was[i].index(max(was[i]))}"
        assert one.answer == f"class {now[i].index(max(now[i]))}"
        assert one.float_confidence_percent == pytest.approx(100 * max(was[i]), abs=1e-3)
        assert one.confidence_percent == pytest.approx(100 * max(now[i]), abs=1e-3)
        assert one.change_pp == pytest.approx(100 * changes[i], abs=1e-3)


def test_an_equal_artifact_has_no_worst_images_and_no_noise() -> None:
    baseline, scores, labels = simulated(500, 4)
    equal = measure(baseline, baseline.copy(), a_split(labels), a_recipe(4))
    assert (equal.worst, equal.sqnr_db, equal.flips.mcnemar_p) == ((), None, 1.0)
    noisy = measure(baseline, scores, a_split(labels), a_recipe(4)).sqnr_db
    signal, noise = (
        float(sum(float(v) ** 2 for v in one.ravel())) for one in (baseline, baseline.astype(float) - scores)
    )
    assert noisy == pytest.approx(10 * math.log10(signal / noise))


def plain_ranking(scores: NDArray[np.float32], truth: Labels) -> tuple[float, float]:
    """Compute average precision at each distinct threshold, and the share of pairs in order, ties a half."""
    precision = recall_before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = [bool(t) for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(taken) / sum(truth)
        precision += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    yes, no = scores[truth == 1], scores[truth == 0]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
    return precision, sum(pairs) / len(pairs)


def test_multi_label_figures_are_those_of_a_plain_loop() -> None:
    baseline, scores, labels = simulated_labels(120, 4)
    found = measure(baseline, scores, a_split(labels), a_recipe(4, task="multilabel"))
    plain = [[plain_ranking(m[:, k], labels[:, k]) for k in range(4)] for m in (baseline, scores)]
    mean_ap, auc = found.judged, found.others[0]
    assert [(c.metric, c.method) for c in (mean_ap, auc)] == [("mAP", "bootstrap"), ("AUC", "bootstrap")]
    for change, which in ((mean_ap, 0), (auc, 1)):
        was, now = (100 * sum(value[which] for value in model) / 4 for model in plain)
        assert (change.float_percent, change.percent) == pytest.approx((was, now))
        assert change.drop_pp == pytest.approx(was - now)
        assert change.drop_lower_pp < change.drop_pp < change.drop_upper_pp
    for k, one in enumerate(found.classes):
        assert one.images == labels[:, k].sum()
        assert (one.float_percent, one.auc_float_percent) == pytest.approx(tuple(100 * v for v in plain[0][k]))
        assert (one.percent, one.auc_percent) == pytest.approx(tuple(100 * v for v in plain[1][k]))


def test_multi_label_decisions_are_those_of_a_plain_loop() -> None:
    baseline, scores, labels = simulated_labels(120, 4)
    found = measure(baseline, scores, a_split(labels), a_recipe(4, task="multilabel"))
    count: Counter[str] = Counter()
    decisions: list[tuple[float, bool]] = []
    for before, after, truth in zip(baseline, scores, labels, strict=True):
        was, now = ([sigmoid(float(v)) >= 0.5 for v in row] for row in (before, after))
        count["flipped"] += was != now
        count["lost"] += was == truth.tolist() != now
        count["gained"] += now == truth.tolist() != was
        for value, yes in zip(after, truth, strict=True):
            p = sigmoid(float(value))
            decisions.append((max(p, 1 - p), (p >= 0.5) == bool(yes)))
    assert (found.flips.lost, found.flips.gained, found.flips.flipped) == (
        count["lost"], count["gained"], count["flipped"],
    )  # fmt: skip
    assert found.reliability.ece_percent == pytest.approx(plain_error(decisions)[0], abs=1e-3)
    assert sum(one.images for one in found.reliability.bins) == labels.size
    assert found.confusions == ()
    changes = [
        max(abs(sigmoid(float(a)) - sigmoid(float(b))) for a, b in zip(x, y, strict=True))
        for x, y in zip(baseline, scores, strict=True)
    ]
    assert found.worst[0].change_pp == pytest.approx(100 * max(changes), abs=1e-3)
    names = [f"class {k}" for k in np.flatnonzero(labels[found.worst[0].index])]
    assert found.worst[0].truth == (", ".join(names) or "none")


def test_a_class_without_images_is_left_out_of_the_mean() -> None:
    baseline, scores, labels = simulated_labels(120, 4)
    three = measure(baseline[:, :3], scores[:, :3], a_split(labels[:, :3]), a_recipe(3, task="multilabel"))
    labels[:, 3] = 0
    four = measure(baseline, scores, a_split(labels), a_recipe(4, task="multilabel"))
    assert four.judged == three.judged
    assert four.classes[3].percent is four.classes[3].auc_percent is None


def test_resamples_count_as_copies_do() -> None:
    scores, _, labels = simulated_labels(80, 3)
    drawn = np.random.default_rng(1).integers(80, size=80)
    found = metrics.ranked("mAP", metrics.rank(scores, labels), metrics.rank(scores, labels))(drawn)[0]
    assert found == pytest.approx(
        np.mean([plain_ranking(scores[drawn, k], labels[drawn, k])[0] for k in range(3)]), rel=1e-9
    )


@pytest.mark.parametrize(("ours", "name"), [("mAP", "MultilabelAveragePrecision"), ("AUC", "MultilabelAUROC")])
def test_our_mean_average_precision_and_area_are_those_of_torchmetrics(ours: str, name: str) -> None:
    baseline, scores, labels = simulated_labels(300, 5)
    ranks = metrics.rank(baseline, labels), metrics.rank(scores, labels)
    theirs = metrics.build(f"torchmetrics:{name}", {}, "multilabel", 5)
    # torch's sigmoid of equal scores differs in the last bit, so it would break some ties
    shares = [np.asarray((one + 32) / 64, dtype=np.float32) for one in (baseline, scores)]
    rng = np.random.default_rng(4)
    for drawn in (np.arange(300), *rng.integers(300, size=(5, 300))):
        expected = metrics.torchmetric(theirs, shares[0], shares[1], labels)(drawn)
        assert metrics.ranked(ours, *ranks)(drawn) == pytest.approx(expected, abs=1e-6)


def test_a_torchmetrics_class_is_judged_by_name() -> None:
    baseline, scores, labels = simulated(300, 4)
    named = a_recipe(4, metric="torchmetrics:MulticlassF1Score", metric_options={"average": "macro"})
    found = measure(baseline, scores, a_split(labels), named)
    per_class = []
    for k in range(4):
        yes, truth = scores.argmax(axis=1) == k, labels == k
        per_class.append(2 * (yes & truth).sum() / (yes.sum() + truth.sum()))
    assert found.judged.percent == pytest.approx(100 * np.mean(per_class), abs=1e-3)
    assert [change.metric for change in found.others] == ["top-1"]
    assert found.judged.drop_lower_pp < found.judged.drop_pp < found.judged.drop_upper_pp


def test_an_error_that_rises_is_a_drop() -> None:
    baseline, scores, labels = simulated(300, 4)
    named = a_recipe(4, metric="torchmetrics:HammingDistance")  # micro: the share of wrong answers
    found = measure(baseline, scores, a_split(labels), named)
    top_1 = found.others[0]
    assert found.judged.percent == pytest.approx(100 - top_1.percent, abs=1e-3)
    assert found.judged.drop_pp == pytest.approx(top_1.drop_pp, abs=1e-3)
    assert found.judged.drop_upper_pp == pytest.approx(top_1.drop_upper_pp, abs=0.7)
    assert found.judged.drop_lower_pp == pytest.approx(top_1.drop_lower_pp, abs=0.7)


def test_a_metric_that_does_not_say_which_way_is_better_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.classification.MulticlassF1Score.higher_is_better", None)
    with pytest.raises(InputError, match="does not say whether higher is better, so no drop can be judged"):
        metrics.build("torchmetrics:MulticlassF1Score", {}, "classification", 3)


@pytest.mark.parametrize("metric", [None, "top-5", "torchmetrics:MulticlassRecall"])
def test_the_metric_of_one_model_alone(metric: str | None) -> None:
    baseline, scores, labels = simulated(200, 7)
    read = a_recipe(7, metric=metric)
    judged = measure(baseline, scores, a_split(labels), read).judged
    assert percent(scores, a_split(labels), read) == pytest.approx(judged.percent)
    assert percent(baseline, a_split(labels), read) == pytest.approx(judged.float_percent)


def test_no_change_in_few_images_proves_little() -> None:
    baseline, _, labels = simulated(40, 4)
    found = measure(baseline, baseline, a_split(labels), a_recipe(4, metric="torchmetrics:CohenKappa"))
    assert found.judged.drop_upper_pp == pytest.approx(100 * tango_interval(0, 0, 40, 0.95)[1])
    assert judge_accuracy(found, 1.0)[0] == "undecided"


def test_the_bootstrap_bound_covers_a_known_difference_of_areas() -> None:
    rng = np.random.default_rng(2)
    images, sets, covered = 300, 100, np.zeros(2)
    true = [0.5 * (1 + math.erf(shift / 2)) for shift in (1.5, 1.3)]  # normal scores: Φ(shift / √2)
    for seed in range(sets):
        labels = (rng.random((images, 1)) < 0.3).astype(np.int64)
        noise, own = rng.normal(size=(2, images, 1))
        scores = [1.5 * labels + noise, 1.3 * labels + 0.9 * noise + math.sqrt(0.19) * own]
        ranks = [metrics.rank(one.astype(np.float32), labels) for one in scores]
        lower, upper = paired_bootstrap(metrics.ranked("AUC", *ranks), images, 0.95, draws=100, seed=seed)
        covered += [lower <= true[0] - true[1], upper >= true[0] - true[1]]
    assert (covered / sets >= 0.90).all(), covered / sets
    assert (covered / sets <= 0.99).all(), covered / sets


def judged(metric: str, images: int, lost: int, gained: int, *, width: float = 1.0) -> tuple[str, str, int | None]:
    """Judge counts against 1 pp."""
    baseline, scores, labels = simulated(60, 4)
    accuracy = measure(baseline, scores, a_split(labels), a_recipe(4))
    lower, upper = tango_interval(lost, gained, images, 0.95)
    drop = 100 * (lost - gained) / images
    bounds = (100 * lower, 100 * upper) if metric == "top-1" else (drop - width, drop + width)
    change = Change(metric, "tango", 90, 90 - drop, drop, *bounds, 0.95)
    flips = replace(accuracy.flips, lost=lost, gained=gained)
    return judge_accuracy(replace(accuracy, images=images, judged=change, flips=flips), 1.0)


@pytest.mark.parametrize(
    ("counts", "outcome", "reason"),
    [
        ((4000, 15, 12), "pass", "^at most 0.30 pp worse at 95% confidence, 1 pp allowed$"),
        ((4000, 200, 20), "fail", "^at least 3.92 pp worse at 95% confidence, 1 pp allowed$"),
        ((100, 1, 1), "undecided", "^100 images prove only that it is at most 3.47 pp worse at 95% confidence, 1 pp allowed; about 1,297 further images would decide it"),
        ((1000, 10, 0), "undecided", "the drop is too near the allowed one for any practical number of images"),
    ],
)  # fmt: skip
def test_the_three_outcomes(counts: tuple[int, int, int], outcome: str, reason: str) -> None:
    found, text, further = judged("top-1", *counts)
    assert found == outcome
    assert re.search(reason, text), text
    assert (further is not None) == ("further" in text)


def test_a_resampled_metric_needs_more_images_by_the_square_of_its_bound() -> None:
    outcome, text, further = judged("mAP", 1000, 2, 0, width=1.0)
    assert outcome == "undecided"
    assert "at most 1.20 pp worse in mAP at 95% confidence" in text
    total = 1000 * ((1.6449 + 0.8416) / 1.6449 / 0.8) ** 2  # power 80 % where the bound is 1 pp and 0.8 pp are left
    assert further == pytest.approx(total - 1000, abs=2)
    assert f"{further:,} further images" in text


def test_the_count_is_in_the_accuracy_itself() -> None:
    baseline, scores, labels = simulated(60, 4)
    found = measure(baseline, scores, a_split(labels), a_recipe(4, accuracy_drop_pp=9.0))
    assert found.further_images == judge_accuracy(found, 9.0)[2]
    asdict(found)


def test_scores_that_are_not_numbers_are_no_verdict() -> None:
    good, labels = np.ones((3, 2), np.float32), a_split(np.zeros(3, np.int64))
    bad = good.copy()
    bad[1, 0] = np.nan
    told = rf"the artifact's scores of 1 of 3 evaluation images have NaN or .*first is {labels.sources[1]}, number 2\);"
    with pytest.raises(StageFailed, match=told):
        measure(good, bad, labels, a_recipe(2))
    with pytest.raises(StageFailed, match=r"shape \(3, 1\); expected \(3, 2\)"):
        measure(good, np.zeros((3, 1), np.float32), labels, a_recipe(2))
    with pytest.raises(StageFailed, match="the float model's scores of 3 of 3 evaluation images have NaN"):
        measure(good * np.inf, good, labels, a_recipe(2))
    with pytest.raises(StageFailed, match="the float model's scores are the same for every image"):
        measure(good * 0, good, labels, a_recipe(2))


def test_a_metric_without_value_is_no_verdict() -> None:
    baseline, scores, labels = simulated_labels(30, 2)
    with pytest.raises(StageFailed, match="mAP has no value on these 30 images"):
        measure(baseline, scores, a_split(labels * 0), a_recipe(2, task="multilabel"))


def test_a_thousand_classes_are_compared_in_a_moment() -> None:
    baseline, scores, labels = simulated(4000, 1000)
    split, read = a_split(labels), a_recipe(1000)
    start = time.process_time()
    measure(baseline, scores, split, read)
    assert time.process_time() - start < 3  # of one CPU; under a second on a quiet machine


def multilabel_project(project: Project) -> None:
    """Make the small project one of two labels per image: what it is, and whether it is bright."""
    for name, count in (("train", 960), ("calibration", 64), ("evaluation", 400)):
        arrays = subset(name, count)
        images = arrays["images"]
        labels = np.stack([arrays["labels"] == 1, arrays["labels"] == 2, images.mean(axis=(1, 2)) > 80], axis=1)
        np.savez(project.folder / f"{name}.npz", images=images, labels=labels)
    project.edit(('name = "small"', 'name = "small"\ntask = "multilabel"'))


def test_a_multi_label_model_is_trained_and_measured(project: Project) -> None:
    multilabel_project(project)
    read = recipe.read(project.recipe)
    build = Cache(project.folder / "build")
    splits = [
        dataset.split(name, read.data.splits()[name], read.classes, read.preprocessing, build, task=read.task)
        for name in ("train", "evaluation")
    ]
    leaks.refuse(*splits)
    weights = train(read, splits[0], build, folder=project.folder)
    model = load(read, weights.path, folder=project.folder)
    with torch.inference_mode():
        scores = model.module()(torch.from_numpy(splits[1].images.copy())).numpy()
    found = measure(scores, np.round(scores, 1), splits[1], read)
    assert found.judged.metric == "mAP"
    assert found.judged.float_percent > 90
    assert all(c.auc_percent is not None and c.auc_percent > 90 for c in found.classes)
    assert judge_accuracy(found, 5.0)[0] == "pass"
