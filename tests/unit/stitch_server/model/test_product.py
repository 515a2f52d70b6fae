"""Both layouts of a matrix give the same product, exactly to float32's last digits, and the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stitch_server.model.product import PackedProduct, PlainProduct, Product, product


def operands(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((rows, 37), (53, 37), (53,)))  # type: ignore[return-value]


def layouts(weight: Tensor, bias: Tensor | None) -> list[Product]:
    return [product(weight, bias), PlainProduct(weight, bias)]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 33, 200])
@pytest.mark.parametrize("biased", [True, False])
def test_is_the_product(rows: int, biased: bool) -> None:
    x, weight, bias = operands(rows)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
    for multiply in layouts(weight, bias if biased else None):
        torch.testing.assert_close(multiply(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_processor_packs_float32() -> None:
    assert isinstance(product(torch.zeros(3, 2)), PackedProduct)


def test_what_cannot_be_packed_stays_plain() -> None:
    assert isinstance(product(torch.zeros(3, 2, dtype=torch.float16)), PlainProduct)


def test_takes_rows_that_lie_apart() -> None:
    x, weight, bias = operands(5)
    wide = torch.cat([x, x], dim=1)
    for multiply in layouts(weight, bias):
        torch.testing.assert_close(multiply(wide[:, :37]), multiply(x))


def test_keeps_its_own_copy_of_what_it_packs() -> None:
    x, weight, _ = operands(3)
    multiply = product(weight)
    before = multiply(x)
    weight.zero_()
    assert torch.equal(multiply(x), before)


def test_passes_gradients_on() -> None:
    x, weight, bias = operands(4)
    direction = torch.randn(4, 53)
    for multiply in layouts(weight, bias):
        leaf = x.clone().requires_grad_()
        (multiply(leaf) * direction).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, direction @ weight)


def test_works_on_what_inference_mode_made() -> None:
    x, weight, bias = operands(2)
    with torch.inference_mode():
        made = product(weight.clone(), bias.clone())(x)
    torch.testing.assert_close(made, x @ weight.T + bias)
