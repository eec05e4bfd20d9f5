"""Every format gives the same images and labels that the library which wrote it meant."""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torchvision
import webdataset
from numpy.typing import NDArray
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import formats
from bitferry.pipeline.data.source import Source, Table
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure.metrics import Task
from tests.conftest import Project, subset

NAMES = ("T-shirt", "Trouser", "Pullover")
CONTRACT = Preprocessing(height=28, width=28)
COUNT = 12


def png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def real() -> dict[str, NDArray[Any]]:
    return subset("evaluation", COUNT)


def read(
    source: Source,
    folder: Path,
    *,
    name: str = "evaluation",
    task: Task = "classification",
    contract: Preprocessing = CONTRACT,
    classes: tuple[str, ...] = NAMES,
) -> Split:
    return dataset.split(name, source, classes, contract, Cache(folder / "build"), task=task)


def same(found: Split, real: dict[str, NDArray[Any]]) -> None:
    """Make sure that a split is the real images, grey as they are, with their labels."""
    np.testing.assert_array_equal(found.images[..., 0], real["images"])
    assert found.labels.tolist() == real["labels"].tolist()


def shards(folder: Path, samples: Iterator[dict[str, Any]], *, each: int = 5) -> Path:
    """Write shards by webdataset's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=each, verbose=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:05d}"} | sample)
    last = max(int(path.stem.removeprefix("part-")) for path in folder.glob("*.tar"))
    return folder / f"part-{{000..{last:03d}}}.tar"


def labelled(real: dict[str, NDArray[Any]], **more: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
    for i, image in enumerate(real["images"]):
        yield {"png": png(image)} | {name: value(i) for name, value in more.items()}


def test_shards_with_a_class_file_or_json(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    label = real["labels"].tolist()
    pattern = shards(tmp_path / "a", labelled(real, cls=lambda i: label[i]))
    same(read(pattern, tmp_path), real)
    same(read(tmp_path / "a/part-*.tar", tmp_path), real)
    by_json = shards(tmp_path / "b", labelled(real, json=lambda i: {"label": NAMES[label[i]], "group": f"p{i // 2}"}))
    same(read(by_json, tmp_path), real)
    found = dataset.read("evaluation", by_json, NAMES, CONTRACT, "classification")
    assert [one.group for one in found][:4] == ["p0", "p0", "p1", "p1"]
    theirs = webdataset.WebDataset(sorted(map(str, (tmp_path / "a").glob("*.tar"))), shardshuffle=False).decode("pil")
    for image, other in zip(read(pattern, tmp_path).images, theirs, strict=True):
        np.testing.assert_array_equal(image, np.asarray(other["png"].convert("RGB")))


def test_shards_of_several_labels_and_two_images(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    several = [[], ["Trouser"], ["T-shirt", "Pullover"]]
    pattern = shards(tmp_path / "a", labelled(real, json=lambda i: {"labels": several[i % 3]}))
    found = read(pattern, tmp_path, task="multilabel")
    assert found.labels[:3].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    first = real["images"]
    pairs = ({"front.png": png(first[i]), "side.png": png(first[i - 1]), "cls": 1} for i in range(COUNT))
    pattern = shards(tmp_path / "b", pairs)
    contract = Preprocessing(height=28, width=28, views=2)
    found = read(pattern, tmp_path, contract=contract)
    np.testing.assert_array_equal(found.images[3, :, ..., 0], first[[3, 2]])
    turned = read(Table(path=pattern, image=("side.png", "front.png")), tmp_path, contract=contract)
    np.testing.assert_array_equal(turned.images[3, :, ..., 0], first[[2, 3]])
    with pytest.raises(InputError, match=r"00000: expected 1 image .*, found cls, front.png, side.png"):
        read(pattern, tmp_path)


def test_masks_in_shards(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    masks = [(image > 100).astype(np.uint8) for image in real["images"]]
    samples = ({"jpg": png(real["images"][i]), "seg.png": png(masks[i])} for i in range(COUNT))
    found = read(shards(tmp_path / "a", samples), tmp_path, task="segmentation")
    np.testing.assert_array_equal(found.labels, masks)


def test_shards_that_are_broken_are_named(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    pattern = shards(tmp_path, labelled(real, cls=lambda i: 0))
    with pytest.raises(
        InputError, match=r"part-003.tar does not exist, one of 4 that part-\{000..003\}.tar stands for"
    ):
        read(tmp_path / "part-{000..003}.tar", tmp_path)
    whole = (tmp_path / "part-001.tar").read_bytes()
    (tmp_path / "part-001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(InputError, match="part-001.tar"):
        read(pattern, tmp_path)
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(InputError, match="holds no images"):
        read(tmp_path / "odd.tar", tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(InputError, match="is compressed, so that nothing in it can be found; unpack it"):
        read(tmp_path / "a.tar.gz", tmp_path)


def hugging(real: dict[str, NDArray[Any]], names: tuple[str, ...] = NAMES) -> datasets.Dataset:
    """Make a data set as `datasets` does, with its own order of the classes."""
    order = [names.index(NAMES[label]) for label in real["labels"]]
    columns = {"image": [{"bytes": png(one), "path": None} for one in real["images"]], "label": order,
               "patient": [f"p{i // 3}" for i in range(COUNT)]}  # fmt: skip
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)),
                "patient": datasets.Value("string")}  # fmt: skip
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_datasets_folders_and_parquet_know_their_classes(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    made = hugging(real, ("Pullover", "T-shirt", "Trouser"))
    made.save_to_disk(tmp_path / "folder", num_shards=2)
    made.to_parquet(tmp_path / "data.parquet", batch_size=5)
    assert pq.ParquetFile(tmp_path / "data.parquet").num_row_groups > 1
    for source in (tmp_path / "folder", tmp_path / "data.parquet"):
        same(read(source, tmp_path), real)
        table = Table(path=source, image=("image",), label="label", group="patient")
        found = dataset.read("train", table, NAMES, CONTRACT, "classification")
        assert [one.group for one in found][::3] == ["p0", "p1", "p2", "p3"]
        with pytest.raises(InputError, match=r"has classes that are no class of this recipe: T-shirt, Trouser"):
            read(source, tmp_path, classes=("Pullover", "Shirt", "Dress", "Coat"))
        with pytest.raises(InputError, match="has no column 'finding'; it has image, label, patient"):
            read(Table(path=source, label="finding"), tmp_path)
    shuffled = made.shuffle(seed=0)
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert read(tmp_path / "shuffled", tmp_path).labels.tolist() == [
        NAMES.index(("Pullover", "T-shirt", "Trouser")[i]) for i in shuffled["label"]
    ]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=r"holds several data sets \(test, train\); name one, as both/test"):
        read(tmp_path / "both", tmp_path)


def test_columns_of_several_labels_and_of_two_images(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    images = [{"bytes": png(one), "path": None} for one in real["images"]]
    several = [[[], [1], [0, 2]][i % 3] for i in range(COUNT)]
    columns = {"frontal": images, "lateral": images[1:] + images[:1], "labels": several}
    features = {"frontal": datasets.Image(), "lateral": datasets.Image(),
                "labels": datasets.Sequence(datasets.ClassLabel(names=list(NAMES)))}  # fmt: skip
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(tmp_path / "folder")
    contract = Preprocessing(height=28, width=28, views=2)
    found = read(tmp_path / "folder", tmp_path, contract=contract, task="multilabel")
    assert found.labels[:3].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    np.testing.assert_array_equal(found.images[4, :, ..., 0], real["images"][[4, 5]])
    with pytest.raises(InputError, match="expected 1 column of images, found frontal, lateral among"):
        read(tmp_path / "folder", tmp_path, task="multilabel")


def test_other_columns_are_told_by_name(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": ["nowhere.png"] * 3, "label": [0, 1, 7]})
    made.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet\[2\]: label 7 is out of range; there are 3 classes"):
        read(tmp_path / "a.parquet", tmp_path)
    datasets.Dataset.from_dict({"image": ["x.png"] * 3, "label": [0, 1, 2]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="3 of the 3 evaluation images are broken.*x.png cannot be read"):
        read(tmp_path / "a.parquet", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match="a.parquet is not a Parquet file that can be read"):
        read(tmp_path / "a.parquet", tmp_path)
    hugging(real).save_to_disk(tmp_path / "folder")
    state = json.loads((tmp_path / "folder/state.json").read_text())
    state["_data_files"][0]["filename"] = "../../secret.arrow"
    (tmp_path / "folder/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="names ../../secret.arrow, a file that is not in"):
        read(tmp_path / "folder", tmp_path)


def idx(array: NDArray[np.uint8]) -> bytes:
    """Write an array as MNIST's files hold one."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_torchvision_by_name(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, array in (("images-idx3", real["images"]), ("labels-idx1", real["labels"].astype(np.uint8))):
        for part in ("t10k", "train"):
            (raw / f"{part}-{name}-ubyte").write_bytes(idx(array))
    table = Table.model_validate({"torchvision": "FashionMNIST", "root": tmp_path / "data", "train": False})
    classes = tuple(torchvision.datasets.FashionMNIST.classes)
    same(read(table, tmp_path, classes=classes), real)
    missing = table.model_copy(update={"root": tmp_path / "nowhere"})
    with pytest.raises(
        InputError, match=r"FashionMNIST in .*nowhere, train = False is not there .* fetch them with --download"
    ):
        read(missing, tmp_path, classes=classes)
    with pytest.raises(InputError, match="is none of torchvision's data sets"):
        read(Table(torchvision="os", root=tmp_path), tmp_path)
    with pytest.raises(InputError, match="unpickles what it finds; write the images into"):
        read(Table(torchvision="LSUN", root=tmp_path), tmp_path)


