import pytest
import torch
from torch.nn import functional as F

from examples.workbench.networks.depthwise import depthwise


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (5, 1, 2, 1),
        (7, 1, 3, 1),
        (5, 1, 0, 1),
        (3, 2, 0, 1),
        (5, 2, 2, 1),
        (3, 1, 2, 2),
        (5, 1, 4, 2),
        (3, 1, 3, 3),
    ],
)
@pytest.mark.parametrize("size", [(8, 10), (9, 7)])
def test_gradient_is_that_of_conv2d(
    kernel: int, stride: int, padding: int, dilation: int, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, *size), (4, 1, kernel, kernel), (4,)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = F.conv2d(*given, stride, padding, dilation, 4)
    output = depthwise(*given, stride=stride, padding=padding, dilation=dilation)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    above = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(output, given, above), torch.autograd.grad(expected, given, above))


def test_autocast_computes_in_bfloat16() -> None:
    x, weight, bias = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 5, 5, requires_grad=True), torch.zeros(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = depthwise(x, weight, bias, padding=2), F.conv2d(x, weight, bias, padding=2, groups=4)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    gradient = torch.autograd.grad(output.float().sum(), weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.float().sum(), weight)[0], rtol=0.02, atol=0.1)
    assert gradient.dtype == torch.float32
