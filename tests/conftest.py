"""Settings of the whole suite: deterministic algorithms, which also fill fresh memory with NaN, and hypothesis."""

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # The kernels run on the CPU then. Triton reads this as it is imported, which torch.compile does as well.
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("semshift", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("semshift")


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=["few", "many"])
def few_or_many(request):
    """Features so small that autograd sees every step of pooling, and the same ones through the op."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many":
            patch.setattr("semshift._pooling_ops._SMALL", 0)
        yield


@pytest.fixture(scope="module")
def multiples_are_checked():
    """Kernels declare multiples to the compiler, for wide loads; the interpreter ignores these declarations."""
    handle = pytest.importorskip("triton.runtime.interpreter", reason="because it needs Triton").TensorHandle
    set_attr = handle.set_attr

    def check(self, key, value):
        assert key != "tt.divisibility" or not (self.data % value).any(), f"{self.data} told to be multiples of {value}"
        return set_attr(self, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handle, "set_attr", check)
        yield
