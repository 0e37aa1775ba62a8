"""Small files in exactly the formats of the data sets, and what their ids mean."""

import struct
import zlib

import numpy as np
from PIL import Image

from examples.scenes import Sample
from examples.workbench.data_settings import Data, Folder

CLASSES_19 = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck "
    "bus train motorcycle bicycle"
)
CLASSES = {19: [name.replace("_", " ") for name in CLASSES_19.split()]}
CLASSES[16] = [name for name in CLASSES[19] if name not in ("terrain", "truck", "train")]
CLASSES[13] = [name for name in CLASSES[16] if name not in ("wall", "fence", "pole")]

# The index-by-index remapping in other code bases: Cityscapes' trainIds, and SYNTHIA's 16 classes.
CITYSCAPES_TO_19 = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
CITYSCAPES_TO_19 |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA_TO_16 = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14}
SYNTHIA_TO_16 |= {11: 15}

FOLDERS = {
    "gta5": Folder("gta5/images", "gta5/labels", "gta5"),
    "synthia": Folder("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", "synthia"),
    "cityscapes": Folder("cityscapes/leftImg8bit/train", "cityscapes/gtFine/train", "cityscapes"),
    "validation": Folder("cityscapes/leftImg8bit/val", "cityscapes/gtFine/val", "cityscapes"),
}
DATA = Data(
    classes=CLASSES[19],
    source=FOLDERS["gta5"],
    target=FOLDERS["cityscapes"],
    validation=FOLDERS["validation"],
    test=FOLDERS["validation"],
)
# A label file of each.
GTA5, SYNTHIA = "gta5/labels/00001.png", "RAND_CITYSCAPES/GT/LABELS/0000000.png"
AACHEN = "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"


def random_sample(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Sample(image, rng.integers(0, 3, (height, width)).astype(np.uint8), f"image-{seed}")


def photo(height=40, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def ids(last, height=40, width=64, seed=0):
    """Every id up to the last, in random order."""
    label = np.random.default_rng(seed).integers(0, last + 1, (height, width))
    label.ravel()[: last + 1] = np.arange(last + 1)
    return label.astype(np.uint8)


def by_table(label, table):
    return np.array([table.get(i, 255) for i in range(256)], np.uint8)[label]


def save(array, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def save_palette(label, file):
    """As in GTA5: an index for each pixel, and a table of colours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(file)


def save_deep(channels, file):
    """A PNG of 16 bits with two channels (grey and alpha) or three, as in SYNTHIA; Pillow cannot write it."""
    height, width, count = channels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    header = struct.pack(">2I5B", width, height, 16, {2: 4, 3: 2}[count], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def write_gta5(root, count=4):
    for i in range(1, count + 1):
        save(photo(seed=i), root / f"gta5/images/{i:05d}.png")
        # The last label differs in size from its image, as a few do in GTA5.
        size = (40, 64) if i < count else (38, 60)
        save_palette(ids(34, *size, seed=i), root / f"gta5/labels/{i:05d}.png")


def write_synthia(root, count=4):
    for i in range(count):
        save(photo(seed=i), root / f"RAND_CITYSCAPES/RGB/{i:07d}.png")
        instances = np.random.default_rng(i).integers(0, 60_000, (40, 64, 1 + i % 2))
        label = np.concatenate([ids(22, seed=i)[..., None], instances], axis=2)
        save_deep(label, root / f"RAND_CITYSCAPES/GT/LABELS/{i:07d}.png")


def write_cityscapes(root, splits=(("train", 6), ("val", 2))):
    for split, count in splits:
        for i in range(count):
            city = ("aachen", "bochum")[i % 2]
            name = f"{city}/{city}_{i:06d}_000019"
            save(photo(64, 128, seed=i), root / f"cityscapes/leftImg8bit/{split}/{name}_leftImg8bit.png")
            below = root / f"cityscapes/gtFine/{split}"
            save(ids(33, 64, 128, seed=i), below / f"{name}_gtFine_labelIds.png")
            save(photo(64, 128), below / f"{name}_gtFine_color.png")
            (below / f"{name}_gtFine_polygons.json").write_text("{}")


def write_all(root):
    write_gta5(root)
    write_synthia(root)
    write_cityscapes(root)
    return root
