"""31 to 33: TensorRT engines, which are code: unsigned, changed, or another machine's."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bitferry.device import engine, install
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.device.gpu import Gpu
from bitferry.pipeline import recipe
from bitferry.pipeline.bundle import write_runner
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.shipping import sign
from tests.conftest import Project
from tests.signed import TIED, Shop, open_shop
from tests.test_targets import target_or_skip

NEVER = "deserialized"


@pytest.fixture(scope="module")
def tensorrt() -> Any:
    return target_or_skip("tensorrt")


@pytest.fixture(scope="module")
def shop(deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(deployed.folder / "dist/small-openvino-1.0.0", tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def built(tensorrt: Any, deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a real engine, which needs no GPU with TensorRT for RTX."""
    if tensorrt.trt.__name__ != "tensorrt_rtx":
        pytest.skip("TensorRT itself builds on a GPU only")
    run = Run(recipe.read(deployed.recipe), deployed.recipe, Cache(deployed.folder / "build/small"))
    out: Path = tmp_path_factory.mktemp("engine") / "model.engine"
    source = Deployment(run, "tensorrt", "float32").simplified.path
    options = tensorrt.Options(cache="", capabilities=("8.6",))
    tensorrt.compile(source, out, precision="float32", options=options)
    return out


def bundle_of(shop: Shop, built: Path, tensorrt: Any) -> Path:
    """Put the engine into a bundle, as deploying to TensorRT does."""

    def put(bundle: Path) -> None:
        for path in built.parent.iterdir():
            (bundle / path.name).write_bytes(path.read_bytes())
        for name in ("model.xml", "model.bin"):
            (bundle / name).unlink()
        write_runner(bundle / "run.pyz", "tensorrt")

    model = {"file": built.name, "precision": "float32", "options": asdict(tensorrt.Options(cache=""))}
    return shop.copy("1.0.0", put, target="tensorrt", model=model, tied=TIED | {"packages": {}})


def test_31_an_unsigned_engine_is_never_handed_to_the_runtime(
    shop: Shop, built: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "selftest", lambda _: pytest.fail(NEVER))
    bundle = bundle_of(shop, built, tensorrt)
    with pytest.raises(InputError, match="is not signed; `bitferry sign"):
        sign.archive(bundle)
    (bundle / "model.sig").write_text("{}")
    with pytest.raises(InputError, match="is no signature in the OpenSSF model-signing format"):
        install.install(sign.archive(bundle), shop.device("31"))
    (bundle / "model.sig").unlink()
    done = subprocess.run(
        [sys.executable, bundle / "run.pyz", "check", "--key", shop.public], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {bundle} is not signed: it has no model.sig\n"


@pytest.mark.parametrize("command", ["check", "selftest", "measure"])
def test_32_one_flipped_byte_is_refused_by_its_digest_first(
    shop: Shop, built: Path, tensorrt: Any, command: str
) -> None:
    bundle = bundle_of(shop, built, tensorrt)
    content = bytearray((bundle / built.name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / built.name).write_bytes(content)
    done = subprocess.run([sys.executable, bundle / "run.pyz", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{bundle} is not as it was built (changed: model.engine); " in done.stderr


@pytest.mark.parametrize(
    ("note", "card", "told"),
    [
        ({}, Gpu("another", "7.5"), "for SM86 and does not fit"),
        ({"version": "0.1"}, Gpu("the same", "8.6"), None),
        ({"runtime": "tensorrt"}, Gpu("the same", "8.6"), "an engine of one does not run on the other"),
    ],
)
def test_33_an_engine_of_another_machine_says_how_to_build_it_again(
    built: Path, tensorrt: Any, tmp_path: Path, note: dict[str, Any], card: Gpu, told: str | None
) -> None:
    path = tmp_path / built.name
    path.write_bytes(built.read_bytes())
    given = json.loads(built.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(given | note))
    log = engine.Log()
    with pytest.raises(InputError) as caught:
        engine._fitting(path, tensorrt.trt.Runtime(log), card, log)
    assert "`python run.pyz rebuild` builds it for this machine" in str(caught.value)
    assert told is None or told in str(caught.value)


def test_33_and_is_not_even_unpacked(shop: Shop, built: Path, tensorrt: Any) -> None:
    bundle = bundle_of(shop, built, tensorrt)
    for tied, told in (
        ({"gpu": ["8.6"]}, "GPU"),
        ({"packages": {"tensorrt-rtx": "==0.1"}}, "it needs tensorrt-rtx ==0.1"),
    ):
        manifest = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps(manifest | {"tied": manifest["tied"] | tied}))
        sign.sign(bundle, shop.key)
        with pytest.raises(TargetUnavailable, match=told):
            install.install(sign.archive(bundle), shop.device(told.replace(" ", "-")))
