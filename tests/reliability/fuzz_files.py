"""Harnesses for the readers of files: changed bytes, also under right checksums, and other structures."""

import contextlib
import copy
import io
import struct
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from examples.workbench.data.folders import FolderPair
from examples.workbench.data.layouts import LAYOUTS
from examples.workbench.data_settings import Folder
from examples.workbench.errors import InputError
from examples.workbench.training.checkpoints import Progress, load_checkpoint, load_weights, save_checkpoint
from tests.reliability.fuzz_tensors import documented

__all__ = ["LABELS", "fuzz_checkpoints", "fuzz_label_files", "read_label"]

HEIGHT, WIDTH = 6, 9
CLASSES = ["road", "sky", "car"]
PNG = b"\x89PNG\r\n\x1a\n"


def png(array: np.ndarray, *, palette: bool = False) -> bytes:
    """A file of one or three channels of 8 bits, or of 2, 3 or 4 of 16 bits, which Pillow cannot write."""
    file = io.BytesIO()
    if array.dtype == np.uint16 and array.ndim == 3:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
        header = struct.pack(">2I5B", array.shape[1], array.shape[0], 16, {2: 4, 3: 2, 4: 6}[array.shape[2]], 0, 0, 0)
        return PNG + b"".join(
            chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        )
    image = Image.fromarray(array)
    if palette:
        image.putpalette(bytes(range(3 * 34)))
    image.save(file, "png")
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(PNG)
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def label_files() -> dict[str, bytes]:
    """A layout's name to a label file of it."""
    ids = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    deep = np.stack([ids % 22 + 1, ids * 997 % 65_536], axis=2).astype(np.uint16)
    return {
        "index": png((ids % 3).astype(np.uint8)),
        "gta5": png((ids % 34).astype(np.uint8), palette=True),
        "synthia": png(deep),
        "cityscapes": png((ids % 34).astype(np.uint8)),
    }


LABELS = label_files()
IMAGE = png((np.arange(HEIGHT * WIDTH * 3) % 256).reshape(HEIGHT, WIDTH, 3).astype(np.uint8))


def read_label(root: Path, layout: str, content: bytes, image: bytes = IMAGE) -> Any:
    """The label map that the reader returns for a file."""
    known = LAYOUTS[layout]  # type: ignore[index]
    below = "city" if layout == "cityscapes" else "."
    for folder, end, what in (("images", known.image_ends[-1], image), ("labels", known.label_end, content)):
        (root / folder / below).mkdir(parents=True, exist_ok=True)
        (root / folder / below / f"a{end}").write_bytes(what)
    folder = Folder("images", "labels", layout)  # type: ignore[arg-type]
    return FolderPair(root, folder, classes=CLASSES)[0]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut, with bytes changed, put in, left out or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["cut", "set", "set", "put", "drop", "repeat"]))
        some = draw(st.binary(min_size=1, max_size=6))
        if how == "cut":
            content = content[:at]
        elif how == "set":
            content = content[:at] + some + content[at + len(some) :]
        elif how == "put":
            content = content[:at] + some + content[at:]
        elif how == "drop":
            content = content[:at] + content[at + len(some) :]
        else:
            content = content[:at] + content[at : at + 40] + content[at:]
    return content


@st.composite
def forged(draw: st.DrawFn, content: bytes) -> bytes:
    """A PNG whose chunks are damaged under checksums that are right, so that the damage reaches the decoders."""
    parts = chunks(content)
    at = draw(st.integers(0, len(parts) - 1))
    kind, inside = parts[at]
    how = draw(st.sampled_from(["damage", "damage", "pixels", "twice", "drop", "more"]))
    if how == "damage":
        parts[at] = (kind, draw(damaged(inside)) if inside else draw(st.binary(max_size=8)))
    elif how == "pixels":
        packed = [i for i, (name, _) in enumerate(parts) if name == b"IDAT"]
        rows = zlib.decompress(parts[packed[0]][1])
        parts[packed[0]] = (b"IDAT", zlib.compress(draw(damaged(rows))))
    elif how == "twice":
        parts.insert(at, parts[at])
    elif how == "drop":
        del parts[at]
    else:
        names = b"tRNS PLTE iCCP gAMA tEXt zTXt eXIf acTL fcTL sBIT bKGD abCD".split()
        parts.insert(at, (draw(st.sampled_from(names)), draw(st.binary(max_size=40))))
    return PNG + b"".join(chunk(*part) for part in parts)


