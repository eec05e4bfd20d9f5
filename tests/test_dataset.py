"""Splits from folders, lists and arrays; broken data and leaks are refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data import labels, leaks
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure.metrics import Task
from tests.conftest import subset

CLASSES = ("cat", "dog")
CONTRACT = Preprocessing(height=16, width=16)
RNG = np.random.default_rng(0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write five PNG files for each class, in class folders."""
    for name in CLASSES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(5):
            pixels = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def read(
    source: Path,
    tmp_path: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    name: str = "evaluation",
    task: Task = "classification",
) -> Split:
    return dataset.split(name, source, classes, CONTRACT, Cache(tmp_path / "build"), task=task)


def test_a_folder_of_class_folders(pictures: Path, tmp_path: Path) -> None:
    split = read(pictures, tmp_path)
    assert split.images.shape == (10, 16, 16, 3)
    assert split.labels.tolist() == [0] * 5 + [1] * 5
    one = CONTRACT.load((pictures / "dog/3.png").read_bytes(), "x")
    np.testing.assert_array_equal(split.images[8], one)
    assert split.sources[8].endswith("dog/3.png")


def test_a_list_names_files_beside_it_with_indices_or_names(pictures: Path, tmp_path: Path) -> None:
    listed = pictures / "list.tsv"
    listed.write_text("file\tlabel\tnote\ncat/1.png\t0\tx\ndog/2.png\tdog\n\n")
    split = read(listed, tmp_path)
    assert split.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(split.images[1], read(pictures, tmp_path).images[7])


def test_arrays_are_resized_like_files(tmp_path: Path) -> None:
    arrays = subset("evaluation", 20, classes=2)
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    split = read(tmp_path / "data.npz", tmp_path)
    np.testing.assert_array_equal(split.images[4], CONTRACT.fit(arrays["images"][4]))


def test_what_was_decoded_is_kept_by_content_not_by_name(pictures: Path, tmp_path: Path) -> None:
    first = read(pictures, tmp_path)
    assert read(pictures, tmp_path).key == first.key
    pixels = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(pictures / "cat/0.png")  # the same name, another picture
    changed = read(pictures, tmp_path)
    assert changed.key != first.key
    assert not np.array_equal(changed.images[0], first.images[0])


def test_folders_of_other_names_are_taken_in_order_only_when_none_matches(pictures: Path, tmp_path: Path) -> None:
    assert read(pictures, tmp_path, classes=("first", "second")).labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(InputError, match="folders that are no class of this recipe: dog"):
        read(pictures, tmp_path, classes=("cat", "horse"))


def test_the_same_picture_in_two_splits_is_refused_even_as_another_file(pictures: Path, tmp_path: Path) -> None:
    evaluation = read(pictures, tmp_path)
    other = tmp_path / "other"
    (other / "cat").mkdir(parents=True)
    Image.open(pictures / "cat/2.png").save(other / "cat/copy.bmp")
    calibration = read(other, tmp_path, name="calibration", classes=("cat", "dog"))
    with pytest.raises(InputError, match=r"1 evaluation images are also in the calibration data.*2\.png = .*copy\.bmp"):
        leaks.refuse(calibration, evaluation)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat/1.png 0", "list.tsv:1: expected `file<TAB>label`, found 'cat/1.png 0'"),
        ("cat/1.png\t2", "label 2 is out of range; there are 2 classes"),
        ("cat/1.png\thorse", "'horse' is neither a class of this recipe"),
        ("cat/nowhere.png\t0", "nowhere.png cannot be read: No such file"),
    ],
)
def test_a_wrong_line_in_a_list_is_named(pictures: Path, tmp_path: Path, line: str, message: str) -> None:
    (pictures / "list.tsv").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read(pictures / "list.tsv", tmp_path)


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8), np.uint8), labels=np.zeros(4, np.int64))
    with pytest.raises(InputError, match=r"expected `images` N×H×W .* found uint8 \(4, 8\)"):
        read(tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.zeros(3, np.int64))
    with pytest.raises(InputError, match=r"expected `labels` of 4 integers, found int64 \(3,\)"):
        read(tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 7]))
    with pytest.raises(InputError, match=r"labels out of range \(7\)"):
        read(tmp_path / "b.npz", tmp_path)
    (tmp_path / "c.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not an .npz with arrays"):
        read(tmp_path / "c.npz", tmp_path)


def test_a_class_name_that_stands_twice_needs_indices(pictures: Path, tmp_path: Path) -> None:
    (pictures / "list.tsv").write_text("cat/1.png\tcrane\n")
    with pytest.raises(InputError, match="'crane' stands for 2 classes; use indices"):
        read(pictures / "list.tsv", tmp_path, classes=("crane", "dog", "crane"))


def test_copies_are_no_further_evidence(pictures: Path, tmp_path: Path) -> None:
    (pictures / "list.tsv").write_text("cat/1.png\t0\ncat/2.png\t0\ncat/1.png\t0\n")
    with pytest.raises(InputError, match="1 of the 3 evaluation images are copies of others among them"):
        leaks.refuse(read(pictures / "list.tsv", tmp_path))


def test_hidden_files_and_other_files_beside_images_are_left_out(pictures: Path, tmp_path: Path) -> None:
    for name in ("cat/._1.jpg", "cat/notes.txt", "cat/paper.pdf"):
        (pictures / name).write_text("no picture")
    (pictures / ".cache").mkdir()
    assert len(read(pictures, tmp_path)) == 10


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_list(pictures: Path, tmp_path: Path) -> None:
    (pictures / "list.tsv").write_bytes(b"\xef\xbb\xbfcat/1.png\t0\r\ndog/1.png\tdog\r\n")
    assert read(pictures / "list.tsv", tmp_path).labels.tolist() == [0, 1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "npy"])
