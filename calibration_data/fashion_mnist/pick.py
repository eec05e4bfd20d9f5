"""Pick the embedded images out of the original Fashion-MNIST files: seeded, class-balanced, no image twice.

    python calibration_data/fashion_mnist/pick.py ORIGINALS

ORIGINALS is the folder with the four `*-ubyte.gz` files as published. The same originals always give the
same splits; `manifest.json` records the sha256 of every file read and written.
"""

import gzip
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
SEED = 20261121
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
SIZES = {"train": ("train", 12_000), "calibration": ("train", 512), "evaluation": ("t10k", 4_000)}

Bytes = NDArray[np.uint8]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_idx(path: Path) -> Bytes:
    """Read one IDX file of unsigned bytes; the format is described at the data set's own site."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def balanced(labels: Bytes, count: int, allowed: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Pick `count` allowed indices, each class as often as the others (the first classes one more)."""
    picked = []
    for label in range(len(CLASSES)):
        wanted = count // len(CLASSES) + (label < count % len(CLASSES))
        candidates = np.flatnonzero((labels == label) & allowed)
        picked.append(rng.choice(candidates, wanted, replace=False))
    return np.sort(np.concatenate(picked))


def save_npz(path: Path, **arrays: Bytes) -> None:
    """Write what `numpy.savez_compressed` writes, but the same bytes every time."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, buffer.getvalue(), compresslevel=9)


def main(originals: Path) -> None:
    rng = np.random.default_rng(SEED)
    images = {part: read_idx(originals / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")}
    labels = {part: read_idx(originals / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")}
    seen: set[bytes] = set()
    free = {}
    for part in ("train", "t10k"):  # an image that occurs twice, in either part, is free only the first time
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images[part]]
        free[part] = np.array([not (d in seen or seen.add(d)) for d in digests])  # type: ignore[func-returns-value]
    splits = {}
    for split, (part, count) in SIZES.items():
        chosen = balanced(labels[part], count, free[part], rng)
        free[part][chosen] = False
        save_npz(HERE / f"{split}.npz", images=images[part][chosen], labels=labels[part][chosen])
        splits[split] = {
            "file": f"{split}.npz",
            "sha256": sha256(HERE / f"{split}.npz"),
            "images": count,
            "picked_from": part,
            "indices_sha256": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        }
    manifest = {
        "dataset": "Fashion-MNIST",
        "source": "https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, see LICENSE beside this file",
        "seed": SEED,
        "classes": CLASSES,
        "originals": {path.name: sha256(path) for path in sorted(originals.glob("*-ubyte.gz"))},
        "splits": splits,
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
