"""Every published scheme is a set of pins: the same compiler emits it, and it computes the same."""

import functools
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autotp
from autotp import schemes
from autotp.cost_model.cluster import bandwidth_bound, by_name
from autotp.errors import PinError
from autotp.grid import as_grid
from autotp.passes import found
from autotp.passes.capture.model import capture
from autotp.passes.emit.verify import verify
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import search_plan
from autotp.simulate import run_grid
from tests.blocks import Blocks

GRIDS = [(2, 2), (1, 4)]
FAST = bandwidth_bound(flops_per_s=1e12)
CLUSTERS = [FAST, *map(by_name, ("gloo_loopback", "dgx_a100", "dgx_h100"))]


def gpt2():
    config = GPT2Config(
        vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, use_cache=False,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Case:
    """A model captured once, with its loss and gradients on one device, in float64."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model.double().train(), inputs
        self.program = capture(model, (), inputs, train=True)
        self.network = read_network(self.program)
        self.factors = infer_factors(self.network, self.program.inputs)

    def plan(self, grid, cluster=FAST, scheme=None):
        given = (self.program, self.network, self.factors, as_grid(grid))
        pins = schemes.pins_of(schemes.SCHEMES[scheme], *given) if scheme else None
        return search_plan(*given, cluster, pins).plan

    def run(self, plan):
        model = self.model
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        values = self.program.flatten_inputs((), self.inputs)
        return run_grid(self.program, self.network, plan, state, values)

    @functools.cached_property
    def loss(self):
        loss = self.model(**self.inputs).loss
        loss.backward()
        return loss.item()


@functools.cache
def case(name):
    torch.manual_seed(0)
    tokens = torch.randint(65, (4, 16))
    return Case({"gpt2": gpt2, "llama": llama}[name](), dict(input_ids=tokens, labels=tokens))


@functools.cache
def layers(batch, seq, hidden):
    """Two layers on the meta device, of any size."""
    with torch.device("meta"):
        tokens = torch.zeros(batch, seq, dtype=torch.long)
        return Case(Blocks(2, hidden).float(), dict(tokens=tokens))


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_scheme_computes_what_one_device_does_and_sends_what_its_plan_says(name, grid, scheme):
    given = case(name)
    plan = given.plan(grid, scheme=scheme)
    run = given.run(plan)
    for rank in run.ranks:
        verify(rank.module, given.network, given.factors, as_grid(grid))
        assert rank.outputs[0].item() == pytest.approx(given.loss, rel=1e-6)  # logits are float32
    assert run.ranks[0].sent == {k: n for k, n in plan.sent().items() if n}
    assert sum(run.ranks[0].sent.values()) == plan.comm_bytes > 0
    for fqn, param in given.model.named_parameters():
        atol = 1e-6 * max(param.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(run.gradients[fqn], param.grad, rtol=0, atol=atol)


def test_megatron_splits_columns_then_rows_and_all_reduces_twice_a_layer():
    plan = case("gpt2").plan((1, 4), scheme="megatron")
    block = "transformer.h.1."
    for name, factor in dict(c_attn="o", c_proj="i").items():
        assert plan[f"{block}attn.{name}"].factors == {"col": factor}
    for name, factor in dict(c_fc="o", c_proj="i").items():
        assert plan[f"{block}mlp.{name}"].factors == {"col": factor}
    assert plan.collectives().count("all_reduce") == 2 * 2 + 1  # and the embedding's


def test_data_parallel_all_reduces_every_parameter_once():
    given = case("llama")
    plan = given.plan((1, 4), scheme="data_parallel")
    sizes = sum(p.numel() for p in given.model.parameters()) * 8
    loss = 4 + 8  # its mean in float32, and how many labels count in int64
    assert plan.sent()["all_reduce", "col"] == 2 * (sizes + loss) * 3 / 4


def test_fsdp_rests_a_quarter_of_every_weight():
    plan = case("llama").plan((2, 2), scheme="fsdp")
    assert all(str(t).startswith("S") for r in plan.params.values() for t in r.layout)


def test_pins_are_written_by_pattern_and_go_to_the_public_calls():
    model, inputs = gpt2(), dict(input_ids=torch.zeros(4, 16, dtype=torch.long))
    pins = schemes.megatron_sp(model, (1, 4), inputs)
    assert pins["transformer.h.*.attn.c_attn"] == {"col": "o"}
    assert pins["transformer.h.*.mlp.c_proj.weight"] == {"col": "S(0)"}
    assert pins["transformer.h.*.ln_1"] == {"col": "s"}
    plan = autotp.plan(model, (1, 4), inputs, pins=pins, cluster=FAST)
    assert plan["transformer.h.0.ln_2"].factors == {"col": "s"}


def test_a_scheme_that_does_not_fit_names_the_op():
    with pytest.raises(PinError, match="attn"):
        case("gpt2").plan((1, 8), scheme="megatron")  # four heads


def test_columns_and_rows_alternate_without_residual_sums():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    pins = schemes.megatron(mlp, (4,), (torch.zeros(4, 8),))
    assert (pins["0"], pins["2"]) == ({"col": "o"}, {"col": "i"})


def test_unpinned_search_finds_columns_and_rows_where_weights_are_heavy():
    plan = layers(8, 64, 1280).plan((1, 4))
    assert plan["layers.0.fc1"].factors == {"col": "o"}
    assert plan["layers.0.fc2"].factors == {"col": "i"}
    assert plan.comm_bytes <= layers(8, 64, 1280).plan((1, 4), scheme="megatron").comm_bytes


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: c.name)
@pytest.mark.parametrize("shape", [(8, 64, 1280), (32, 512, 320)], ids=["weights", "activations"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_scheme_that_fits_is_cheaper_than_the_plan(grid, shape, cluster):
    free = layers(*shape).plan(grid, cluster)
    for scheme in schemes.SCHEMES:
        pinned = layers(*shape).plan(grid, cluster, scheme)
        assert free.step_time_s <= pinned.step_time_s * (1 + 1e-9), scheme


@pytest.mark.parametrize("overlap", [0.0, 0.36])
def test_what_plans_pay_leads_to_a_faster_one(overlap, monkeypatch):
    """Shared calls are cheap together: neither calls apart nor the least says how cheap."""
    cluster = replace(bandwidth_bound(1e9, latency_s=1e-3, flops_per_s=4e10), overlap=overlap)
    case = layers(8, 128, 512)
    best = case.plan((2, 2), cluster)
    monkeypatch.setattr(found, "_as_paid", lambda tried: [])
    first = case.plan((2, 2), cluster)
    assert best.step_time_s < 0.995 * first.step_time_s
    assert best.lower_bound_s == first.lower_bound_s


class Idle(torch.nn.Module):
    """Calls a layer whose result nobody reads."""

    def __init__(self):
        super().__init__()
        self.a, self.idle, self.b = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = self.a(x)
        self.idle(y)
        return self.b(y.relu()).square().mean()


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_a_parameter_that_nobody_needs_is_left_alone(scheme):
    cluster = replace(bandwidth_bound(1e9, latency_s=2e-7, flops_per_s=1e10), overlap=0.5)
    model, x = Idle().double(), torch.randn(8, 16).double()
    pins = schemes.scheme_pins(scheme, model, (2, 2), (x,))
    report = autotp.check(model, (2, 2), (x,), cluster=cluster, pins=pins)
    assert report.ok, report
