"""Use an installed semshift as a stranger would, with its three dependencies and nothing else. Run by .ci/run."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch

import semshift
from semshift.discriminators import PrototypeDiscriminator, frozen
from semshift.losses import confusion_loss
from semshift.pooling import class_sums

if importlib.util.find_spec("pytest") or importlib.util.find_spec("matplotlib"):
    sys.exit("expected an empty environment, got one with pytest or matplotlib")
if importlib.metadata.version("semshift") != semshift.__version__:
    sys.exit(f"expected version {semshift.__version__}, got {importlib.metadata.version('semshift')}")

features = torch.randn(2, 16, 9, 17, requires_grad=True)
labels = torch.randint(0, 5, (2, 65, 129))
pooled = class_sums(features, labels, 5, resample="bilinear")
confusion_loss(frozen(PrototypeDiscriminator(16, 5))(pooled.means), weight=pooled.present).backward()
if features.grad is None or not features.grad.abs().sum() > 0:
    sys.exit("expected a gradient at the features, got none")

# The import, on top of torch: median of five processes.
probe = "import torch, time, sys; before = set(sys.modules); t = time.perf_counter(); import semshift; "
probe += "print(time.perf_counter() - t); "
probe += "sys.exit('triton' in set(sys.modules) - before or torch.cuda.is_initialized())"
times = sorted(float(subprocess.check_output([sys.executable, "-c", probe])) for _ in range(5))
print(f"semshift {semshift.__version__}: import takes {1000 * times[2]:.0f} ms on top of torch")
if times[2] >= 0.2:
    sys.exit(f"expected the import under 0.2 s, got {times[2]:.3f} s")
