"""The fake devices refuse what CUDA refuses, allow what it allows, and compute what the CPU computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.fake_devices import CPU, FIRST, SECOND, DeviceTensor, fake_devices
from tests.loops import for_each

Operation = Callable[[Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def devices() -> Any:
    with fake_devices():
        yield


def vector(device: Any = "cpu") -> Tensor:
    return torch.arange(1.0, 5.0).to(device)


MIXED: dict[str, Operation] = {
    "add": lambda a, b: a + b,
    "matmul": lambda a, b: a @ b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "masked_fill": lambda a, b: a.masked_fill(b > 2, 0.0),
    "cat": lambda a, b: torch.cat([a, b]),
    "in place": lambda a, b: a.add_(b),
    "gather": lambda a, b: a.gather(0, b.long() - 1),
    "index_select": lambda a, b: a.index_select(0, b.long() - 1),
    "index_add": lambda a, b: a.index_add(0, b.long() - 1, a),
    "embedding": lambda a, b: torch.nn.functional.embedding(b.long() - 1, a[:, None]),
    "linear": lambda a, b: torch.nn.functional.linear(a, b[None]),
    "layer_norm": lambda a, b: torch.nn.functional.layer_norm(a, (4,), b),
    "isin": lambda a, b: torch.isin(a, b),
    "equal": lambda a, b: torch.equal(a, b),
    "a number in place": lambda a, b: b[0].clone().add_(a[0]),
    "stacked numbers": lambda a, b: torch.stack([a[0], b[0]]),
    "indices": lambda a, b: b[a.long() - 1],
    "put": lambda a, b: b.index_put((torch.tensor([1]),), a[:1]),
}


@for_each("other", [SECOND, CPU])
@for_each("operation", MIXED.values(), ids=MIXED)
def test_two_devices_do_not_mix(operation: Operation, other: torch.device) -> None:
    operation(vector(FIRST), vector(FIRST))
    with pytest.raises(RuntimeError, match="same device"):
        operation(vector(FIRST), vector(other))


ALLOWED: dict[str, Operation] = {
    "a number": lambda a, b: a * b[0],
    "a number first": lambda a, b: b[0] / a,
    "a number on its device": lambda a, b: a[0] + b[0],
    "indices": lambda a, b: a[b.long() - 1],
    "a mask": lambda a, b: a[b > 2],
    "put by indices": lambda a, b: a.index_put((b.long() - 1,), a),
    "copy_": lambda a, b: a.clone().copy_(b),
    "fill_": lambda a, b: a.clone().fill_(b[1]),
    "set a slice": lambda a, b: a.clone().__setitem__(slice(2), b[:2]),
    "a list of indices": lambda a, b: a[[0, 2]],
}


@for_each("operation", ALLOWED.values(), ids=ALLOWED)
def test_a_cpu_tensor_beside_a_device_is_what_torch_allows(operation: Operation) -> None:
    found, expected = operation(vector(FIRST), vector()), operation(vector(), vector())
    if found is not None:
        assert found.device == FIRST
        torch.testing.assert_close(found.cpu(), expected)


SEEN_BY_TORCH = ["add", "matmul", "where", "masked_fill", "cat", "gather", "index_select", "index_add", "linear"]


@for_each("name", SEEN_BY_TORCH)
def test_torchs_own_tensors_without_data_refuse_the_same(name: str) -> None:
    with FakeTensorMode():
        a, b = torch.empty(4, device="cuda:0"), torch.empty(4)
        assert a.device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            MIXED[name](a, b)


def test_a_generator_belongs_to_a_device() -> None:
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.multinomial(vector(FIRST), 2, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(2, device=FIRST, generator=torch.Generator())


def test_numbers_can_be_read_and_numpy_cannot() -> None:
    x = vector(SECOND)
    assert x.tolist() == [1, 2, 3, 4] and x[1].item() == 2 and float(x.sum()) == 10 and bool((x > 0).all())
    assert x.cpu().numpy().tolist() == [1, 2, 3, 4]
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()


def test_what_is_made_on_a_device_is_there() -> None:
    like = vector(SECOND)
    made = [torch.zeros(2, device="lazy:1"), torch.tensor([1, 2], device=SECOND), torch.as_tensor([1.0], device=SECOND)]
    made += [
        torch.empty_like(like),
        like.new_ones(3),
        like.to(torch.float64),
        like.clone(),
        torch.eye(2, device=SECOND),
    ]
    assert {x.device for x in made} == {SECOND}
    assert torch.zeros(2, device="lazy").device == FIRST
    assert like.to(SECOND) is like and like.to(FIRST).device == FIRST and type(like.cpu()) is Tensor


def test_moving_copies_and_views_share() -> None:
    x = vector(FIRST)
    there, view = x.to(SECOND), x[1:].view(3)
    view.mul_(10)
    assert x.tolist() == [1, 20, 30, 40] and there.tolist() == [1, 2, 3, 4]
    assert view._version == x._version


def test_gradients_cross_devices_and_are_the_cpus() -> None:
    def run(first: Any, second: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 3).to(first), torch.nn.Linear(3, 2).to(second)]
        x = vector(first).requires_grad_()
        hidden = layers[0](x).exp() * 3
        hidden[1:].mul_(2)  # in place, on a view, in the graph
        layers[1](hidden.to(second)).sum().backward()
        gradients = [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]
        assert [g.device for g in gradients if g is not None] == [torch.device(first)] * 3 + [torch.device(second)] * 2
        return [g.cpu() for g in gradients if g is not None]

    with torch.random.fork_rng():
        for found, expected in zip(run(FIRST, SECOND), run("cpu", "cpu"), strict=True):
            assert torch.equal(found, expected)


def test_a_module_moves_with_its_parameters() -> None:
    layer = torch.nn.BatchNorm1d(3).to(FIRST)
    assert isinstance(layer.weight, torch.nn.Parameter) and isinstance(layer.weight, DeviceTensor)
    assert {t.device for t in (*layer.parameters(), *layer.buffers())} == {FIRST}
