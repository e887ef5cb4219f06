"""What a user keeps: names, ties, buffers, attributes, modes, checkpoints, copies of a model."""

import copy
import pickle
import tempfile

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.errors import CaptureError, InputError, PinError, PlanError, RuntimeStateError
from autotp.layouts import Shard
from autotp.ranks import checksum, refuse_disagreement
from tests.end_to_end.models import (
    CLUSTER,
    VOCAB,
    Mlp,
    assert_near,
    gpt2,
    gradients,
    llama,
    loss_of,
    tokens,
)
from tests.end_to_end.on_ranks import on_ranks

SPLIT_FC1 = {"fc1": {"col": "o"}, "fc1.weight": {"col": "S(0)"}}


def batch():
    return {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}


def pair(make, grid, inputs, **options):
    """Return a copy of a model, and the model made parallel."""
    model = make().train()
    one = copy.deepcopy(model)
    return one, autotp.parallelize(model, grid, inputs, cluster=CLUSTER, **options)


def backward(model, inputs, call=None):
    model.zero_grad()
    loss = loss_of((model if call is None else call)(**inputs))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


# The module --------------------------------------------------------------------------------------


@on_ranks((1, 2))
def test_names_ties_buffers_and_attributes_stay(grid):
    model = gpt2()
    model.note = "mine"
    model.transformer.wte.weight.group = "embeddings"
    model.transformer.ln_f.bias.requires_grad_(False)
    inputs = tokens()
    one, ours = pair(lambda: model, grid, inputs)
    assert isinstance(ours, type(one)) and ours.note == "mine" and ours.config is not None
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(ours, names)()] == [n for n, _ in getattr(one, names)()]
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert ours.transformer.wte.weight.group == "embeddings"
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in one.parameters()
    ]
    assert all(isinstance(p, DTensor) and p.is_leaf for p in ours.parameters())
    assert_near(backward(ours, inputs), backward(one, inputs))


