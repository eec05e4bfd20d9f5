"""How far bitferry's pixels are from torchvision's own decoder and tensor resize, in levels of 255.

    python benchmarks/preprocessing.py FOLDER

Every image below FOLDER through the contract of an ImageNet model (shorter side 256, centre crop 224) with each
interpolation; prints the mean difference of the average image, of the worst, and the largest of any pixel.
"""

import sys
from pathlib import Path

import numpy as np

from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.data.formats.folder import image_files
from bitferry.pipeline.measure.golden import TORCHVISION_LIMIT, second_opinion


def main(folder: Path) -> None:
    files = [(str(path), path.read_bytes()) for path in image_files(folder)]
    print(f"{len(files)} images; at most {TORCHVISION_LIMIT:g} levels are allowed on average")
    for interpolation in ("nearest", "bilinear", "bicubic"):
        contract = Preprocessing(height=224, width=224, resize=256, interpolation=interpolation)
        differences = []
        for name, content in files:
            other = second_opinion(contract, content)
            if other is not None:
                differences.append(np.abs(other.astype(int) - contract.load(content, name)))
        means = [float(one.mean()) for one in differences]
        largest = max(int(one.max()) for one in differences)
        print(f"{interpolation:9} mean {np.mean(means):.3f}, worst image {max(means):.3f}, largest pixel {largest}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python benchmarks/preprocessing.py FOLDER")
    main(Path(sys.argv[1]))
