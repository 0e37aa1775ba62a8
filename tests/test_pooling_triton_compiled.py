"""Every kernel that pooling starts, compiled for GPUs that are not here: no spills, wide loads, room for programs."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

pytest.importorskip("triton", "3.6", reason="because earlier ones bind arguments in another way")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="because Triton compiles for CUDA on Linux")

# Bytes that may be spilled beside the main loop, where they cost nothing.
ASIDE = 128
VECTOR = {"float32": 4, "bf16": 8, "fp16": 8}


class Case(NamedTuple):
    """A call of a launcher, as `compiled.call` takes it."""

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: str = "float32"
    layout: str = "nchw"
    labels: str = "int64"
    per_image: bool = False

    @property
    def wide(self) -> bool:
        """Whether features can be reached in vectors of 128 bits: not in crops, nor some of few channels."""
        _, channels, height, width, _ = self.shape
        vector = VECTOR[self.dtype]
        if self.layout == "channels-last":
            return channels % vector == 0
        # Of odd planes, every eighth channel lies alike to the borders of vectors, or every fourth.
        return self.layout == "nchw" and (channels >= vector or height * width % vector == 0)


class Bound(NamedTuple):
    """Requirements on a kernel: bits of each access to an argument in the main loop, programs per multiprocessor."""

    argument: str
    programs: int
    bits: int = 128


# The kernels that take as long as the memory does. All others must compile, and none may spill.
BOUNDS = {
    "_product_kernel": Bound("features", programs=2),
    "_spread_planes_kernel": Bound("result", programs=4),
    "_spread_rows_kernel": Bound("result", programs=4),
}


def cases(capability):
    """Shapes of the benchmark, not crossed where the kernels are the same; planes are of odd sizes unless said."""
    even, odd = (128, 256), (65, 129)
    for dtype in ("float32", "bf16"):
        for layout in ("nchw", "channels-last"):
            for num_classes in (19, 64, 300):
                yield Case("add_up", (2, 256, *odd, num_classes), dtype, layout)
            yield Case("spread", (2, 256, *odd, 19), dtype, layout)
            if capability < 100:
                # Later ones multiply by PyTorch.
                yield Case("multiply", (2, 256, *odd, 19), dtype, layout)
    for resample in ("bilinear", "area"):
        yield Case(resample, (2, 256, *odd, 19))
    if capability > 90:
        return
    for dtype in ("float32", "bf16"):
        for layout in ("nchw", "channels-last"):
            yield Case("add_up", (2, 19, *odd, 19), dtype, layout, "uint8")
            yield Case("add_up", (2, 256, *odd, 150), dtype, layout, per_image=True)
            yield Case("spread", (2, 19, *odd, 19), dtype, layout, "uint8", per_image=True)
        yield Case("add_up", (2, 2048, *odd, 3), dtype)
        yield Case("add_up", (2, 256, *even, 19), dtype)
        yield Case("add_up", (2, 256, *even, 19), dtype, "crop", per_image=True)
    yield Case("add_up", (2, 3, *odd, 19))
    yield Case("add_up", (2, 24, *odd, 19), "bf16", "channels-last")
    yield Case("add_up", (2, 256, *odd, 19), "fp16")
    yield Case("spread", (2, 256, *even, 19), "fp16")
    # Triton itself knows multiples of 16, and sees 1 as a constant.
    yield Case("spread", (2, 256, 65, 136, 19), "bf16")
    yield Case("spread", (2, 256, 1, 1, 19), "bf16")
    yield Case("add_up", (1, 16, 1, 1, 2))
    yield Case("bilinear", (2, 256, *odd, 3), labels="uint8")


def run(cases, capability, **changed):
    """Readings of the kernels, in a process where Triton compiles; here it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    todo = {"cases": [case._asdict() for case in cases], "capabilities": [capability], "changed": changed}
    command = [sys.executable, "-m", "tests.compiled"]
    done = subprocess.run(command, input=json.dumps(todo), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for reading in found:
        reading["cases"] = [Case(**{**case, "shape": tuple(case["shape"])}) for case in reading["cases"]]
    return found


def failures(reading):
    """The requirements that a kernel fails."""
    if "failed" in reading:
        return [reading["failed"]]
    inside = sum(reading.get("kinds", {}).get(name, 0) for name in ("LDL", "STL"))
    wrong = []
    if inside or reading["spilled"] > ASIDE:
        wrong.append(f"{reading['spilled']} bytes spilled, by {inside} instructions in the main loop")
    bound = BOUNDS.get(reading["kernel"])
    if bound is None or not any(case.wide for case in reading["cases"]):
        return wrong
    if reading["programs"] < bound.programs:
        wrong.append(
            f"{reading['programs']} programs fit: {reading['registers']} registers, {reading['shared']} shared"
        )
    widths = [int(bits) for what, by in reading["inside"].items() if what.split()[1] == bound.argument for bits in by]
    if not widths or min(widths) < bound.bits:
        wrong.append(f"{bound.argument} in {widths or 'no'} bits")
    return wrong


def told(found):
    """The failures of all readings, a line each."""
    return "\n".join(
        f"{reading['kernel']} sm_{reading['capability']} {reading['cases'][0]}: {', '.join(failures(reading))}"
        for reading in found
        if failures(reading)
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_for_devices_that_are_not_here(capability):
    found = run(cases(capability), capability)
    assert set(BOUNDS) <= {reading["kernel"] for reading in found}
    if told(found):
        pytest.fail(told(found))


def test_one_kernel():
    (reading,) = run([Case("add_up", (2, 256, 64, 128, 19), "bf16")], 90)
    assert reading["products"] > 0
    assert not told([reading])


@pytest.mark.slow
@pytest.mark.parametrize(("height", "layout"), [(65, "channels-last"), (64, "nchw")])
def test_many_classes_are_read_in_wide_loads(height, layout):
    """Where pixels lie side by side, if their number allows it."""
    (reading,) = run([Case("add_up", (2, 256, height, 128 + height % 2, 300), "bf16", layout)], 90)
    assert set(reading["everywhere"]["load features"]) == {"128"}
    assert set(reading["everywhere"]["atomic sums"]) == {"128"}


@pytest.mark.slow
def test_spills_and_narrow_loads_are_seen():
    case = Case("add_up", (2, 256, 64, 128, 19), "bf16")
    (squeezed,) = run([case], 80, maxnreg=48)
    assert "bytes spilled" in told([squeezed])
    (cropped,) = run([case._replace(layout="crop")], 80)
    assert "features in [16] bits" in told([cropped | {"cases": [case]}])
    (large,) = run([case], 80, num_stages=12)
    assert "programs fit" in told([large])