class Twice(nn.Module):
    """One layer under two paths, as in ALBERT."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer, layer])

    def forward(self, x, target):
        for layer in self.layers:
            x = layer(x).tanh()
        return nn.functional.mse_loss(x, target)


@on_ranks((1, 2), (2, 2))
def test_a_layer_under_two_paths_stays_one(grid):
    inputs = batch()
    one, ours = pair(Twice, grid, inputs)
    assert_near(backward(ours, inputs), backward(one, inputs))
    assert ours.layers[0].weight is ours.layers[1].weight
    assert set(autotp.full_state_dict(ours)) == set(one.state_dict())


@on_ranks((1, 2), (2, 2))
def test_buffers_follow_and_frozen_parameters_stay(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, inputs)
    for _ in range(2):
        assert_near(backward(ours, inputs), backward(one, inputs))
    assert ours.calls == 2 and ours.scale.grad is None
    assert_near(dict(ours.named_buffers()), dict(one.named_buffers()))
    assert set(ours.state_dict()) == set(one.state_dict())


@on_ranks((1, 2), (2, 2))
def test_evaluation_is_planned_at_its_first_call(grid):
    inputs = tokens()
    one, ours = pair(lambda: gpt2(dropout=0.5), grid, inputs)
    one.eval()
    ours.eval()
    with torch.inference_mode():
        assert_near({"logits": ours(**inputs).logits}, {"logits": one(**inputs).logits})
    assert (
        not ours.plan.train
        and ours.plan.params
        == next(c.plan for c in ours._autotp.modes.values() if c.plan.train).params
    )
    assert_near(backward(ours, inputs), backward(one, inputs))
    ours.train()
    assert ours.plan.train


@on_ranks((1, 2))
def test_first_call_without_gradients_plans_for_gradients(grid):
    inputs = tokens()
    one, ours = pair(gpt2, grid, None)
    with torch.no_grad():
        assert_near({"loss": ours(**inputs).loss}, {"loss": one(**inputs).loss})
    assert_near(backward(ours, inputs), backward(one, inputs))


@on_ranks((1, 2))
def test_an_unfrozen_parameter_is_planned_again(grid):
    inputs = tokens()
    model = llama()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    one, ours = pair(lambda: model, grid, inputs)
    assert_near(backward(ours, inputs), backward(one, inputs))
    ours.requires_grad_(True)
    one.requires_grad_(True)
    assert_near(backward(ours, inputs), backward(one, inputs))


@on_ranks((1, 2))
def test_another_dtype_is_planned_again(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, inputs)
    one.double()
    ours.double()
    inputs = {name: x.double() for name, x in inputs.items()}
    assert_near(backward(ours, inputs), backward(one, inputs), bound=1e-12)
    assert ours.fc1.weight.dtype == torch.float64


@on_ranks((1, 2))
def test_a_copy_is_its_own_model(grid):
    inputs = tokens()
    one, ours = pair(gpt2, grid, inputs)
    twin = copy.deepcopy(ours)
    assert twin.lm_head.weight is twin.transformer.wte.weight is not ours.lm_head.weight
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert_near(backward(twin, inputs), backward(one, inputs))
    assert next(ours.parameters()).grad is None
    with pytest.raises(RuntimeStateError, match="full_state_dict"):
        pickle.dumps(ours)


@on_ranks((1, 2))
def test_checkpointing_around_the_model_recomputes_the_same_masks(grid):
    inputs = tokens()
    _, ours = pair(lambda: gpt2(dropout=0.3), grid, inputs)
    torch.manual_seed(7)
    expected = backward(ours, inputs)
    ours.zero_grad()
    torch.manual_seed(7)
    loss = checkpoint(lambda ids: ours(input_ids=ids, labels=ids).loss, inputs["input_ids"],
                      use_reentrant=False)  # fmt: skip
    loss.backward()
    assert_near({"loss": loss.detach(), **gradients(ours)}, expected, bound=0)


@on_ranks((1, 2), (2, 2))
def test_sharded_outputs_are_dtensors(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, {"x": inputs["x"]}, outputs="sharded", pins={"fc2": {"col": "o"}})
    mine, theirs = ours(inputs["x"]), one(inputs["x"])
    assert isinstance(mine, DTensor) and mine.shape == theirs.shape
    assert any(p.is_shard() for p in mine.placements)
    (mine**2).sum().backward()
    (theirs**2).sum().backward()
    assert_near({"y": mine.full_tensor().detach(), **gradients(ours)},
                {"y": theirs.detach(), **gradients(one)})  # fmt: skip
    assert ours.calls == 1 and not isinstance(ours.calls, DTensor)


class Centred(Mlp):
    """Keep a running mean of what a split layer makes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        hidden = self.fc1(x)
        self.mean.mul_(0.9).add_(0.1 * hidden.mean(0).detach())
        return self.fc2(torch.relu(hidden - self.mean))


@on_ranks((1, 2))
def test_buffers_are_whole_where_outputs_are_sharded(grid):
    x = batch()["x"]
    pins = {"fc1": {"col": "o"}}
    one, ours = pair(Centred, grid, {"x": x}, outputs="sharded", pins=pins)
    ours(x)
    one(x)
    assert_near({"mean": ours.mean}, {"mean": one.mean})


@on_ranks((1, 2))
def test_compiled_models_run_the_emitted_graph(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, inputs)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, backend=backend)
    for _ in range(2):
        assert_near(backward(ours, inputs, compiled), backward(one, inputs))
    assert len(graphs) == 1


@on_ranks((1, 2))
def test_hooks_of_parameters_see_dtensors(grid):
    model, seen = Mlp(), []
    model.fc1.weight.register_hook(seen.append)
    model.fc1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    autotp.parallelize(model, grid, batch(), cluster=CLUSTER)
    backward(model, batch())
    assert [type(g) for g in seen] == [DTensor, DTensor]


