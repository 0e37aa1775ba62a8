"""Check that a wheel is pure Python, under 150 kB, and contains only the package. Run by .ci/run."""

import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
names = zipfile.ZipFile(wheel).namelist()
strangers = [name for name in names if name.split("/")[0] != "semshift" and ".dist-info/" not in name]
compiled = [name for name in names if name.endswith((".so", ".pyd", ".dll"))]
if strangers or compiled:
    sys.exit(f"expected semshift's own Python files in {wheel.name}, got {strangers + compiled}")
if "semshift/py.typed" not in names or not any(name.endswith("licenses/LICENSE") for name in names):
    sys.exit(f"expected py.typed and LICENSE in {wheel.name}, got {names}")
if wheel.stat().st_size > 150_000:
    sys.exit(f"expected {wheel.name} under 150 kB, got {wheel.stat().st_size}")
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size} bytes")