def fuzz_label_files(data: st.DataObject) -> None:
    """The readers of label files and images, in every layout."""
    draw = data.draw
    layout = draw(st.sampled_from(sorted(LABELS)))
    strategy = draw(st.sampled_from([damaged, forged]))
    label, image = LABELS[layout], IMAGE
    if draw(st.integers(0, 3)):
        label = draw(strategy(label))
    else:
        image = draw(strategy(image))
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        # Libraries warn about odd files; only the result counts.
        warnings.simplefilter("ignore")
        sample = documented(lambda: read_label(Path(root), layout, label, image), InputError)
    if sample is not None:
        assert sample.image.shape == (*sample.label.shape, 3)
        assert sample.image.dtype == sample.label.dtype == np.uint8
        assert np.isin(sample.label, [0, 1, 2, 255]).all()


RUN = {"seed": 0, "optimiser": {"learning_rate": 0.1, "name": "adamw"}, "data": {"classes": CLASSES}}


def parts() -> dict[str, Any]:
    """Contents of a small run's checkpoint: a network, and its optimiser with a state."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimiser = torch.optim.Adam(network.parameters(), 0.1)
    network(torch.randn(4, 2)).square().sum().backward()
    optimiser.step()
    return {"segmenter": network, "optimiser": optimiser}


def checkpoint_file() -> tuple[bytes, dict[str, Any]]:
    """A whole checkpoint, and the state in it."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        save_checkpoint(Path(out), Progress(step=7, resumed_from=(3,), best=(0.5, 4)), parts(), RUN)
        (path,) = Path(out).glob("checkpoints/step-*.pt")
        return path.read_bytes(), torch.load(path, weights_only=True)


CHECKPOINT, STATE = checkpoint_file()


def zipped(draw: st.DrawFn) -> bytes:
    """The checkpoint with damage inside of one of its parts, under checksums that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as archive, zipfile.ZipFile(file, "w") as other:
        names = archive.namelist()
        # Mostly in the pickle, since it is the part that is interpreted.
        chosen = draw(st.sampled_from([name for name in names if name.endswith("data.pkl")] * 20 + names))
        for name in names:
            content = archive.read(name)
            other.writestr(name, draw(damaged(content)) if name == chosen else content)
    return file.getvalue()


def restructured(draw: st.DrawFn) -> bytes:
    """A checkpoint with something missing, renamed, or of a wrong kind."""
    odd = [None, 0, -1, 2.5, "x", [], {}, (1,), torch.ones(2), torch.ones(3, 2, dtype=torch.int64), torch.ones(())]
    state = copy.deepcopy(STATE)
    for _ in range(draw(st.integers(1, 3))):
        inside: Any = state
        while isinstance(inside, dict) and inside:
            key = draw(st.sampled_from(list(inside)))
            if not isinstance(inside[key], dict) or draw(st.integers(0, 3)) == 0:
                how = draw(st.sampled_from(["drop", "rename", "odd", "odd"]))
                value = inside.pop(key)
                if how != "drop":
                    inside[f"{key}?" if how == "rename" else key] = (
                        value if how == "rename" else draw(st.sampled_from(odd))
                    )
                break
            inside = inside[key]
    file = io.BytesIO()
    torch.save(state if draw(st.integers(0, 9)) else draw(st.sampled_from(odd)), file)
    return file.getvalue()


def fuzz_checkpoints(data: st.DataObject) -> None:
    """The loaders of checkpoints: all of a run, and the weights alone."""
    draw = data.draw
    how = draw(st.sampled_from(["bytes", "bytes", "zip", "zip", "structure", "structure"]))
    content = {"bytes": lambda draw: draw(damaged(CHECKPOINT)), "zip": zipped, "structure": restructured}[how](draw)
    stateful = parts()
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()):
        path = Path(root) / "checkpoints/step-00000007.pt"
        path.parent.mkdir()
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = documented(lambda: load_weights(path), InputError)
            progress = documented(lambda: load_checkpoint(Path(root), stateful, RUN), InputError)
    if progress is not None:
        assert isinstance(progress.step, int)
    if how == "bytes" and weights is not None:
        # A change that the checksums do not detect is not damage.
        assert weights.keys() == STATE["stateful"]["segmenter"].keys()
        assert all(torch.equal(weights[name], value) for name, value in STATE["stateful"]["segmenter"].items())