@on_ranks((1, 2))
def test_gradients_accumulate(grid):
    inputs = tokens()
    one, ours = pair(gpt2, grid, inputs)
    for model in (one, ours):
        for _ in range(2):
            model(**inputs).loss.backward()
    assert_near(gradients(ours), gradients(one))


# State -------------------------------------------------------------------------------------------


@on_ranks((1, 2), (2, 2), (1, 4), (4, 1))
def test_full_state_dict_returns_what_load_state_dict_took(grid):
    other = gpt2().state_dict()
    split = {"row": "S(0)"} if grid[1] == 1 else {"col": "S(0)"}
    pins = {"transformer.wte.weight": split}  # 65 rows: uneven
    one, ours = pair(gpt2, grid, tokens(), pins=pins)
    placements = {n: p.placements for n, p in ours.named_parameters()}
    assert any(isinstance(p, _StridedShard) for found in placements.values() for p in found)
    assert any(isinstance(t, Shard) for t in ours.plan.params["transformer.wte.weight"].layout)
    rows = ours.transformer.wte.weight.to_local().shape[0]
    assert rows in {-(-VOCAB // max(grid)), VOCAB - (max(grid) - 1) * -(-VOCAB // max(grid))} or (
        grid == (2, 2)
    )
    assert_near(autotp.full_state_dict(ours), one.state_dict(), bound=0)
    assert not ours.load_state_dict(other).missing_keys
    assert_near(autotp.full_state_dict(ours), other, bound=0)
    ours.load_state_dict(ours.state_dict())
    assert_near(autotp.full_state_dict(ours), other, bound=0)


@on_ranks((1, 2))
def test_load_state_dict_refuses_what_does_not_fit(grid):
    one, ours = pair(Mlp, grid, batch())
    whole = one.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        ours.load_state_dict({**whole, "fc1.weight": torch.zeros(3, 8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"fc1.bias": whole["fc1.bias"]})
    with pytest.raises(RuntimeStateError, match="assign=False"):
        ours.load_state_dict(whole, assign=True)


@on_ranks((1, 2), (2, 2))
def test_optimizer_state_is_saved_and_loaded(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, inputs)
    states = []
    for model in (one, ours):
        first, second = (torch.optim.AdamW(model.parameters(), eps=1e-3) for _ in range(2))
        backward(model, inputs)
        first.step()
        second.load_state_dict(first.state_dict())
        backward(model, inputs)
        second.step()
        moments = [second.state[p]["exp_avg_sq"] for p in model.parameters() if p.requires_grad]
        states.append({str(n): getattr(m, "full_tensor", lambda m=m: m)()
                       for n, m in enumerate(moments)})  # fmt: skip
    assert_near(states[1], states[0])
    assert_near(autotp.full_state_dict(ours), one.state_dict())


@on_ranks((1, 2))
def test_an_optimizer_built_too_early_is_repaired(grid):
    inputs = batch()
    one = Mlp()
    ours = copy.deepcopy(one)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (one, ours)]
    autotp.parallelize(ours, grid, cluster=CLUSTER)
    with pytest.raises(RuntimeStateError, match="first call"):
        _ = ours.plan
    for _ in range(2):
        for model, optimizer in zip((one, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(**inputs)).backward()
            optimizer.step()
    assert_near(autotp.full_state_dict(ours), one.state_dict())


@on_ranks((1, 2))
def test_an_optimizer_that_has_stepped_is_refused(grid):
    inputs = batch()
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model(**inputs)).backward()
    optimizer.step()
    autotp.parallelize(model, grid, inputs, cluster=CLUSTER)
    loss_of(model(**inputs)).backward()
    with pytest.raises(RuntimeStateError, match=r"after autotp\.parallelize"):
        optimizer.step()


# Plans, pins and grids ---------------------------------------------------------------------------


@on_ranks((1, 2), (2, 2))
def test_a_saved_plan_is_followed(grid):
    inputs = batch()
    model = Mlp()
    planned = autotp.plan(model, grid, inputs, cluster=CLUSTER, pins=SPLIT_FC1)
    assert planned["fc1"].factors["col"] == "o"
    with tempfile.TemporaryDirectory() as folder:
        planned.save(f"{folder}/plan.json")
        loaded = autotp.Plan.load(f"{folder}/plan.json")
    one, ours = pair(lambda: model, grid, inputs, plan=loaded)
    assert ours.plan == planned
    assert_near(backward(ours, inputs), backward(one, inputs))
    ours.eval()
    ours(**inputs)
    assert ours.plan.params == planned.params
    with pytest.raises(PlanError, match=r"fc1\.weight"):
        autotp.parallelize(Mlp(width=16), grid, inputs, plan=loaded)


@on_ranks((1, 2))
def test_pins_are_kept_and_misfits_named(grid):
    inputs = batch()
    one, ours = pair(Mlp, grid, inputs, pins=SPLIT_FC1)
    assert ours.plan["fc1"].factors == {"col": "o"}
    assert ours.fc1.weight.placements[1].is_shard(0)
    assert_near(backward(ours, inputs), backward(one, inputs))
    with pytest.raises(PinError, match=r"^PinError: (?!PinError)(.|\n)*fc9"):
        autotp.parallelize(Mlp(), grid, inputs, cluster=CLUSTER, pins={"fc9": {"col": "o"}})


@on_ranks((2, 2))
def test_grids_may_be_named_or_meshes(grid):
    inputs = batch()
    ranks = torch.arange(4).reshape(2, 2).T  # rank 1 stands below rank 0
    grids = [
        {"dp": 2, "tp": 2},
        init_device_mesh("cpu", grid, mesh_dim_names=("dp", "tp")),
        DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "tp")),
        DeviceMesh("cpu", ranks),
        (4,),
        (2, 1, 2),
    ]
    for chosen in grids:
        one, ours = pair(Mlp, chosen, inputs)
        assert_near(backward(ours, inputs), backward(one, inputs))
        assert_near(autotp.full_state_dict(ours), one.state_dict(), bound=0)


