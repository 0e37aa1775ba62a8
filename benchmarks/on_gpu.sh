#!/usr/bin/env bash
# All that needs a GPU, in one command: tests, compute-sanitizer, tables. Results go to $OUT (gpu-results if not set).
# It needs torch, triton, pytest, hypothesis and the extra `examples`; semshift is taken from this checkout.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results}
mkdir -p "$out"
export PYTHONPATH=src CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1
failed=0
step() {
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  "$@" 2>&1 | tee "$out/$name.txt" || { failed=1 && printf '== %s FAILED\n' "$name"; }
}

every_kernel='
import torch
import semshift
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape, classes in (((2, 65, 33, 65), 19), ((1, 3, 129, 127), 300), ((2, 19, 5, 7), 150)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout).requires_grad_()
            labels = torch.randint(0, classes, (shape[0], *shape[2:]), device="cuda")
            for per_image in (False, True):
                semshift.class_sums(x, labels, classes, ignore_index=0, per_image=per_image).means.sum().backward()
            x.detach()[0, 0, 0, 0] = float("inf")
            semshift.class_sums(x.detach(), labels, classes, ignore_index=0)
torch.cuda.synchronize()
'
nvidia-smi --query-gpu=name,driver_version --format=csv | tee "$out/device.txt"
python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$out/device.txt"
step tests python -m pytest -q -m "" -p no:cacheprovider tests/test_pooling_triton.py tests/test_pooling.py \
  tests/test_pooling_properties.py tests/test_labels.py
# PyTorch's caching allocator would hide reads past the end of a tensor.
step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
  python -c "$every_kernel"
step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 python -c "$every_kernel"
step pooling python benchmarks/pooling.py --device cuda --dtype float32 bfloat16 --json "$out/pooling.json"
step pooling-noise python benchmarks/pooling.py --device cuda --labels random --only hard --json "$out/pooling-noise.json"
step step python benchmarks/step.py --device cuda
exit $failed
