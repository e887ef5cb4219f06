"""Products whose weight gradient is late: what they make, forward and backward, is torch's own."""

import gc
import weakref

import pytest
import torch

from autotp.late import Late, addmm_late, late, linear_late, mm_late

aten = torch.ops.aten


def tensor(*shape, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=numbers).to(dtype).requires_grad_()


CALLS = {
    "linear": (linear_late, aten.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear, no bias": (linear_late, aten.linear, [(3, 4), (5, 4)]),
    "linear of a vector": (linear_late, aten.linear, [(4,), (5, 4), (5,)]),
    "addmm": (addmm_late, aten.addmm, [(5,), (3, 4), (4, 5)]),
    "addmm, whole bias": (addmm_late, aten.addmm, [(3, 5), (3, 4), (4, 5)]),
    "mm": (mm_late, aten.mm, [(3, 4), (4, 5)]),
}


def weight_of(name):
    return 2 if name.startswith("addmm") else 1


def run(name, is_late, *, twice=False, frozen=(), dtype=torch.float64, autocast=False):
    mine, theirs, shapes = CALLS[name]
    given = [tensor(*shape, dtype=dtype) for shape in shapes]
    for k in frozen:
        given[k].requires_grad_(False)
    k = weight_of(name)
    args = [late(t) if is_late and n == k else t for n, t in enumerate(given)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = (mine if is_late else theirs)(*args)
    trained = [t for t in given if t.requires_grad]
    grads = torch.autograd.grad((out.float() ** 3).sum(), trained, create_graph=twice)
    if twice:
        grads = torch.autograd.grad(sum((g**2).sum() for g in grads), trained)
    return out, grads


@pytest.mark.parametrize("twice", [False, True], ids=["once", "differentiated twice"])
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_torchs(name, twice):
    torch.testing.assert_close(run(name, True, twice=twice), run(name, False, twice=twice))


@pytest.mark.parametrize("name", ["linear", "addmm", "mm"])
def test_under_autocast_too(name):
    mine, theirs = (run(name, k, dtype=torch.float32, autocast=True) for k in (True, False))
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    assert mine[0].dtype is torch.bfloat16


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_what_is_frozen_has_no_gradient(frozen):
    torch.testing.assert_close(
        run("linear", True, frozen=frozen), run("linear", False, frozen=frozen)
    )


def test_the_weights_gradient_is_made_after_what_stands_between():
    """Called between `late` and its product, backward of an op runs before the gradient is made."""
    x, weight, order = tensor(3, 4), tensor(5, 4), []
    holder = late(weight)
    between = x * 2
    between.register_hook(lambda _: order.append("activations"))
    weight.register_hook(lambda _: order.append("weight"))
    x.register_hook(lambda _: order.append("before"))
    linear_late(between, holder).sum().backward()
    assert order == ["activations", "before", "weight"] and isinstance(holder, Late)


def test_without_gradients_it_is_the_weight():
    weight = tensor(5, 4)
    with torch.no_grad():
        assert late(weight) is weight
    assert late(weight.detach()).equal(weight)


def test_backward_may_run_twice():
    x, weight = tensor(3, 4), tensor(5, 4)
    out = linear_late(x, late(weight)).sum()
    first = torch.autograd.grad(out, [x, weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, [x, weight]), first)


def test_a_backward_that_did_not_come_to_the_weight_leaves_it_no_gradient():
    def slope(product, weight_as):
        x, weight = tensor(3, 4), tensor(5, 4)
        out = product(x, weight_as(weight))
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        (grad,) = torch.autograd.grad((out**3).sum(), weight, create_graph=True)
        return grad, *torch.autograd.grad(grad.sum(), [x, weight])

    theirs = slope(aten.linear, lambda weight: weight)
    torch.testing.assert_close(slope(linear_late, late), theirs)


def test_anomaly_detection_finds_nothing_in_a_gradient_that_is_late():
    x, weight = tensor(3, 4), tensor(5, 4)
    out = linear_late(x, late(weight)).sum()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        out.backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 4))


@pytest.mark.parametrize("goes_back", [True, False])
def test_a_step_leaves_nothing_in_memory(goes_back):
    """What a product read goes with the last that names it: Python's search for garbage is off."""
    gc.collect()
    gc.disable()
    try:
        x, weight = tensor(3, 4), tensor(5, 4) * 2
        read = weakref.ref(weight.untyped_storage()), weakref.ref(x)
        out = linear_late(x, late(weight)).sum()
        if goes_back:
            out.backward()
        del x, weight, out
        assert [ref() for ref in read] == [None, None]
    finally:
        gc.enable()