def cifar(folder: Path, images: NDArray[np.uint8], labels: list[int], *, protocol: int = 2) -> None:
    """Write batches as the authors of CIFAR-10 did."""
    folder.mkdir(parents=True)
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": planes, "labels": labels}, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES)}, protocol))


def test_a_broken_file_of_torchvision_s_sets_is_left_out_as_any_other(
    real: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    for number, image in enumerate(real["images"][:6]):
        place = tmp_path / "set" / NAMES[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(image)[: 200 if number == 3 else None])
    table, how = Table(torchvision="ImageFolder", root=tmp_path / "set"), dataset.Handling(broken_share=0.5)
    found = dataset.split("evaluation", table, NAMES[:2], CONTRACT, Cache(tmp_path / "build"), how=how)
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(InputError, match="1 of the 6 evaluation images is broken.*image 4: a broken image"):
        dataset.split("evaluation", table, NAMES[:2], CONTRACT, Cache(tmp_path / "build"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_s_batches_are_read_as_torchvision_reads_them(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
    cifar(tmp_path / "cifar-10-batches-py", images, [i % 3 for i in range(COUNT)], protocol=protocol)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    contract = Preprocessing(height=32, width=32)
    for train in (True, False):
        theirs = torchvision.datasets.CIFAR10(tmp_path, train=train)
        table = Table.model_validate({"torchvision": "CIFAR10", "root": tmp_path, "train": train})
        found = dataset.read("evaluation", table, NAMES, contract, "classification")
        assert [one.labels for one in found] == [(label,) for label in theirs.targets]
        for one, (image, _) in zip(found, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one.views[0].decode(one.views[0].content())), np.asarray(image))


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("this must never run",))


def test_no_pickle_makes_anything_but_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    cifar(folder, np.zeros((3, 32, 32, 3), np.uint8), [0, 1, 2])
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}))
    table = Table.model_validate({"torchvision": "CIFAR10", "root": tmp_path, "train": False})
    with pytest.raises(InputError, match=r"test_batch asks for builtins.print, which no batch of CIFAR's does"):
        read(table, tmp_path)
    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="a.npy is not an .npy array: Array can't be memory-mapped: Python objects"):
        read(Table(images=tmp_path / "a.npy", labels=tmp_path / "a.npy"), tmp_path)
    assert "never run" not in "".join(capsys.readouterr())
    with pytest.raises(InputError, match="is not there .*test_batch is missing"):
        read(Table.model_validate({"torchvision": "CIFAR10", "root": tmp_path / "no", "train": False}), tmp_path)