def test_a_damaged_array_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **subset("evaluation", 20))  # type: ignore[arg-type]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if damage == "npy":
        np.save(tmp_path / "x.npy", np.zeros(4))
        content = bytearray((tmp_path / "x.npy").read_bytes())
    path.write_bytes(content[:-200] if damage == "truncated" else content)
    with pytest.raises(InputError, match="data.npz is not an .npz with arrays"):
        read(path, tmp_path)


def test_a_multi_label_list_names_any_number_of_classes(pictures: Path, tmp_path: Path) -> None:
    listed = pictures / "list.tsv"
    listed.write_text("file\tlabels\ncat/1.png\tcat|dog\tnote\ndog/2.png\t1\ncat/3.png\t\ncat/4.png\t 0 | dog \n")
    split = read(listed, tmp_path, task="multilabel")
    assert split.labels.dtype == np.int64
    assert split.labels.tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]
    assert len(split) == 4
    leaks.refuse(split)
    listed.write_text(listed.read_text().replace("cat|dog", "cat"))
    assert read(listed, tmp_path, task="multilabel").key != split.key


def test_the_task_is_part_of_the_key(pictures: Path, tmp_path: Path) -> None:
    (pictures / "list.tsv").write_text("cat/1.png\tcat\ndog/2.png\tdog\n")
    one, several = (read(pictures / "list.tsv", tmp_path, task=task) for task in ("classification", "multilabel"))
    assert one.key != several.key
    assert (one.labels.tolist(), several.labels.tolist()) == ([0, 1], [[1, 0], [0, 1]])


@pytest.mark.parametrize("kind", [np.uint8, np.bool_, np.int32])
def test_multi_label_arrays(tmp_path: Path, kind: type[np.generic]) -> None:
    labels = np.array([[1, 0], [0, 0], [1, 1]]).astype(kind)
    np.savez(tmp_path / "a.npz", images=RNG.integers(0, 256, (3, 8, 8), dtype=np.uint8), labels=labels)
    split = read(tmp_path / "a.npz", tmp_path, task="multilabel")
    assert split.labels.dtype == np.int64
    assert split.labels.tolist() == labels.astype(int).tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, np.int64), r"expected `labels` of shape \(3, 2\), 0 or 1 for each class, found int64 \(3,\)"),
        (np.zeros((3, 4), np.int64), r"expected `labels` of shape \(3, 2\), .* found int64 \(3, 4\)"),
        (np.zeros((3, 2)), r"expected `labels` of shape \(3, 2\), .* found float64 \(3, 2\)"),
        (np.array([[0, 1], [2, -1], [0, 0]]), "expected `labels` of 0 and 1 only, found -1, 2"),
    ],
)
def test_other_arrays_are_no_multi_label_data(
    tmp_path: Path, labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]], message: str
) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=labels)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.npz", tmp_path, task="multilabel")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat/1.png", r"list.tsv:1: expected `file<TAB>A\|B`, nothing after the tab for no label, found 'cat/1.png'"),
        ("cat/1.png\tcat|horse", "list.tsv:1: 'horse' is neither a class of this recipe"),
        ("cat/1.png\tcat|", "list.tsv:1: '' is neither a class of this recipe"),
        ("cat/1.png\t0|2", "label 2 is out of range; there are 2 classes"),
    ],
)
def test_a_wrong_line_in_a_multi_label_list_is_named(pictures: Path, tmp_path: Path, line: str, message: str) -> None:
    (pictures / "list.tsv").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read(pictures / "list.tsv", tmp_path, task="multilabel")


def test_data_of_the_other_task_is_refused_with_the_way_out(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is a folder, whose layout .* give a list of `file<TAB>A\|B` lines, or an .npz"
    ):
        read(pictures, tmp_path, task="multilabel")
    (pictures / "list.tsv").write_text("cat/1.png\tcat|dog\n")
    with pytest.raises(InputError, match='for several labels per image set task = "multilabel"'):
        read(pictures / "list.tsv", tmp_path)
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros((3, 2), np.int64))
    with pytest.raises(InputError, match='of 3 integers, found .* set task = "multilabel"'):
        read(tmp_path / "a.npz", tmp_path)


def test_a_list_of_0_and_1_for_each_class_is_no_list_of_indices() -> None:
    def found(*value: object, classes: int = 4) -> tuple[int, ...]:
        return labels.of_value(list(value), None, "abcd"[:classes], "multilabel", "a.parquet[0]")

    assert found(0, 1, 0, 1) == found(False, True, False, True) == found(0.0, 1.0, 0.0, 1.0) == found(1, 3) == (1, 3)
    assert found(0, 0, 0, 0) == ()
    assert found(2, 0, 1, 3) == (2, 0, 1, 3)
    with pytest.raises(InputError, match="may be indices, or 0 and 1 for each class"):
        found(0, 1, classes=2)


def test_a_group_in_front_of_the_label_is_not_read_as_no_label(pictures: Path, tmp_path: Path) -> None:
    (pictures / "list.tsv").write_text("file\tgroup\tlabel\ncat/1.png\tp1\tcat\n")
    with pytest.raises(InputError, match="the column 'group' stands where .* belongs; put it after those"):
        read(pictures / "list.tsv", tmp_path, task="multilabel")
