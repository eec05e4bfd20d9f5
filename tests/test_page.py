"""The report page: every figure is on it, nothing injects or loads, and it fits a phone and a desk, light and dark."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from bitferry.device.arrays import Images
from bitferry.pipeline.figures import (
    Accuracy,
    Bin,
    Candidate,
    Change,
    ClassChange,
    Confusion,
    Flips,
    Footprint,
    Latency,
    Percentile,
    Ratio,
    Reliability,
    Suspicion,
    Throughput,
    Timing,
    WorstImage,
)
from bitferry.pipeline.report import charts, page, terminal
from bitferry.pipeline.verdict import Execution, Golden, GoldenFile, Ladder, LayerError, Rung, Verdict
from bitferry.targets import Environment, Layer
from tests.conftest import EMBEDDED, ROOT

NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NASTY = "<script>alert(1)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = Path(os.environ.get("BITFERRY_SCREENSHOTS") or ROOT / "build/screenshots")
NEEDED = {50: 11, 90: 64, 99: 662}


def timing(median_ms: float, *, samples: int = 2000, spread: float = 0.05, seed: int = 0) -> Timing:
    """Draw calls as they are in life: a narrow peak, a shoulder, and a few slow ones."""
    random = np.random.default_rng(seed)
    ms = median_ms * (1 + spread * random.gamma(2.0, 1.0, samples) - spread * 1.7)
    ms[: samples // 60] *= random.uniform(1.3, 2.6, samples // 60)
    edges = np.geomspace(ms.min() * 0.999, ms.max(), 49)
    counts = np.histogram(ms, edges)[0]
    percentiles = tuple(
        Percentile(p, float(np.percentile(ms, p)), float(np.percentile(ms, p)) * 1.03)
        for p, least in NEEDED.items()
        if samples >= least
    )
    return Timing(
        samples=samples,
        blocks=20,
        percentiles=percentiles,
        fastest_tenth_ms=float(np.quantile(ms, 0.1)),
        median_ms=float(np.median(ms)),
        mean_ms=float(ms.mean()),
        cov_percent=float(100 * ms.std() / ms.mean()),
        first_ms=median_ms * 14.2,
        warm_up_calls=50,
        histogram_ms=tuple((float(edge), int(count)) for edge, count in zip(edges[1:], counts, strict=True)),
    )


def candidate(name: str, precision: str, accuracy: float | None, median_ms: float, size_mb: float) -> Candidate:
    footprint = Footprint(int(size_mb * 1e6), median_ms * 40, median_ms * 11, int(1.42e8 + size_mb * 4e6), 96_400_000)
    throughput = Throughput(1700 / median_ms, streams=2, threads=1, batch=4)
    return Candidate(name, precision, accuracy, timing(median_ms, seed=len(name)), throughput, footprint)


def latency() -> Latency:
    return Latency(
        threads=2,
        batch=1,
        seconds=48.3,
        candidates=(
            candidate("eager PyTorch float32", "float32", 91.62, 13.31, 44.8),
            candidate("openvino float32", "float32", 91.62, 5.27, 44.7),
            candidate("openvino bfloat16", "bfloat16", 91.58, 2.71, 44.7),
            candidate("openvino int8", "int8", 91.37, 1.563, 11.3),
        ),
        speedup=Ratio(8.52, 8.41, 8.63),
        runtime_speedup=Ratio(3.37, 3.31, 3.44),
        suspicions=(Suspicion("other load", "another process used 0.6 CPUs while timing", "stop it and verify again"),),
    )


def bins(shift: float) -> tuple[Bin, ...]:
    middles = np.linspace(0, 100, 16)[4:-1] + 3.3
    return tuple(Bin(int(9 * 1.6**i), float(c), float(c) - shift * (2 + i % 3) / 2) for i, c in enumerate(middles))


def images() -> dict[int, Images]:
    with np.load(EMBEDDED / "evaluation.npz") as arrays:
        first = np.array(arrays["images"][:12])
    if first.ndim == 3:
        first = np.repeat(first[..., None], 3, axis=3)
    return {17 * index: image for index, image in enumerate(first)}


def worst_image(rank: int, names: list[str]) -> WorstImage:
    truth, other = names[rank % len(names)], names[(rank + 2) % len(names)]
    answers = (truth, other) if rank % 3 else (other, truth)
    confidences = 61.3 - rank, 88.2 - 3 * rank
    return WorstImage(
        17 * rank,
        f"evaluation.npz#{17 * rank}",
        truth,
        answers[0],
        confidences[0],
        answers[1],
        confidences[1],
        52.4 - 2.5 * rank,
    )


def accuracy(names: list[str]) -> Accuracy:
    random = np.random.default_rng(3)
    classes = tuple(
        ClassChange(n, 500, 90 + r, 89.6 + r + random.normal())
        for n, r in zip(names, random.normal(size=len(names)), strict=True)
    )
    return Accuracy(
        images=5000,
        judged=Change("top-1", "tango", 91.62, 91.37, 0.25, 0.04, 0.47, 0.95),
        others=(
            Change("top-5", "tango", 99.74, 99.7, 0.04, -0.03, 0.12, 0.95),
            Change("AUC", "bootstrap", 99.31, 99.29, 0.02, -0.01, 0.06, 0.95),
        ),
        flips=Flips(lost=31, gained=18, flipped=67, mcnemar_p=0.0655),
        classes=classes,
        confusions=(Confusion("Shirt", "T-shirt", 61, 69), Confusion("Coat", "Pullover", 33, 29)),
        reliability=Reliability(3.41, 3.88, 94.9, 0.31, bins(3.4), bins(4.9)),
        sqnr_db=24.31,
        worst=tuple(worst_image(rank, names) for rank in range(12)),
    )


def ladder(layers: int) -> Ladder:
    random = np.random.default_rng(5)
    own = 34 + 4 * random.normal(size=layers)
    errors = tuple(
        LayerError(f"layer{i // 6}.{i % 6}.conv{i % 2 + 1}", float(min(o, 38 - 16 * i / layers)), float(o))
        for i, o in enumerate(own)
    )
    rungs = (
        Rung("weights rounded to int8", 31.2, 21, 91.55, 7.6e-4),
        Rung("activations rounded too", 25.04, 60, 91.41, 0.00238),
        Rung("exported to ONNX", 25.04, 60, 91.41, 2e-9),
        Rung("simplified ONNX", 25.04, 60, 91.41, 0.0),
        Rung("openvino int8", 24.31, 67, 91.37, 5.8e-4),
    )
    return Ladder(5000, rungs, "activations rounded too", ("exported to ONNX",), errors)


def verdict() -> Verdict:
    """Make a verdict as an int8 deployment of the default recipe gives it."""
    ran = tuple(Layer(f"layer{i // 6}.{i % 6}.conv", "convolution", "int8" if i else "float32") for i in range(20))
    files = (("boot.jpg", "JPEG", 0.0021), ("bag.png", "grey PNG", 0.0), ("turned.jpg", "JPEG turned by EXIF", 0.0034))
    return Verdict(
        schema=2,
        recipe="fashion-resnet18",
        version="1.2.0",
        target="openvino",
        precision="int8",
        outcome="pass",
        headline="Inside the budget, and 8.5× faster than eager float",
        reasons=(
            "top-1 drops by 0.25 pp, at most 0.47 pp at 95 % confidence; the budget is 1.00 pp",
            "speed-up is at least 8.4×; 2.0× was asked for",
        ),
        budget_metric="top-1",
        budget_confidence=0.95,
        budget_drop_pp=1.0,
        accuracy=accuracy(NAMES),
        latency=latency(),
        execution=Execution(
            "int8 requested; 19 of 20 convolutions int8, 1 float32 (layer0.0.conv)",
            ran,
            "20 of 20 convolutions float32",
        ),
        ladder=ladder(20),
        golden=Golden(tuple(GoldenFile(name, kind, score, 0.011, 1.0) for name, kind, score in files), 0.02, 0.5),
        environment=Environment(
            "OpenVINO", "2026.4.1", "Intel Xeon Platinum 8481C", ("avx512_vnni", "amx_int8"), "Linux x86_64"
        ),
        versions={"torch": "2.14.1", "openvino": "2026.4.1", "bitferry": "0.1.0"},
        command="bitferry verify recipes/fashion-resnet18.toml --target openvino --precision int8",
        compiled_key="9f2c4e01ab37",
        model_key="0123456789abcdef",
        data_key="sha256:5be2…c901",
        measured_at="2026-11-22T09:14:03+00:00",
    )


def other_verdict() -> Verdict:
    """Make a verdict of another target, with a candidate of unknown accuracy."""
    candidates = (
        candidate("eager PyTorch float32", "float32", 91.62, 13.4, 44.8),
        candidate("onnxruntime float32", "float32", None, 6.1, 44.7),
        candidate("onnxruntime int8", "int8", 90.92, 2.9, 11.4),
    )
    return dataclasses.replace(
        verdict(), target="onnxruntime", latency=dataclasses.replace(latency(), candidates=candidates)
    )


def awkward() -> Verdict:
    """Make a verdict with everything missing that can be, far too much of the rest, and hostile names."""
    plain, names = (
        verdict(),
        [NASTY, *(f"class {i} with a rather long_name_without_a_break_{'x' * 30}" for i in range(999))],
    )
    slow = Candidate("eager PyTorch float32", "float32", None, timing(930.0, samples=9), None, None)
    fast = Candidate(f"null int8 {NASTY}", "mixed", 12.0, timing(0.043, samples=70), None, None)
    missing = Rung("exported to ONNX", None, 0, 0.0, 0.0, missing=f"{NASTY} has no counterpart in this form")
    classes = tuple(
        ClassChange(n, i % 3, None if i % 5 == 0 else 50.0, None if i % 5 == 0 else 49.0 + i % 7, 71.2, None)
        for i, n in enumerate(names)
    )
    worst = tuple(dataclasses.replace(w, source=f"deep/{'folder/' * 20}{NASTY}.jpg") for w in accuracy(names).worst)
    return dataclasses.replace(
        plain,
        outcome="undecided",
        headline=f"Undecided: {NASTY}",
        accuracy=dataclasses.replace(
            plain.accuracy,
            judged=Change("mAP", "bootstrap", 12.25, 12.0, 0.25, -3.1, 4.4, 0.975),
            others=(),
            flips=Flips(0, 0, 0, 1.0),
            classes=classes,
            confusions=(),
            reliability=Reliability(0.0, 0.0, 50.0, 0.0, (), ()),
            sqnr_db=None,
            worst=worst,
            further_images=12_345,
        ),
        latency=Latency(
            1, 1, 0.4, (slow, fast), Ratio(21_000.0, 0.5, 1e6), None, (Suspicion("noise", NASTY, f"close {NASTY}"),)
        ),
        execution=Execution("float32 requested", (), None),
        ladder=Ladder(
            9,
            (Rung("float", None, 0, 12.0, 0.0), missing, *ladder(1).rungs),
            None,
            (),
            (*ladder(299).layers, LayerError("equal", None, None)),
        ),
        golden=Golden((GoldenFile(f"{NASTY}.jpg", "JPEG", 1e-9, 0.0, 0.0),), 0.02, 0.5),
        environment=Environment("null", "0", NASTY, (), "Linux x86_64"),
        command="bitferry verify '" + "very/long/path/" * 30 + "recipe.toml'",
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages as files: usual, awkward, and one that failed."""
    folder = tmp_path_factory.mktemp("pages")
    failed = dataclasses.replace(verdict(), outcome="fail", headline="Outside the budget", budget_drop_pp=0.2)
    page.write(verdict(), images(), folder / "usual.html", others=[other_verdict()])
    page.write(awkward(), {0: np.zeros((700, 300, 3), np.uint8)}, folder / "awkward.html")
    page.write(failed, {}, folder / "failed.html")
    return {path.stem: path for path in folder.glob("*.html")}


