import dataclasses

import torch

from autotp.cost_model.cluster import bandwidth_bound
from autotp.cost_model.memory import ADAMW_STATES, Held, parameter_state_bytes, rank_memory


def test_training_in_float32_takes_sixteen_bytes_a_parameter():
    assert parameter_state_bytes(Held(10, "float32")) == 160
    assert parameter_state_bytes(Held(10, "bfloat16", trained=False)) == 20


def test_adamw_keeps_two_states_of_its_parameter():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    states = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
    assert len(states) == ADAMW_STATES and {v.dtype for v in states} == {weight.dtype}


def test_a_rank_holds_parameters_gradients_states_and_activations():
    parameters = [Held(100, "float32"), Held(50, "float32", trained=False)]
    memory = rank_memory(parameters, [Held(10, "bfloat16")])
    assert dataclasses.astuple(memory) == (600, 400, 800, 20)
    assert memory.total_bytes == 1820 == sum(map(parameter_state_bytes, parameters)) + 20
    assert memory.fits(bandwidth_bound(memory_bytes=1820))
    assert not memory.fits(bandwidth_bound(memory_bytes=1819))