# Refusals ----------------------------------------------------------------------------------------


@on_ranks((1, 2))
def test_other_inputs_are_refused_by_name(grid):
    inputs = batch()
    _, ours = pair(Mlp, grid, inputs)
    x, target = inputs.values()
    for wrong, named in [
        ({"x": x[:4], "target": target}, r"x +float32\[4, 8\], planned float32\[8, 8\]"),
        ({"x": x.double(), "target": target}, r"x +float64"),
        ({"x": x}, r"target +absent, planned"),
        ({"x": x, "target": [target]}, r"target\[0\]"),
        ({"x": x, "mask": x}, "cannot be called so"),
    ]:
        with pytest.raises(InputError, match=named):
            ours(**wrong)


@on_ranks((1, 2))
def test_other_world_sizes_are_refused_with_the_legal_grids(grid):
    with pytest.raises(autotp.AutotpError, match=r"\(1, 2\), \(2, 1\)"):
        autotp.parallelize(Mlp(), (2, 2), batch())


@on_ranks((1, 2), (2, 2))
def test_ranks_that_disagree_are_named(grid):
    rank = torch.distributed.get_rank()
    inputs = batch()
    shared = Mlp()

    def refused(what, model, inputs, **options):
        with pytest.raises(RuntimeStateError, match=rf"different {what}\n  at +rank 1 "):
            ours = autotp.parallelize(
                copy.deepcopy(model), grid, inputs, cluster=CLUSTER, **options
            )
            ours(**inputs)

    refused("models", Mlp(width=32 + 8 * (rank == 1)), inputs)
    refused("models", Squared() if rank == 1 else shared, inputs)
    pins = SPLIT_FC1 if rank == 1 else {"fc1": {"col": "R"}, "fc2": {"col": "R"}}
    refused("plans", shared, inputs, plan=autotp.plan(shared, grid, inputs, pins=pins))
    torch.manual_seed(rank)
    refused("weights", Mlp(), inputs)
    refused("inputs", shared, {**inputs, "x": torch.randn(8, 8)})


