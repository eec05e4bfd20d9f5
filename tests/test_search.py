"""precision = "auto": every whole precision is weighed, the choice has a reason, and mixes fill the gap to float."""

import copy
import json
import shutil
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from torch import fx

from bitferry.device.arrays import Predict
from bitferry.device.timing import Series
from bitferry.pipeline import progress, recipe, search
from bitferry.pipeline.artifacts import Compiled, Quantized
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import layer_name
from bitferry.pipeline.measure import layers, sensitivity
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.search import _Searching
from bitferry.pipeline.statistics import noise_share
from bitferry.pipeline.trial import Trial, by_worth, cost_of_float
from bitferry.pipeline.verdict import Blame
from bitferry.pipeline.verify import eager, load_artifact
from tests.conftest import Project

LAYERS = ["first.0", "second.0", "head"]


@pytest.fixture
def own(deployed: Project, tmp_path: Path) -> Project:
    return Project(Path(shutil.copytree(deployed.folder, tmp_path / "own")))


def run_of(project: Project) -> Run:
    return Run(recipe.read(project.recipe), project.recipe, Cache(project.folder / "build/small"))


def test_every_precision_is_weighed_and_the_choice_is_explained(own: Project) -> None:
    asked = ("--precision", "auto", "--search-minutes", "0.5", "--quick", "--json", "-o", "out")
    done = own.bitferry("deploy", "small.toml", "-t", "openvino", *asked)
    assert done.returncode == 0, done.stderr
    (verdict,) = json.loads(done.stdout)
    search = verdict["search"]
    weighed = search["weighed"]
    assert {one["precision"] for one in weighed} >= {"int8", "float32"}
    assert [one["ms"] for one in weighed] == sorted(one["ms"] for one in weighed)
    (chosen,) = [one for one in weighed if one["chosen"]]
    assert chosen["precision"] == verdict["precision"]
    assert chosen["outcome"] == "pass"
    assert chosen["confidence"] == verdict["budget_confidence"] == pytest.approx(1 - 0.05 / 2 ** search["looks"])
    assert chosen["drop_upper_pp"] == verdict["accuracy"]["judged"]["drop_upper_pp"]
    assert all(one["outcome"] is None for one in weighed if one["ms"] > chosen["ms"])
    page = (own.folder / f"build/small/reports/openvino-{chosen['precision']}/report.html").read_text()
    assert "What was weighed" in page
    assert search["reason"].replace("'", "&#39;") in page
    manifest = json.loads((own.folder / "out/small-openvino-1.0.0/manifest.json").read_text())
    assert manifest["model"]["precision"] == chosen["precision"]
    assert manifest["model"]["options"]["threads"] == chosen["threads"]


def test_layers_that_are_kept_run_in_float(own: Project) -> None:
    own.edit(("[budget]", '[quantization]\nkeep = ["second.0"]\n[budget]'))
    done = own.bitferry("verify", "small.toml", "-t", "openvino", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)[0]["execution"]["layers"]
    assert [layer["precision"] for layer in layers] == ["int8", "float32", "int8"]


def test_a_layer_that_is_none_is_told_with_the_nearest(own: Project) -> None:
    own.edit(("[budget]", '[quantization]\nkeep = ["secnd.0"]\n[budget]'))
    line = own.refused("quantize", "small.toml", "-t", "openvino")
    assert (
        "quantization.keep names 'secnd.0', which is no convolution or matrix product; did you mean 'second.0'?" in line
    )


def test_blame_is_what_the_layer_in_float_takes_away(own: Project) -> None:
    run = run_of(own)
    images = run.calibration.images[:32].copy()
    way = Deployment(run, "openvino", "int8")
    found = {blame.name: blame.noise for blame in sensitivity.blames(way.program, images)}
    assert sorted(found) == sorted(LAYERS)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    quantized, exported = layers.graphs(cast(Quantized, way.program))
    reference, before = eager(exported)(images), eager(quantized)(images)
    for name in LAYERS:
        after = eager(with_layer_in_float(quantized, exported, name))(images)
        gone = noise_share(reference, before) - noise_share(reference, after)
        assert found[name] == pytest.approx(gone, rel=1e-3)


