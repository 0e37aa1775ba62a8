"""Smoke test of an installed semshift, with its three dependencies and nothing else. Run by .ci/run."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch

import semshift

if importlib.util.find_spec("pytest") or importlib.util.find_spec("matplotlib"):
    sys.exit("expected an empty environment, got one with pytest or matplotlib")
if importlib.metadata.version("semshift") != semshift.__version__:
    sys.exit(f"expected version {semshift.__version__}, got {importlib.metadata.version('semshift')}")

features = torch.randn(2, 16, 9, 17, requires_grad=True)
labels = torch.randint(0, 5, (2, 65, 129))
align = semshift.SemanticAlignment(16, 5)
losses = align(torch.randn(2, 16, 9, 17), labels, features, labels.flip(0))
(losses.confusion + losses.discriminator).backward()
for name, grad in (("features", features.grad), *((name, each.grad) for name, each in align.named_parameters())):
    if grad is None or not grad.abs().sum() > 0:
        sys.exit(f"expected a gradient at {name}, got none")

# The program of "Write it by hand".
pooled = semshift.class_sums(features, labels, 5)
discriminator = semshift.frozen(semshift.PrototypeDiscriminator(16, 5))
semshift.confusion_loss(discriminator(pooled.means), weight=pooled.present).backward()
missing = [name for name in semshift.__all__ if not hasattr(semshift, name)]
if missing:
    sys.exit(f"expected every public name at semshift, got none for {missing}")

# Import time on top of torch's: median of five processes.
probe = "import torch, time, sys; before = set(sys.modules); t = time.perf_counter(); import semshift; "
probe += "print(time.perf_counter() - t); "
probe += "sys.exit('triton' in set(sys.modules) - before or torch.cuda.is_initialized())"
times = sorted(float(subprocess.check_output([sys.executable, "-c", probe])) for _ in range(5))
print(f"semshift {semshift.__version__}: import takes {1000 * times[2]:.0f} ms on top of torch")
if times[2] >= 0.2:
    sys.exit(f"expected the import under 0.2 s, got {times[2]:.3f} s")