class Squared(Mlp):
    def forward(self, x, target=None):
        return super().forward(x, target) ** 2


class Stuck(Mlp):
    def forward(self, x, target=None):
        return super().forward(x, target) if x.sum() > 0 else x


@on_ranks((1, 2))
def test_a_failure_of_one_rank_stops_all(grid):
    model = Stuck() if torch.distributed.get_rank() == 1 else Mlp()
    with pytest.raises(CaptureError):
        autotp.parallelize(model, grid, batch())


def test_a_process_alone_is_told_how_to_start():
    with pytest.raises(RuntimeStateError, match="torchrun --nproc-per-node=4"):
        autotp.parallelize(Mlp(), (2, 2), batch())


@on_ranks((1, 2))
def test_a_parallel_model_is_not_made_parallel_again(grid):
    _, ours = pair(Mlp, grid, batch())
    with pytest.raises(autotp.AutotpError, match="parallel already"):
        autotp.parallelize(ours, grid, batch())


@on_ranks((1, 2))
def test_a_replaced_parameter_is_refused(grid):
    _, ours = pair(Mlp, grid, batch())
    ours.fc1.weight = nn.Parameter(torch.zeros(32, 8))
    with pytest.raises(RuntimeStateError, match=r"fc1\.weight"):
        ours(**batch())


# Dropout -----------------------------------------------------------------------------------------


@on_ranks((2, 2))
def test_dropout_trains_reproducibly_from_the_seed(grid):
    inputs = tokens()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        _, ours = pair(lambda: gpt2(dropout=0.1), grid, inputs)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
        torch.manual_seed(seed)
        steps = []
        for _ in range(3):
            loss = backward(ours, inputs)["loss"]
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
        agreed = {n: checksum(v) for n, v in autotp.full_state_dict(ours).items()}
        refuse_disagreement("replicas", agreed, "none: masks differ where tensors are whole")
    assert losses[0] == losses[1] != losses[2]
    ours.eval()
    assert ours(**inputs).loss == ours(**inputs).loss


class Dropped(nn.Module):
    """Dropout of a product, so that its mask can be read from the output."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.fc(x) * 0 + 1)


@on_ranks((2, 2))
def test_masks_are_equal_on_replicas_and_new_in_every_block_and_step(grid):
    x = torch.ones(64, 64)
    split = {"fc": {"row": "b", "col": "o"}, "drop.dropout": {"row": "b", "col": "o"}}
    whole = {"fc": {"row": "I", "col": "I"}, "drop.dropout": {"row": "I", "col": "I"}}
    for pins, blocks in ((split, 4), (whole, 1)):
        torch.manual_seed(0)
        ours = autotp.parallelize(Dropped(), grid, (x,), cluster=CLUSTER, pins=pins)
        torch.manual_seed(torch.distributed.get_rank())  # only rank 0's seed is read
        first, second = ours(x).detach(), ours(x).detach()
        everyone = [torch.empty_like(first) for _ in range(4)]
        torch.distributed.all_gather(everyone, first)
        assert all(torch.equal(e, first) for e in everyone)
        assert not torch.equal(first, second)
        assert 0.4 < (first == 0).float().mean() < 0.6
        assert len(ours.plan["drop.dropout"].factors) == (2 if blocks == 4 else 0)
        quarters = [q for half in first.chunk(2, 0) for q in half.chunk(2, 1)]
        assert len({bytes(q.contiguous().numpy()) for q in quarters}) == 4
