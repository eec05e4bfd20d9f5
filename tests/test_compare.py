"""Two builds side by side, and a bundle proved anew wherever it is copied to: `compare`, `verify BUNDLE`, `selftest`."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitferry.pipeline.report import comparison, record
from bitferry.pipeline.report.comparison import Comparison
from tests.conftest import Project, plain_environment, subset

RECORDED = "from each one's recorded ratio to eager float"
LIVE = "both timed here, interleaved"


def report_of(project: Project, target: str) -> Path:
    return project.folder / f"build/small/reports/{target}-int8"


def bundle_of(project: Project, target: str) -> Path:
    return project.folder / f"dist/small-{target}-1.0.0"


@pytest.fixture
def report(deployed: Project, tmp_path: Path) -> Path:
    """A report folder that a test may change."""
    return Path(shutil.copytree(report_of(deployed, "openvino"), tmp_path / "report"))


@pytest.fixture
def bundle(deployed: Project, tmp_path: Path) -> Path:
    """A bundle that a test may change, with nothing of its build around it."""
    return Path(shutil.copytree(bundle_of(deployed, "openvino"), tmp_path / "elsewhere/bundle"))


def strictly(text: str) -> Any:
    """Parse JSON; NaN and infinity, which Python reads and JSON lacks, are refused."""

    def refuse(token: str) -> float:
        raise AssertionError(f"{token} in JSON")

    return json.loads(text, parse_constant=refuse)


def rewrite(bundle: Path, name: str, content: str | bytes) -> None:
    """Replace a file of a bundle and its entry in the manifest, as nobody would who only damaged it."""
    (bundle / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest = json.loads((bundle / "manifest.json").read_text())
    digest = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    manifest["files"][name] = {"sha256": digest, "size_bytes": (bundle / name).stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def expect(bundle: Path, name: str, scores: list[float]) -> None:
    """Write other expected scores for a golden file."""
    expected = json.loads((bundle / "golden/expected.json").read_text())
    expected["files"][name]["scores"] = scores
    rewrite(bundle, "golden/expected.json", json.dumps(expected))


def damage(bundle: Path) -> None:
    content = bytearray((bundle / "model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "model.bin").write_bytes(content)


def answers_of(report: Path) -> dict[str, Any]:
    with np.load(report / "answers.npz") as arrays:
        return dict(arrays)


class TestCompare:
    """`bitferry compare A B`."""

    def test_two_reports(self, deployed: Project) -> None:
        done = deployed.bitferry(
            "compare", "build/small/reports/openvino-int8", "build/small/reports/onnxruntime-int8", "--json"
        )
        assert done.returncode == 0, done.stderr
        found = strictly(done.stdout)
        a, b = (
            record.read_verdict(report_of(deployed, target) / "verdict.json") for target in ("openvino", "onnxruntime")
        )
        assert set(found) == set(Comparison.__dataclass_fields__)
        assert (found["a_name"], found["b_name"]) == ("small 1.0.0 openvino int8", "small 1.0.0 onnxruntime int8")
        assert (found["common_images"], found["timed"]) == (600, RECORDED)
        change = found["accuracy"]
        assert change["float_percent"] == pytest.approx(a.accuracy.judged.percent)
        assert change["percent"] == pytest.approx(b.accuracy.judged.percent)
        assert change["drop_lower_pp"] <= change["drop_pp"] <= change["drop_upper_pp"]
        assert found["speedup"]["value"] == pytest.approx(b.latency.speedup.value / a.latency.speedup.value)
        assert found["speedup"]["lower"] < found["speedup"]["value"] < found["speedup"]["upper"]
        assert found["a_median_ms"] == a.latency.artifact.timing.median_ms
        assert a.latency.artifact.footprint
        assert found["a_bytes"] == a.latency.artifact.footprint.file_bytes

    def test_the_recorded_interval_is_wider_than_either(self, deployed: Project, report: Path) -> None:
        other = report_of(deployed, "onnxruntime")
        found = comparison.compare(report, other).speedup
        ratios = [record.read_verdict(one / "verdict.json").latency.speedup for one in (report, other)]
        assert found.upper / found.lower >= max(one.upper / one.lower for one in ratios)

    def test_a_build_against_itself_is_no_change(self, report: Path) -> None:
        found = comparison.compare(report, report)
        assert found.accuracy
        assert found.accuracy.drop_pp == 0
        assert found.accuracy.drop_lower_pp < 0 < found.accuracy.drop_upper_pp < 1
        assert found.speedup.value == pytest.approx(1)
        assert found.speedup.lower <= 1 <= found.speedup.upper
        assert found.a_bytes == found.b_bytes

    def test_the_other_way_round_is_the_inverse(self, deployed: Project, report: Path) -> None:
        other = report_of(deployed, "onnxruntime")
        there, back = comparison.compare(report, other), comparison.compare(other, report)
        assert there.speedup.value * back.speedup.value == pytest.approx(1)
        assert there.speedup.lower * back.speedup.upper == pytest.approx(1)
        assert there.accuracy
        assert back.accuracy
        assert there.accuracy.drop_upper_pp == pytest.approx(-back.accuracy.drop_lower_pp, abs=1e-6)

    def test_two_bundles_are_timed_here(self, deployed: Project) -> None:
        done = deployed.bitferry("compare", "dist/small-openvino-1.0.0", "dist/small-onnxruntime-1.0.0", "--json")
        assert done.returncode == 0, done.stderr
        found = strictly(done.stdout)
        assert (found["common_images"], found["timed"]) == (600, LIVE)
        assert found["a_median_ms"] > 0
        assert found["b_median_ms"] > 0
        assert 0 < found["speedup"]["lower"] <= found["speedup"]["value"] <= found["speedup"]["upper"]

    def test_a_bundle_against_itself(self, bundle: Path) -> None:
        found = comparison.compare(bundle, bundle, seconds=0.2)
        assert found.timed == LIVE
        assert found.accuracy
        assert found.accuracy.drop_pp == 0

    def test_a_bundle_and_a_report_named_by_its_verdict(self, deployed: Project, bundle: Path) -> None:
        verdict = report_of(deployed, "openvino") / "verdict.json"
        found = comparison.compare(bundle, verdict)
        assert found.timed == RECORDED
        assert (found.a, found.b, found.common_images) == (str(bundle), str(verdict), 600)
        assert found.a_name == found.b_name
        assert comparison.compare(bundle / "verdict.json", bundle, seconds=0.2).timed == LIVE

    def test_people_get_a_table(self, deployed: Project, report: Path) -> None:
        done = deployed.bitferry("compare", str(report), str(report))
        assert done.returncode == 0, done.stderr
        text = " ".join(done.stdout.split())
        for told in (
            "openvino int8",
            "right answers",
            "+0.00 pp",
            "1.00× as fast",
            "1.00× the size",
            "latency, median",
        ):
            assert told in text
        assert f"600 common images (95% on either side); {RECORDED}, 95 % interval" in text

    def test_without_a_common_image_accuracy_is_not_compared(
        self, deployed: Project, report: Path, tmp_path: Path
    ) -> None:
        arrays = answers_of(report)
        np.savez(report / "answers.npz", **arrays | {"digests": 255 - arrays["digests"]})
        one = str(report_of(deployed, "openvino"))
        found = strictly(deployed.bitferry("compare", one, str(report), "--json").stdout)
        assert (found["common_images"], found["accuracy"]) == (0, None)
        done = deployed.bitferry("compare", one, str(report))
        assert done.returncode == 0
        assert "0 common images (no common image, so accuracy is not compared)" in done.stdout
        assert "right answers" not in done.stdout

    def test_images_are_paired_by_their_pixels_whatever_their_order(self, deployed: Project, report: Path) -> None:
        arrays = answers_of(report)
        picked = np.random.default_rng(0).permutation(600)[:100]
        np.savez(report / "answers.npz", **{name: array[picked] for name, array in arrays.items()})
        found = comparison.compare(report_of(deployed, "openvino"), report)
        right = 100 * (arrays["answers"] == arrays["labels"])[picked].mean()
        assert found.common_images == 100
        assert found.accuracy
        assert found.accuracy.percent == found.accuracy.float_percent == pytest.approx(right)

    def test_an_image_that_has_another_label_there_is_not_common(self, deployed: Project, report: Path) -> None:
        arrays = answers_of(report)
        arrays["labels"][:50] = (arrays["labels"][:50] + 1) % 3
        np.savez(report / "answers.npz", **arrays)
        assert comparison.compare(report_of(deployed, "openvino"), report).common_images == 550

    def test_a_path_that_is_neither(self, deployed: Project, report: Path, tmp_path: Path) -> None:
        for path in (tmp_path / "nowhere", tmp_path, report / "answers.npz", tmp_path / "verdict.json"):
            line = deployed.refused("compare", str(report), str(path))
            assert f"{path} is neither a bundle nor a report folder: it has no verdict.json" in line

    def test_an_altered_bundle(self, deployed: Project, bundle: Path, report: Path) -> None:
        damage(bundle)
        for path in (bundle, bundle / "verdict.json"):
            assert "is not as it was built (changed: model.bin)" in deployed.refused("compare", str(path), str(report))

    def test_a_verdict_of_another_schema(self, deployed: Project, report: Path) -> None:
        fields = json.loads((report / "verdict.json").read_text())
        (report / "verdict.json").write_text(json.dumps(fields | {"schema": 1}))
        line = deployed.refused("compare", str(report_of(deployed, "openvino")), str(report))
        assert "has schema 1; this bitferry reads schema 3: verify again" in line

    @pytest.mark.parametrize("fault", ["gone", "half", "fewer rows"])
    def test_answers_that_cannot_be_used(self, deployed: Project, report: Path, fault: str) -> None:
        path, arrays = report / "answers.npz", answers_of(report)
        content = path.read_bytes()
        path.unlink()
        if fault == "half":
            path.write_bytes(content[: len(content) // 2])
        elif fault == "fewer rows":
            np.savez(path, **arrays | {"labels": arrays["labels"][:10]})
        line = deployed.refused("compare", str(report_of(deployed, "openvino")), str(report))
        assert f"{path} " in line


class TestVerifyBundle:
    """`bitferry verify BUNDLE`."""

    @pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
    def test_what_was_deployed_passes(self, deployed: Project, target: str) -> None:
        done = deployed.bitferry("verify", f"dist/small-{target}-1.0.0", "--quick")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("pass answers as it was verified, on the same runtime and processor")
        assert " ms here, " in done.stdout

    def test_a_copy_passes_where_nothing_of_its_build_is(self, bundle: Path) -> None:
        done = Project(bundle.parent).bitferry_process("verify", "bundle", "--quick", "--json")
        assert done.returncode == 0, done.stderr
        found = strictly(done.stdout)
        verified = record.read_verdict(bundle / "verdict.json")
        assert (found["outcome"], found["accuracy"], found["bundle"]) == ("pass", None, "bundle")
        assert set(found["golden"]) == {one.name for one in verified.golden.files}
        assert all(0 <= difference <= found["score_limit"] for difference in found["golden"].values())
        assert found["score_limit"] == verified.golden.score_limit
        assert found["timing"]["samples"] >= 120
        assert found["timing"]["median_ms"] > 0
        assert found["verified_median_ms"] == verified.latency.artifact.timing.median_ms
        assert found["environment"]["runtime"] == "openvino"
        assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]

    def test_the_same_images_give_the_recorded_answers(self, deployed: Project, bundle: Path) -> None:
        found = verify(deployed, bundle, "--data", "evaluation.npz")
        judged = record.read_verdict(bundle / "verdict.json").accuracy.judged
        assert found["accuracy"] == {
            "metric": "top-1",
            "method": "tango",
            "float_percent": pytest.approx(judged.float_percent),
            "percent": pytest.approx(judged.percent),
            "drop_pp": pytest.approx(judged.drop_pp),
            "drop_lower_pp": pytest.approx(judged.drop_lower_pp),
            "drop_upper_pp": pytest.approx(judged.drop_upper_pp),
            "confidence": 0.95,
            "higher_is_better": True,
        }
        assert "5 pp allowed" in found["reasons"][0]

    def test_some_of_the_images_are_paired_and_strange_ones_left_out(self, deployed: Project, bundle: Path) -> None:
        some, strange = subset("evaluation", 200, skip=100), subset("evaluation", 10, skip=700)
        mixed = {name: np.concatenate([strange[name], some[name][::-1]]) for name in some}
        np.savez(bundle.parent / "mixed.npz", **mixed)  # type: ignore[arg-type]
        recorded = record.read_answers(bundle / "answers.npz")
        done = deployed.bitferry("verify", str(bundle), "--quick", "--json", "--data", str(bundle.parent / "mixed.npz"))
        found = strictly(done.stdout)["accuracy"]
        assert found["float_percent"] == pytest.approx(100 * recorded.float_right[100:300].mean())
        assert found["percent"] == pytest.approx(100 * recorded.right[100:300].mean())
        assert "10 images left out: the bundle was not verified on them" in done.stderr

    def test_other_labels_than_those_it_was_verified_with_are_refused(self, deployed: Project, bundle: Path) -> None:
        data = subset("evaluation", 600)
        data["labels"][:7] = (data["labels"][:7] + 1) % 3
        np.savez(bundle.parent / "relabelled.npz", **data)  # type: ignore[arg-type]
        line = deployed.refused("verify", str(bundle), "--data", str(bundle.parent / "relabelled.npz"))
        assert "7 of 600 images of" in line
        assert "have other labels than those they were verified with" in line

    def test_too_few_images_leave_it_undecided(self, deployed: Project, bundle: Path) -> None:
        np.savez(bundle.parent / "few.npz", **subset("evaluation", 10))  # type: ignore[arg-type]
        found = verify(deployed, bundle, "--data", str(bundle.parent / "few.npz"), code=1)
        assert found["outcome"] == "undecided"

    def test_a_drop_beyond_the_budget_fails(self, deployed: Project, bundle: Path) -> None:
        fields = json.loads((bundle / "verdict.json").read_text())
        rewrite(bundle, "verdict.json", json.dumps(fields | {"budget_drop_pp": -50.0}))
        assert verify(deployed, bundle, code=0)["outcome"] == "pass"
        assert verify(deployed, bundle, "--data", "evaluation.npz", code=1)["outcome"] == "fail"

    def test_images_it_was_not_verified_on(self, deployed: Project, bundle: Path) -> None:
        np.savez(bundle.parent / "other.npz", **subset("evaluation", 50, skip=700))  # type: ignore[arg-type]
        line = deployed.refused("-q", "verify", str(bundle), "--quick", "--data", str(bundle.parent / "other.npz"))
        assert f"none of the 50 images of {bundle.parent / 'other.npz'} is one that {bundle} was verified on" in line

    def test_data_that_is_none(self, deployed: Project, bundle: Path) -> None:
        line = deployed.refused("-q", "verify", str(bundle), "--quick", "--data", "gone.npz")
        assert "the data gone.npz does not exist" in line

    @pytest.mark.parametrize("name", ["golden-1.jpg", "golden-4.jpg"])
    def test_other_scores_than_expected_fail_and_name_the_file(
        self, deployed: Project, bundle: Path, name: str
    ) -> None:
        scores = json.loads((bundle / "golden/expected.json").read_text())["files"][name]["scores"]
        expect(bundle, name, [scores[1], scores[2], scores[0] + 9])
        done = deployed.bitferry("-q", "verify", str(bundle), "--quick")
        assert done.returncode == 1
        assert done.stdout.startswith("fail does not answer as it was verified")
        assert [line.split(":")[0].strip() for line in done.stdout.splitlines() if "golden-" in line] == [name]
        found = verify(deployed, bundle, code=1)
        assert found["outcome"] == "fail"
        assert found["golden"][name] > found["score_limit"]
        assert sum(difference > found["score_limit"] for difference in found["golden"].values()) == 1

    @pytest.mark.parametrize("scores", [[1.0, 2.0], [float("nan"), 0.0, 0.0], [float("inf"), 0.0, 0.0]])
    def test_scores_that_cannot_be_compared_fail_in_json_that_can_be_read(
        self, deployed: Project, bundle: Path, scores: list[float]
    ) -> None:
        expect(bundle, "golden-2.png", scores)
        found = verify(deployed, bundle, code=1)
        assert found["outcome"] == "fail"
        assert found["reasons"][0].startswith("golden-2.png: differs by ")
        done = selftest(bundle, "--json")
        assert done.returncode == 1
        assert strictly(done.stdout)["passed"] is False

    @pytest.mark.parametrize("text", ["", "[]", "{}", "no JSON", '{"score_limit": 1, "files": {}}', "[" * 100_000])
    def test_expectations_that_are_none_are_no_pass(self, deployed: Project, bundle: Path, text: str) -> None:
        rewrite(bundle, "golden/expected.json", text)
        assert "golden/expected.json" in deployed.refused("-q", "verify", str(bundle), "--quick")
        done = selftest(bundle)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1

    def test_an_altered_model(self, deployed: Project, bundle: Path) -> None:
        damage(bundle)
        assert "is not as it was built (changed: model.bin)" in deployed.refused("verify", str(bundle), "--quick")

    def test_a_bundle_without_a_verdict(self, deployed: Project, bundle: Path) -> None:
        rewrite(bundle, "verdict.json", "{}")
        assert "has schema None" in deployed.refused("-q", "verify", str(bundle), "--quick")

    def test_what_cannot_be_verified(self, deployed: Project, bundle: Path) -> None:
        assert "is not a bundle: it has no manifest.json" in deployed.refused("verify", str(bundle.parent))
        line = deployed.refused("verify", "small.toml", "--data", "evaluation.npz")
        assert "--data is for a bundle; a recipe names its own data" in line
        (bundle / "manifest.json").write_text("[" * 100_000)
        assert f"{bundle / 'manifest.json'} cannot be read" in deployed.refused("verify", str(bundle))


def verify(project: Project, bundle: Path, *options: str, code: int | None = 0) -> Any:
    """Verify a bundle and read the JSON; `code` is the exit code it must end with, None for any."""
    done = project.bitferry("-q", "verify", str(bundle), "--quick", "--json", *options)
    assert code is None or done.returncode == code, done.stderr
    assert done.stderr == ""
    return strictly(done.stdout)


def selftest(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, bundle / "run.pyz", "selftest", *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=plain_environment(), cwd=bundle.parent
    )


class TestSelftest:
    """`python run.pyz selftest`."""

    def test_a_copy_passes(self, bundle: Path) -> None:
        done = selftest(bundle)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert [line.split("\t")[0] for line in lines[:-2]] == [
            f"golden-{i}" for i in ("1.jpg", "2.png", "3.png", "4.jpg")
        ]
        assert lines[-2].endswith(" ms, the median of a few calls")
        assert lines[-1] == "every golden file is answered as it was verified"
        found = strictly(selftest(bundle, "--json").stdout)
        assert set(found) == {"passed", "score_limit", "differences", "milliseconds", "rebuilt"}
        assert found["rebuilt"] is False
        assert found["milliseconds"] > 0
        assert found["passed"] is True
        assert found["score_limit"] == record.read_verdict(bundle / "verdict.json").golden.score_limit

    def test_other_scores_than_expected_fail(self, bundle: Path) -> None:
        expect(bundle, "golden-3.png", [9.0, -9.0, 0.0])
        done = selftest(bundle)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.splitlines()[-1] == "this machine answers otherwise"
        found = strictly(selftest(bundle, "--json").stdout)
        assert found["passed"] is False
        assert [n for n, value in found["differences"].items() if value > found["score_limit"]] == ["golden-3.png"]

    def test_an_altered_file_is_refused(self, bundle: Path) -> None:
        damage(bundle)
        done = selftest(bundle)
        assert (done.returncode, done.stdout) == (2, "")
        assert "changed: model.bin" in done.stderr