class Text(HTMLParser):
    """The words a reader sees, and every address in the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_every_figure_is_on_the_page(pages: dict[str, Path]) -> None:
    text = Text(pages["usual"]).text
    expected = [
        *("91.62 → 91.37 %", "0.25 pp", "0.47 pp", "1.00 pp", "8.52×", "8.41×", "8.63×", "3.37×", "11.3 MB", "44.8 MB", "187 MB", "96.4 MB"),
        *("p = 0.066", "31 images", "18 the other", "67 answers", "24.3 dB", "3.41 %", "3.88 %", "+0.31 pp", "top-5", "AUC", "99.70 %"),
        *("+8", "−4", "31.2 dB", "0.24 %", "lost most", "suspect", "sha256:5be2…c901", "9f2c4e01ab37", "2.14.1", "amx_int8", "2026-11-22T09:14:03"),
        *("another process used 0.6 CPUs", "stop it and verify again", "19 of 20 convolutions", "20 of 20", "turned.jpg", "0.34 %", "2.0 %"),
        *("onnxruntime int8", "not drawn: onnxruntime float32", "least the budget allows: 90.62 %", "evaluation.npz#187", "bitferry verify recipes"),
    ]  # fmt: skip
    assert not [figure for figure in expected if figure not in text]
    artifact = verdict().latency.artifact.timing
    assert not [p for p in artifact.percentiles if page.milliseconds(p.at_most_ms).replace("\xa0", " ") not in text]
    assert all(reason in text for reason in verdict().reasons)


def test_what_is_missing_says_so(pages: dict[str, Path]) -> None:
    text = re.sub(r"[\xa0\u202f]", " ", Text(pages["awkward"]).text)
    for words in (
        "Not measured: <script>",
        "equal",
        "662 for p99",
        "12 345 further images",
        "no picture",
        " µs",
        "not drawn: eager PyTorch float32",
        "The other 980 classes",
        "All 300 layers",
    ):
        assert words in text, words
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_nothing_is_loaded_or_injected(pages: dict[str, Path]) -> None:
    for path in pages.values():
        content, parsed = path.read_text(), Text(path)
        assert not re.search(r"https?://|url\(|@import", content)
        assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
        assert "script" not in parsed.tags
        assert "<script" not in content
    assert NASTY in Text(pages["awkward"]).text


def test_a_page_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page.write(verdict(), {}, path)
    assert path.read_text().rstrip().endswith("</html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("ms", 0.0431, "43.1 µs"), ("ms", 0.0996, "99.6 µs"), ("ms", 1.5634, "1.56 ms"), ("ms", 134.4, "134 ms"), ("ms", 12_345.0, "12.3 s"),
        ("ms", None, "—"), ("size", 999.0, "999 B"), ("size", 4_100_000, "4.10 MB"), ("size", 2.5e9, "2.50 GB"), ("db", None, "equal"),
        ("percent", 0.0, "0.00 %"), ("points", -0.004, "0.00 pp"), ("signed_points", 0.0, "0.00 pp"), ("signed_points", -1.5, "−1.50 pp"), ("signed_points", 1.5, "+1.50 pp"),
        ("share", 0.0, "0 %"), ("share", 2e-9, "<0.0005 %"), ("share", -0.0012, "−0.12 %"), ("probability", 2e-5, "p < 0.001"), ("probability", 1.0, "p = 1.0"),
        ("count", 12_345, "12 345"), ("figures", 9.996, "10.0"), ("figures", 0.0, "0"), ("signed_count", -4, "−4"),
    ],
)  # fmt: skip
def test_a_figure_is_written_as_a_person_would(form: str, value: float | None, text: str) -> None:
    assert re.sub(r"[\xa0\u202f]", " ", str(page.FORMATS[form](value))) == text


def test_the_pareto_front_has_only_what_nothing_faster_matches() -> None:
    front = charts.pareto(c for _, c in charts.measured(verdict(), [other_verdict()]))
    assert [c.name for c in front] == ["openvino int8", "openvino bfloat16", "openvino float32"]


@pytest.mark.parametrize("width", [860, 344])
def test_labels_keep_out_of_each_others_way(width: int) -> None:
    laid = charts.trade_off(verdict(), [other_verdict()], width, 400)
    boxes = [point.box for point in laid.points]
    assert len(boxes) == 5
    assert not [
        p
        for p in laid.points
        for box in boxes
        if box is not p.box and charts.Box(p.x - 6, p.y - 6, p.x + 6, p.y + 6).meets(box)
    ]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.meets(b)]
    assert all(box.inside(charts.Box(0, 0, width, 400)) for box in boxes)


def test_an_axis_covers_what_it_was_made_for() -> None:
    for values in ([3.0], [0.0, 0.0], [-2.0, 5.0], [0.04, 930.0], [1.5, 9.0]):
        axis = charts.scale(values, 0, 100, log=True)
        assert all(0 <= axis(value) <= 100 for value in values)
        assert 2 <= len(axis.ticks()) <= 9
        assert all(-0.01 <= axis(tick) <= 100.01 for tick in axis.ticks())


def chromium(profile: Path, *flags: str) -> tuple[str, str]:
    """Run the browser without a window; return what it printed and its log."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--enable-logging=stderr",
        "--allow-file-access-from-files", "--hide-scrollbars", f"--user-data-dir={profile}", *flags,
    ]  # fmt: skip
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, log = started.communicate(timeout=60)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert not [line for line in log.splitlines() if "CONSOLE" in line], log
    return output, log


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile folder of its own, where there is a browser."""
    if CHROMIUM is None:
        assert os.environ.get("REQUIRE_CHROMIUM") != "1", "REQUIRE_CHROMIUM=1, but there is no chromium on PATH"
        pytest.skip("no chromium on PATH")
    return tmp_path_factory.mktemp("chromium")


FRAMES = """<!doctype html><meta charset="utf-8"><body style="margin:0">{frames}<pre id="sizes"></pre><script>
onload = () => document.getElementById("sizes").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
  const page = frame.contentDocument.documentElement;
  return [page.scrollWidth, page.clientWidth, page.scrollHeight];
}}));
</script>"""
WIDTHS = (400, 1400)
DARK = "--blink-settings=preferredColorScheme=0"


def frame(path: Path, width: int, height: int) -> str:
    return f'<iframe src="{path.as_uri()}" style="border:0;display:block;width:{width}px;height:{height}px"></iframe>'


def test_it_fits_a_phone_and_a_desk_and_is_drawn(pages: dict[str, Path], browser: Path) -> None:
    wanted = [(name, width) for name in pages for width in WIDTHS]
    wrapper = pages["usual"].with_name("frames.htm")
    wrapper.write_text(FRAMES.format(frames="".join(frame(pages[name], width, 900) for name, width in wanted)))
    dom, _ = chromium(browser, "--dump-dom", wrapper.as_uri())
    found = re.search(r'<pre id="sizes">(.+?)</pre>', dom)
    assert found, dom[-500:]
    sizes = dict(zip(wanted, json.loads(found[1]), strict=True))
    assert not [f"{key}: {size}" for key, size in sizes.items() if size[0] > size[1]]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for scheme, flag in (("light", "--blink-settings=preferredColorScheme=1"), ("dark", DARK)):
            shot(
                pages["usual"],
                width,
                sizes["usual", width][2],
                SCREENSHOTS / f"report-{scheme}-{width}.png",
                browser,
                flag,
            )


def shot(path: Path, width: int, height: int, out: Path, profile: Path, *flags: str) -> None:
    """Draw a page at one width, whole."""
    wrapper = path.with_name("shot.htm")
    wrapper.write_text(FRAMES.format(frames=frame(path, width, height)))
    out.unlink(missing_ok=True)
    chromium(profile, f"--window-size={width},{height}", f"--screenshot={out}", *flags, wrapper.as_uri())
    assert out.stat().st_size > 20_000


def test_it_prints(pages: dict[str, Path], browser: Path) -> None:
    out = SCREENSHOTS / "report.pdf"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    chromium(browser, DARK, "--no-pdf-header-footer", f"--print-to-pdf={out}", pages["usual"].as_uri())
    assert out.read_bytes()[:4] == b"%PDF"


def test_suspicions_are_grouped_what_weighs_most_first() -> None:
    kinds = ("first run", "noise", "other load", "first run", "drift")
    suspicions = tuple(Suspicion(cast(Any, kind), f"finding {at}", f"remedy {at}") for at, kind in enumerate(kinds))
    found = dataclasses.replace(verdict(), latency=dataclasses.replace(latency(), suspicions=suspicions))
    text = page.render(found, images())
    assert text.count("<b>Suspicious: ") == 5
    assert text.index("finding 2") < text.index("and 4 more: drift, noise, first run") < text.index("finding 4")
    lines = list(terminal.suspicious(suspicions))
    assert lines == [
        "     [yellow]suspicious:[/] finding 2; remedy 2",
        "     [yellow]and 4 more:[/] drift, noise, first run (2); the report has them",
    ]
    assert list(terminal.suspicious(())) == []


def test_a_curve_is_a_line_and_a_table_that_goes_on_is_shaded() -> None:
    look = (Path(page.__file__).parent / "look.html.jinja").read_text()
    assert "figure svg text.artifact { fill" in look  # of the text alone: a curve of that class is not filled
    assert "var(--shade)" in look


def test_targets_that_were_looked_at_another_number_of_times_share_a_row() -> None:
    judged = dataclasses.replace(verdict().accuracy.judged, confidence=0.975)
    other = dataclasses.replace(other_verdict(), accuracy=dataclasses.replace(verdict().accuracy, judged=judged))
    table = terminal._table([verdict(), other])
    rows = [row for row in table.columns[0]._cells if str(row).startswith("drop at most")]
    assert rows == ["drop at most"]
