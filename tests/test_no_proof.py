"""Ways to a pass that is none: another metric than the budget's, other labels, one image many times, a failed bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline.shipping import keys, publish, sign
from tests.conftest import Project
from tests.signed import rehash

F1 = 'accuracy_drop_pp = 5.0\nmetric = "torchmetrics:MulticlassF1Score"\nmetric_options = { average = "weighted" }'


def again(project: Project, bundle: Path, data: str) -> tuple[int, Any]:
    done = project.bitferry("verify", str(bundle), "--data", data, "--quick", "--json")
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def shipped(deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Give a project with bundles; those by F1 in `f1`."""
    made = Project(Path(shutil.copytree(deployed.folder, tmp_path_factory.mktemp("no-proof") / "project")))
    made.edit(("accuracy_drop_pp = 5.0", F1))
    done = made.bitferry("deploy", "small.toml", "--target", "openvino", "--quick", "-o", "f1")
    assert done.returncode == 0, done.stderr
    return made


def test_a_bundle_is_judged_by_the_metric_of_its_budget_or_not_at_all(shipped: Project, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(shipped.folder / "f1/small-openvino-1.0.0", tmp_path / "small-openvino-1.0.0"))
    verified = json.loads((bundle / "verdict.json").read_text())["accuracy"]["judged"]
    code, found = again(shipped, bundle, "evaluation.npz")
    assert (code, found["outcome"]) == (0, "pass")
    for name in ("metric", "method", "float_percent", "percent", "drop_upper_pp"):
        assert found["accuracy"][name] == verified[name]

    with np.load(bundle / "answers.npz") as arrays:
        rest = {name: arrays[name] for name in arrays if name != "float_scores"}
    np.savez_compressed(bundle / "answers.npz", **rest)
    rehash(bundle)
    code, found = again(shipped, bundle, "evaluation.npz")
    assert (code, found["outcome"]) == (1, "unmeasured")
    assert "takes the float model's scores, and this bundle has none" in " ".join(found["reasons"])


def test_scores_are_kept_only_for_a_metric_that_needs_them(shipped: Project) -> None:
    with np.load(shipped.folder / "dist/small-openvino-1.0.0/answers.npz") as arrays:
        assert "float_scores" not in arrays


def test_an_image_that_is_shown_again_and_again_counts_once(shipped: Project) -> None:
    with np.load(shipped.folder / "evaluation.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    few = [int(np.flatnonzero(labels == label)[0]) for label in range(3)] * 200
    np.savez(shipped.folder / "few.npz", images=images[few], labels=labels[few])
    code, found = again(shipped, shipped.folder / "dist/small-openvino-1.0.0", "few.npz")
    assert (code, found["outcome"], found["images"]) == (1, "undecided", 3)


def test_images_with_other_labels_are_no_proof_of_it(shipped: Project) -> None:
    with np.load(shipped.folder / "evaluation.npz") as arrays:
        np.savez(shipped.folder / "others.npz", images=arrays["images"], labels=(arrays["labels"] + 1) % 3)
    line = shipped.refused("verify", "dist/small-openvino-1.0.0", "--data", "others.npz", "--quick")
    assert "600 of 600 images of others.npz have other labels than those they were verified with" in line


@pytest.mark.parametrize("outcome", ["fail", "undecided"])
def test_what_is_not_proved_is_neither_signed_nor_published(shipped: Project, tmp_path: Path, outcome: str) -> None:
    bundle = Path(shutil.copytree(shipped.folder / "dist/small-openvino-1.0.0", tmp_path / "small-openvino-1.0.0"))
    key = next(path for path in keys.new(tmp_path / "fleet", None) if path.suffix == ".key")
    sign.sign(bundle, key)
    manifest = json.loads((bundle / "manifest.json").read_text())
    verdict = manifest["verdict"] | {"outcome": outcome, "headline": "Do not ship"}
    with pytest.raises(InputError, match=rf"is not proved inside its budget \({outcome}: Do not ship\)"):
        publish.add(tmp_path / "public", tmp_path / "keys", sign.archive(bundle), manifest | {"verdict": verdict})
    assert not (tmp_path / "public").exists()
    rehash(bundle, verdict=verdict)
    with pytest.raises(InputError, match="is not proved inside its budget"):
        sign.sign(bundle, key)
    rehash(bundle, verdict=verdict | {"outcome": "unmeasured"})
    sign.sign(bundle, key)


def test_a_typing_error_ends_a_search_and_ships_nothing(shipped: Project) -> None:
    typo = shipped.recipe.with_name("typo.toml")
    text = shipped.recipe.read_text().replace('precision = "int8"', 'precision = "auto"')
    typo.write_text(text.replace("[budget]", '[quantization]\nkeep = ["secnd.0"]\n[budget]'))
    line = shipped.refused("deploy", "typo.toml", "--target", "openvino", "--quick", "-o", "auto")
    assert "quantization.keep names 'secnd.0'" in line
    assert not list((shipped.folder / "auto").glob("small-*"))