def test_two_npy_files(real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    for name, array in real.items():
        np.save(tmp_path / f"{name}.npy", array)
    same(read(Table(images=tmp_path / "images.npy", labels=tmp_path / "labels.npy"), tmp_path), real)
    assert len(read(tmp_path / "images.npy", tmp_path, name="calibration")) == COUNT
    with pytest.raises(InputError, match=r'images.npy holds images without labels; write \{images = "images.npy"'):
        read(tmp_path / "images.npy", tmp_path)


def test_every_file_in_the_folder_is_a_format() -> None:
    assert set(formats.names()) == {path.stem for path in Path(formats.__file__).parent.glob("[!_]*.py")}
    for name in formats.names():
        module = formats.get(name)
        assert all(callable(getattr(module, verb)) for verb in ("reads", "read", "files"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{torchvision = "CIFAR10"}', "torchvision = 'CIFAR10' needs `root`"),
        ("{}", "a table names one source"),
        ('{path = "a.parquet", colour = "x"}', "unknown key 'data.evaluation.colour', known here: path, image"),
        ('{path = "evaluation.npz", label = "x"}', "evaluation.npz has no columns to be named"),
        ('"nowhere-{0..1}.tar"', "nowhere-0.tar does not exist, one of 2"),
        ('"nowhere.parquet"', "nowhere.parquet does not exist"),
    ],
)
def test_a_recipe_that_names_no_data_is_told_how(project: Project, value: str, message: str) -> None:
    project.edit(('evaluation = "evaluation.npz"', f"evaluation = {value}"))
    assert message in project.refused("quantize", "small.toml")


def damaged(good: bytes, random: np.random.Generator) -> bytes:
    """Change some bytes, the first hundreds more often, or cut the end off."""
    content = bytearray(good)
    for _ in range(int(random.choice([1, 2, 20]))):
        content[int(random.integers(min(len(content), random.choice([200, len(content)]))))] = int(random.integers(256))
    return bytes(content[: int(random.integers(len(content)))] if random.random() < 0.2 else content)


@pytest.mark.parametrize("name", ["shard", "parquet", "arrow", "state", "cifar", "npy"])
def test_damaged_files_are_read_or_refused(name: str, real: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    source: Source
    if name == "shard":
        shards(tmp_path, labelled(real, json=lambda i: {"label": 1}), each=20)
        source = path = tmp_path / "part-000.tar"
    elif name == "parquet":
        source = path = tmp_path / "a.parquet"
        hugging(real).to_parquet(path)
    elif name in ("arrow", "state"):
        hugging(real).save_to_disk(tmp_path / "folder")
        source = tmp_path / "folder"
        path = source / ("state.json" if name == "state" else "data-00000-of-00001.arrow")
    elif name == "cifar":
        cifar(tmp_path / "cifar-10-batches-py", np.zeros((3, 32, 32, 3), np.uint8), [0, 1, 2])
        source = Table.model_validate({"torchvision": "CIFAR10", "root": tmp_path, "train": False})
        path = tmp_path / "cifar-10-batches-py/test_batch"
    else:
        np.save(tmp_path / "images.npy", real["images"])
        np.save(tmp_path / "labels.npy", real["labels"])
        source, path = Table(images=tmp_path / "images.npy", labels=tmp_path / "labels.npy"), tmp_path / "images.npy"
    good, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        path.unlink()  # else what is mapped changes under who mapped it
        path.write_bytes(damaged(good, random))
        try:
            for one in dataset.read("evaluation", source, NAMES, CONTRACT, "classification"):
                one.views[0].decode(one.views[0].content())
        except InputError:
            refused += 1
    assert refused > 20


def test_download_is_done_where_it_was_asked_for_and_nowhere_else(
    project: Project, real: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(self: torchvision.datasets.MNIST) -> None:
        fetched.append(self.raw_folder)
        Path(self.raw_folder).mkdir(parents=True)
        for part in ("t10k", "train"):
            (Path(self.raw_folder) / f"{part}-images-idx3-ubyte").write_bytes(idx(real["images"]))
            (Path(self.raw_folder) / f"{part}-labels-idx1-ubyte").write_bytes(idx(real["labels"].astype(np.uint8)))

    fetched: list[str] = []
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    table = '{torchvision = "FashionMNIST", root = "data", train = true}'
    project.edit(('train = "train.npz"', f"train = {table}"), ("epochs = 6", "epochs = 1"))
    assert "let torchvision fetch them with --download" in project.refused("train", "small.toml")
    assert not fetched
    line = project.refused("train", "small.toml", "--download")  # there they are, of more classes than the recipe's
    assert "FashionMNIST has classes that are no class of this recipe: T-shirt/top" in line
    assert fetched == ["data/FashionMNIST/raw"]
