"""The search for settings: what it may try, what it writes, and that it goes on after a kill."""

import json
import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline.recipe import read
from bitferry.pipeline.training import rewrite, space
from bitferry.pipeline.training.space import Range
from tests.conftest import BITFERRY, Project


class TestSpace:
    def test_ranges_and_choices(self, project: Project) -> None:
        recipe = read(project.recipe)
        given = [
            "learning_rate=1e-4..1e-2",
            "warm_up=0.1..0.3",
            "batch_size=16..64",
            "optimizer=adamw,sgd",
            "ema=0.9,0.99",
        ]
        found = space.read(given, recipe)
        assert found == {
            "learning_rate": Range(1e-4, 1e-2, False),
            "warm_up": Range(0.1, 0.3, False),
            "batch_size": Range(16, 64, True),
            "optimizer": ("adamw", "sgd"),
            "ema": (0.9, 0.99),
        }
        logarithmic = {key for key, values in found.items() if isinstance(values, Range) and values.logarithmic}
        assert logarithmic == {"learning_rate"}
        own = space.read((), recipe)["learning_rate"]
        assert isinstance(own, Range)
        assert own.low < recipe.training.learning_rate < own.high

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learning_rat=1..2", "'learning_rat' cannot be searched; did you mean 'learning_rate'?"),
            ("epochs=1..9", "'epochs' cannot be searched; these can: learning_rate, weight_decay"),
            ("learning_rate", "expected KEY=LOW..HIGH or KEY=A,B,…"),
            ("learning_rate=1..", "expected two numbers, the lower one first"),
            ("learning_rate=2..1", "expected two numbers, the lower one first"),
            ("learning_rate=-1..1", "training.learning_rate cannot be -1: Input should be greater than 0"),
            ("optimizer=adam", "training.optimizer cannot be 'adam': Input should be 'adamw' or 'sgd'"),
            ("momentum=0.5,0.9", "training.momentum is for training.optimizer = 'sgd'"),
        ],
    )
    def test_what_cannot_be_tried(self, project: Project, text: str, message: str) -> None:
        assert message in project.refused("tune", "small.toml", "--space", text)

    def test_pairs_that_do_not_go_together_and_ends_without_a_beginning(self, project: Project) -> None:
        recipe = read(project.recipe)
        with pytest.raises(InputError, match=r"training.loss cannot be 'focal' with training.label_smoothing 0.1: "):
            space.read(["loss=focal,cross-entropy", "label_smoothing=0.0,0.1"], recipe)
        with pytest.raises(InputError, match="--space ema: the recipe, which is tried first, has none; set a number"):
            space.read(["ema=0.9..0.99"], recipe)

    def test_the_output_lies_beside_the_recipe_and_replaces_nothing(self, project: Project) -> None:
        assert "small.toml is there already" in project.refused("tune", "small.toml", "-o", "small.toml")
        line = project.refused("tune", "small.toml", "-o", "../tuned.toml")
        assert "is not beside the recipe, where its relative paths start; name tuned.toml" in line


class TestRewrite:
    TEXT = (
        '# mine\nname = "a"  # [training]\n\n[training]   # how it learns\nepochs = 3\n'
        'learning_rate = 1e-3   # tried\noptimizer = "a#b" # why\n\n# the rest\n[budget]\nlearning_rate = 5\n'
    )

    def test_only_values_change(self) -> None:
        found = rewrite.write(self.TEXT, {"learning_rate": 0.02, "optimizer": "sgd", "nesterov": False})
        expected = self.TEXT.replace("1e-3   # tried", "0.02   # tried").replace('"a#b" # why', '"sgd" # why')
        assert found == expected.replace("# the rest\n", "# the rest\nnesterov = false\n", 1)
        assert tomllib.loads(found)["budget"] == {"learning_rate": 5}

    def test_a_table_that_is_not_there_is_added(self) -> None:
        assert rewrite.write('name = "a"\n', {"ema": 0.9}) == 'name = "a"\n\n[training]\nema = 0.9\n'

    def test_what_it_cannot_edit_it_leaves_to_the_reader(self) -> None:
        with pytest.raises(InputError, match=r"not written line by line, so edit it yourself: ema = 0.9"):
            rewrite.write("training = {epochs = 3}\n", {"ema": 0.9})


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_writes_the_best_recipe(project: Project, tmp_path: Path) -> None:
    project.edit(("epochs = 6", "epochs = 2  # few"), ("learning_rate = 5e-3", "learning_rate = 1e-6"))
    command: list[str | Path] = [BITFERRY, "tune", "small.toml", "--trials", "3", "--space", "learning_rate=2e-3..2e-2"]
    command += ["-o", "tuned.toml", "--json"]
    with subprocess.Popen(
        command, cwd=project.folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "best so far" in line:
                break
        else:
            pytest.fail("the search ended without telling of its best")
        os.killpg(running.pid, signal.SIGKILL)
    assert not (project.folder / "tuned.toml").exists()
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tune +goes on with ", done.stderr)
    told = json.loads(done.stdout)
    trials = told["trials"]
    assert len(trials) == 3
    assert 1e-6 in [one["settings"]["learning_rate"] for one in trials]  # the recipe's own
    best = trials[0]
    assert best["epochs"] == 2
    assert best["percent"] > 60
    assert 2e-3 <= best["settings"]["learning_rate"] <= 2e-2
    assert told["output"] == "tuned.toml"
    text = (project.folder / "tuned.toml").read_text()
    before = (project.folder / "small.toml").read_text()
    assert text == before.replace("learning_rate = 1e-6", f"learning_rate = {best['settings']['learning_rate']}")
    assert read(project.folder / "tuned.toml").training.learning_rate == best["settings"]["learning_rate"]
