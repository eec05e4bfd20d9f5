"""OpenVINO files of strangers: torn, crossed, endless or with ways out of their folder; the runtime never opens them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs import foreign, put
from tests.conftest import Project

Change = Callable[[str], str]


@pytest.fixture
def bundle(deployed: Project, tmp_path: Path) -> Path:
    return foreign(deployed, "openvino", tmp_path)


def refused(deployed: Project, bundle: Path) -> str:
    line = deployed.refused("verify", str(bundle), "--quick")
    assert line.endswith("; copy the bundle again from where it was made")
    return line


def changed(deployed: Project, bundle: Path, change: Change) -> str:
    """Give the line that a bundle with another `model.xml` is refused with."""
    before = (bundle / "model.xml").read_text()
    after = change(before)
    assert after != before
    put(bundle, "model.xml", after.encode())
    return refused(deployed, bundle)


def test_25_weights_missing_short_or_of_another_model(deployed: Project, bundle: Path) -> None:
    whole = (bundle / "model.bin").read_bytes()
    put(bundle, "model.bin", whole[:-10])
    assert re.search(
        rf"the constant '.*' is at \d+ to {len(whole)} of the weights, which have", refused(deployed, bundle)
    )
    put(bundle, "model.bin", whole + bytes(640))
    assert f"its constants take {len(whole)} bytes of model.bin, which has" in refused(deployed, bundle)
    (bundle / "model.bin").unlink()
    assert "missing: model.bin" in deployed.refused("verify", str(bundle), "--quick")


@pytest.mark.parametrize(
    ("name", "value"), [("offset", "99999999"), ("offset", "-1"), ("offset", "1e3"), ("size", "9" * 30)]
)
def test_26_a_constant_outside_the_file(deployed: Project, bundle: Path, name: str, value: str) -> None:
    line = changed(deployed, bundle, lambda text: re.sub(rf'{name}="\d+"', f'{name}="{value}"', text, count=1))
    assert "constant '" in line


def crossed(text: str) -> str:
    """Make two layers take each other."""
    edge = re.findall(r'<edge from-layer="(\d+)" from-port="\d+" to-layer="(\d+)"', text)[-2]
    return text.replace(
        "</edges>", f'<edge from-layer="{edge[1]}" from-port="2" to-layer="{edge[0]}" to-port="0" /></edges>'
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace('<layer id="3"', '<layer id="2"', 1), "have one id, 2"),
        (crossed, "its layers take each other in a circle"),
        (lambda text: text.replace('to-layer="3"', 'to-layer="9999"', 1), "'9999', of which one is not there"),
    ],
    ids=["id", "cycle", "gap"],
)
def test_27_layers_that_are_crossed(deployed: Project, bundle: Path, change: Change, told: str) -> None:
    assert told in changed(deployed, bundle, change)


@pytest.mark.parametrize("size", ["0", "1000000000000", "-7", "x"])
@pytest.mark.parametrize("where", ["<dim>16</dim>", 'shape="1,16,16,3"'])
def test_28_sizes_of_nothing_and_beyond_all_bounds(deployed: Project, bundle: Path, size: str, where: str) -> None:
    if size == "x" and where != "<dim>16</dim>":
        return
    line = changed(deployed, bundle, lambda text: text.replace(where, where.replace("16", size), 1))
    assert re.search(
        r"the layer '.*' has a tensor of shape|a size of the layer '.*' is|the input '.*' is of shape", line
    )


LAUGHS = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    "declared",
    [
        f'<!ENTITY l0 "ha">{LAUGHS}',
        '<!ENTITY l9 SYSTEM "file:///etc/passwd">',
        '<!ENTITY % l9 SYSTEM "http://localhost/"> %l9;',
    ],
    ids=["bomb", "file", "network"],
)
def test_29_entities(deployed: Project, bundle: Path, declared: str) -> None:
    head = f'<?xml version="1.0"?><!DOCTYPE net [{declared}]>'
    line = changed(
        deployed, bundle, lambda text: text.replace('<?xml version="1.0"?>', head).replace("images", "&l9;", 1)
    )
    assert "it declares a document type or entities, which an IR never does" in line


LIBRARY = '#include <stdio.h>\n__attribute__((constructor)) static void run(void) { fclose(fopen(TRACE, "w")); }\n'


def test_30_an_extension_is_never_loaded(deployed: Project, bundle: Path, tmp_path: Path) -> None:
    library, trace = tmp_path / "extension.so", tmp_path / "trace"
    (tmp_path / "extension.c").write_text(LIBRARY)
    define = f'-DTRACE="{trace}"'
    subprocess.run(["cc", "-shared", "-fPIC", define, "-o", library, tmp_path / "extension.c"], check=True)
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], check=True)
    assert trace.exists()  # it does run when it is loaded
    trace.unlink()
    before = (bundle / "model.xml").read_text()
    told = "extensions are never loaded"
    assert told in changed(deployed, bundle, lambda text: text.replace('version="opset1"', f'version="{library}"', 1))
    info = f'<rt_info><extension path="{library}"/><info name="extension" value="{library}"/>'
    put(bundle, "model.xml", before.replace("<rt_info>", info).encode())
    assert deployed.bitferry("verify", str(bundle), "--quick").returncode == 0  # a note like any other
    assert not trace.exists()
