"""The state of a parameter: one attribute, read and written by its accessors alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from internlm.core.parallel import ParamPlacement, place
from internlm.core.parallel.param_state import (
    add_grad,
    add_weight_grad,
    attach_main_grad,
    complete_main_grad,
    compute_dtype,
    has_placement,
    main_grad_of,
    mark_stale,
    named_parameters,
    set_compute_dtype,
    set_wait_for_all_gather,
    wait_for_all_gather,
)
from internlm.core.parallel.placement import constant

PLACEMENT = ParamPlacement((2, 3), constant(0.0))


def test_a_parameter_carries_one_attribute() -> None:
    parameter = place(PLACEMENT)
    attach_main_grad(parameter, torch.zeros(2, 3))
    set_compute_dtype(parameter, torch.bfloat16)
    set_wait_for_all_gather(parameter, lambda: None)
    assert set(vars(parameter)) == {"param_state"}


def test_reading_attaches_nothing_to_a_temporary() -> None:
    tensor = torch.zeros(2)
    assert main_grad_of(tensor) is None
    assert wait_for_all_gather(tensor) is tensor
    assert compute_dtype(tensor) == torch.float32
    assert not has_placement(tensor)
    assert vars(tensor) == {}


def test_states_of_two_parameters_are_their_own() -> None:
    one, other = place(PLACEMENT), place(PLACEMENT)
    set_compute_dtype(one, torch.bfloat16)
    assert compute_dtype(one) == torch.bfloat16
    assert compute_dtype(other) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_our_layers_and_of_autograd_are_both_announced(dtype: torch.dtype) -> None:
    """Once each, after the main gradient has grown."""
    (named,) = named_parameters(nn.ParameterDict({"w": place(PLACEMENT)}))
    parameter, seen = named.parameter, list[float]()
    main_grad = torch.zeros(2, 3, dtype=dtype)
    attach_main_grad(parameter, main_grad)
    named.state.on_grad_ready = lambda: seen.append(main_grad.sum().item())
    assert add_grad(parameter, torch.ones(2, 3)) is None
    parameter.sum().backward()
    assert seen == [6.0, 12.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_autograd", [True, False])
def test_the_first_gradient_of_a_step_overwrites_that_of_the_last(dtype: torch.dtype, by_autograd: bool) -> None:
    parameter, main_grad = place(PLACEMENT), torch.full((2, 3), torch.nan, dtype=dtype)
    attach_main_grad(parameter, main_grad)
    stale = mark_stale([parameter])
    assert parameter.grad is None
    for count in (1.0, 2.0):
        if by_autograd:
            parameter.sum().backward()
        else:
            add_grad(parameter, torch.ones(2, 3))
        assert main_grad.eq(count).all()
        assert stale == set()
        assert parameter.grad is (main_grad if dtype == torch.float32 else None)


def test_the_first_weight_gradient_of_a_step_overwrites_that_of_the_last() -> None:
    parameter, main_grad = place(PLACEMENT), torch.full((2, 3), torch.nan)
    attach_main_grad(parameter, main_grad)
    mark_stale([parameter])
    for count in (4.0, 8.0):
        add_weight_grad(parameter, torch.ones(4, 2), torch.ones(4, 3))
        assert main_grad.eq(count).all()


@pytest.mark.parametrize("assigned", [False, True])
def test_without_a_gradient_the_main_gradient_is_what_a_script_assigned_or_zero(assigned: bool) -> None:
    parameter, other = place(PLACEMENT), place(PLACEMENT)
    for each in (parameter, other):
        attach_main_grad(each, torch.full((2, 3), torch.nan))
    mark_stale([parameter, other])
    add_grad(other, torch.ones(2, 3))
    if assigned:
        parameter.grad = torch.full((2, 3), 3.0)
    for each in (parameter, other):
        complete_main_grad(each)
    assert main_grad_of(parameter).eq(3.0 if assigned else 0.0).all()
    assert main_grad_of(other).eq(1.0).all()
    assert parameter.grad is main_grad_of(parameter)


def test_waiting_calls_what_was_set() -> None:
    parameter, calls = place(PLACEMENT), list[str]()
    set_wait_for_all_gather(parameter, lambda: calls.append("waited"))
    assert wait_for_all_gather(parameter) is parameter
    assert calls == ["waited"]


def test_named_parameters_list_a_tied_one_once_in_the_order_of_the_model() -> None:
    first, second = place(PLACEMENT), place(PLACEMENT)
    set_compute_dtype(second, torch.bfloat16)
    named = named_parameters(nn.ParameterDict({"a": first, "b": second, "tied": first}))
    assert [(each.name, each.position) for each in named] == [("a", 0), ("b", 1)]
    assert named[0].placement is PLACEMENT
    assert [each.compute_dtype for each in named] == [torch.float32, torch.bfloat16]