def with_layer_in_float(quantized: fx.GraphModule, exported: fx.GraphModule, name: str) -> fx.GraphModule:
    """Copy an int8 program with one layer's weight, bias and input as they were before they were rounded."""
    copied = copy.deepcopy(quantized)
    (node,) = [node for node in copied.graph.nodes if node.target in layers.LAYERS and layer_name(node) == name]
    (same,) = [one for one in exported.graph.nodes if one.name == node.name]
    source = node.args[0]
    while layers.rounds(source):
        source = source.args[0]
    constants = []
    for place, given in enumerate(same.args[1:3]):
        copied.register_buffer(f"float_{place}", attrgetter(given.target)(exported).detach())
        with copied.graph.inserting_before(node):
            constants.append(copied.graph.get_attr(f"float_{place}"))
    node.args = (source, *constants, *node.args[3:])
    copied.graph.lint()
    copied.recompile()
    return copied


def series(ms: float) -> Series:
    return Series(np.full((40, 3), ms / 1e3), ms / 1e3, 3, settled=True)


def test_mixes_of_int8_and_float_are_tried_until_one_is_inside(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are given, by how much is in float; all else is real."""
    own.edit(("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 1.5"), ('precision = "int8"', 'precision = "auto"'))
    run = run_of(own)

    def timed(_: Any, trials: list[Trial]) -> list[Trial]:
        each = [10.0 if one.way.precision == "float32" else 5.0 + len(one.way.keep) for one in trials]
        return [replace(one, series=series(ms)) for one, ms in zip(trials, each, strict=True)]

    monkeypatch.setattr(_Searching, "_timed", timed)
    searching = _Searching(run, lambda: False, np.inf)
    searching.weigh_whole("openvino", ("int8", "float32"))
    int8 = next(one for one in searching.trials if one.way.precision == "int8")
    assert int8.outcome == "pass"  # so nothing need be mixed
    searching.weigh_mixes()
    assert not any(one.way.keep for one in searching.trials)

    whole = [replace(one, outcome="fail" if one.way.precision == "int8" else "pass") for one in searching.trials]
    searching.trials = [replace(one, noise=np.inf) if one.outcome == "fail" else one for one in whole]
    searching.weigh_mixes()
    (mix,) = [one for one in searching.trials if one.way.keep]
    assert mix.outcome == "pass"
    assert searching.chosen is mix
    assert "int8, 1 layer in float is the fastest that is proved inside the budget" in searching.told().reason


def test_int8_outside_the_budget_is_made_with_more_steps_and_then_fine_tuned(
    own: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is judged and timed is given; all that is built is real."""
    own.edit(('precision = "int8"', 'precision = "auto"'), ("[budget]", "[quantization]\niterations = 4\n[budget]"))
    run, judged = run_of(own), list[str]()

    def timed(_: Any, trials: list[Trial]) -> list[Trial]:
        return [replace(one, series=series(10.0 if one.way.precision == "float32" else 5.0)) for one in trials]

    def looked(self: _Searching, trial: Trial) -> Trial:
        judged.append(trial.way.title)
        found = replace(trial, outcome="pass" if trial.way.settings.method == "qat" else "fail")
        self.trials = [found if one is trial else one for one in self.trials]
        return found

    monkeypatch.setattr(_Searching, "_timed", timed)
    monkeypatch.setattr(_Searching, "_look", looked)
    searching = _Searching(run, lambda: False, np.inf)
    searching.weigh_whole("openvino", ("int8", "float32"))
    searching.trials = [
        replace(one, noise=np.inf) if one.way.precision == "int8" else replace(one, outcome="pass")
        for one in searching.trials
    ]
    searching.weigh_efforts()
    assert judged[-2:] == ["int8, more steps", "int8, fine-tuned"]
    assert searching.chosen.way.title == "int8, fine-tuned"
    assert searching.chosen.way.program.key != Deployment(run, "openvino", "int8").program.key
    searching.weigh_mixes()  # there is no more room
    assert not any(one.way.keep for one in searching.trials)


def test_layers_go_to_float_by_the_noise_for_each_microsecond() -> None:
    blamed = [Blame("a", 0.5), Blame("b", 0.4), Blame("c", 0.1), Blame("d", -0.1)]
    assert by_worth(blamed, {}) == ["a", "b", "c", "d"]
    assert by_worth(blamed, {"a": 100.0, "b": 10.0, "c": 10.0, "d": -5.0}) == ["b", "c", "a", "d"]
    assert by_worth(blamed, {"a": 10.0, "b": 10.0, "c": -50.0, "d": 10.0}) == ["c", "a", "b", "d"]  # faster in float


def test_what_a_layer_costs_in_float_is_timed_by_the_runtime(own: Project) -> None:
    run = run_of(own)
    int8, whole = (Trial(Deployment(run, "openvino", precision), 0.0) for precision in ("int8", "float32"))
    assert {"first.0", "second.0"} <= set(cost_of_float(int8, whole))  # OpenVINO names the last after the output


def test_layers_that_int8_makes_slower_are_left_in_float(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are given; all else is real."""
    own.edit(('precision = "int8"', 'precision = "auto"'))

    def timed(_: Any, trials: list[Trial]) -> list[Trial]:
        each = [4.0 if one.way.keep else 6.0 if one.way.precision == "float32" else 5.0 for one in trials]
        return [replace(one, series=series(ms)) for one, ms in zip(trials, each, strict=True)]

    monkeypatch.setattr(_Searching, "_timed", timed)
    monkeypatch.setattr(search, "cost_of_float", lambda *_: {"first.0": 900.0, "second.0": -1000.0, "Gemm_7": -90.0})
    searching = _Searching(run_of(own), lambda: False, np.inf)
    searching.weigh_whole("openvino", ("int8", "float32"))
    searching.weigh_slowed()
    chosen = searching.chosen
    assert chosen.way.keep == ("second.0",)
    assert chosen.outcome == "pass"

    monkeypatch.setattr(search, "cost_of_float", lambda *_: {"first.0": 900.0, "second.0": -10.0, "head": 10.0})
    count = len(searching.trials)
    searching.weigh_slowed()
    assert len(searching.trials) == count  # not worth a candidate


def test_a_candidate_that_fails_or_is_not_finite_is_left_out_and_all_are_timed_together(
    own: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.edit(('precision = "int8"', 'precision = "auto"'))
    progress.console.quiet = False
    real = load_artifact

    def loaded(compiled: Compiled) -> Predict:
        if compiled.precision == "float32":  # the last of the two
            raise RuntimeError("no such kernel")
        return real(compiled)

    monkeypatch.setattr(search, "load_artifact", loaded)
    searching = _Searching(run_of(own), lambda: False, np.inf)
    searching.weigh_whole("openvino", ("int8", "float32"))
    assert {one.way.precision for one in searching.trials} == {"int8"}
    assert "float32 is left out: no such kernel" in capsys.readouterr().err
    monkeypatch.setattr(search, "load_artifact", lambda one: lambda images: real(one)(images) * np.float32(np.nan))
    assert searching._built(searching.trials[0].way) is None
    assert "its scores are not finite" in capsys.readouterr().err
    monkeypatch.setattr(search, "load_artifact", real)
    searching.trials = [*searching.trials, *searching._timed(searching.trials[:1])]
    told = searching.told()
    assert searching.timings == 3
    assert all(one.over_chosen is not None for one in told.weighed)


def test_a_search_whose_time_is_over_leaves_a_fine_tune_that_another_goes_on_with(
    own: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.edit(('precision = "int8"', 'precision = "auto"'), ("[budget]", "[quantization]\niterations = 4\n[budget]"))
    progress.console.quiet = False
    run, asked = run_of(own), [0]

    def over() -> bool:
        asked[0] += 1
        return asked[0] > 40  # in the middle of what is tracked

    searching = _Searching(run, lambda: False, np.inf)
    searching.weigh_whole("openvino", ("int8", "float32"))
    int8 = next(one for one in searching.trials if one.way.precision == "int8")
    settings = int8.way.settings.model_copy(update={"method": "qat", "epochs": 8})
    way = replace(int8.way, quantization=settings, note="fine-tuned")
    monkeypatch.setattr(searching, "_over", over)
    assert searching._built(way) is None
    assert "fine-tuned is left out: it was not done in time" in capsys.readouterr().err
    monkeypatch.setattr(searching, "_over", lambda: False)
    assert searching._built(replace(way)) is not None
    assert "goes on at step" in capsys.readouterr().err


def test_looks_share_the_chance_of_passing_by_luck(own: Project) -> None:
    read = recipe.read(own.recipe)
    spent = [1 - read.at_look(look).budget.confidence for look in range(1, 50)]
    assert spent[0] == pytest.approx(0.025)
    assert sum(spent) == pytest.approx(1 - read.budget.confidence)
    assert read.at_look(0).budget == read.budget
