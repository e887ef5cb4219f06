"""A dry run is the program of a real rank, but for what is sent; what it cannot be is refused."""

import json

import pytest
import torch
from torch import nn

import autotp
from autotp.axis import run_ranks
from autotp.cli import main
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import AutotpError, GridError, PlanError
from autotp.grid import as_grid
from autotp.live_bytes import LiveBytes
from autotp.options import Options
from autotp.passes.planning import search_plan
from autotp.rank_program import alone, peak
from autotp.reading import inferred
from autotp.silent_axis import CopyClock, SilentAxis, silent_axes
from autotp.stand_ins import index_bounds
from tests.end_to_end.models import CLUSTER, Mlp, gpt2, llama, tokens
from tests.models import mlp, nanogpt

CPU = torch.device("cpu")
SQUARE = as_grid((2, 2))


def planned(model, inputs, grid=SQUARE):
    found = inferred(model, (), inputs, Options())
    return found, search_plan(*found, grid, CLUSTER).plan


def ready(found, plan, rank, axes, model, inputs):
    values = found[0].flatten_inputs((), inputs)
    coords = plan.grid.coords(rank)
    made = alone(found, plan, coords, axes, dict(model.named_buffers()), values, CPU)
    made.step()
    return made


@pytest.mark.parametrize("build", (gpt2, llama))
def test_the_rank_program_is_the_real_one(build):
    """Against ranks that do send, as threads: shapes and flops alike, memory within 10%.

    Threads hold more for a moment: they stack what the ranks of an axis bring.
    """
    model, inputs = build().train(), tokens()
    found, plan = planned(model, inputs)
    assert plan.comm_bytes

    def real(rank, axes):
        made = ready(found, plan, rank, axes, model, inputs)
        return {n: p.shape for n, p in made.params.items()}, made.at_rest, *peak(made)

    for rank, (shapes, rest, peak_bytes, flops) in enumerate(run_ranks(SQUARE, real)):
        axes = silent_axes(SQUARE, SQUARE.coords(rank), CopyClock(CPU))
        made = ready(found, plan, rank, axes, model, inputs)
        dry_peak, dry_flops = peak(made)
        assert {n: p.shape for n, p in made.params.items()} == shapes
        assert made.at_rest == rest and dry_flops == flops > 0
        assert 0.9 * peak_bytes <= dry_peak <= peak_bytes
        assert all(bool(p.isfinite().all()) for p in made.params.values())


def test_the_whole_model_is_never_allocated():
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))), torch.ones(64, 512)
    whole = sum(p.nbytes for p in model.parameters())
    pins = {"*": {"col": "i"}}
    with LiveBytes() as live:
        found = autotp.dryrun(model, (64,), (x,), rank=63, pins=pins, cluster=CLUSTER, steps=1)
    assert live.peak < whole / 4
    assert found.measured.at_rest_bytes < whole / 8  # a 64th, its states, and the input


def test_what_is_sent_is_told_by_kind_and_axis():
    model, inputs = nanogpt()
    found = autotp.dryrun(model, (2, 2), inputs, cluster=CLUSTER, steps=1)
    sent = {(s.kind, s.axis): s.size_bytes for s in found.predicted.sent}
    assert sent == found.plan.sent()
    total = found.predicted.compute_s + found.predicted.sent_s
    assert total == pytest.approx(found.plan.step_time_s) and found.predicted.compute_s > 0
    assert found.step_s == found.measured.compute_s + found.predicted.sent_s
    assert set(found.measured.phases) == {"forward", "backward", "optimizer"}


def test_eval_runs_forward_alone():
    model, inputs = nanogpt()
    found = autotp.dryrun(model.eval(), (2, 2), inputs, cluster=CLUSTER, steps=1)
    assert set(found.measured.phases) == {"forward"} and "forward pass" in str(found)


def test_buffers_are_renewed_and_frozen_parameters_stay():
    model = Mlp()
    found = autotp.dryrun(
        model, (2, 2), (torch.ones(4, 8), torch.ones(4, 8)), cluster=CLUSTER, steps=1
    )
    assert found.measured.flops and model.calls == 0


def test_a_saved_plan_is_followed(tmp_path):
    model, inputs = mlp()
    plan = autotp.plan(model, (2, 2), inputs, cluster="dgx_h100")
    plan.save(tmp_path / "plan.json")
    loaded = autotp.Plan.load(tmp_path / "plan.json")
    found = autotp.dryrun(model, (2, 2), inputs, plan=loaded, steps=1)
    assert found.plan.hash == plan.hash and found.memory_bytes == 80e9 and found.fits


def test_integers_stay_below_the_rows_that_they_look_up():
    with torch.device("meta"):
        model, inputs = gpt2(), tokens()
    found = inferred(model, (), inputs, Options())
    assert index_bounds(found[0]) == {"input_ids": 65, "labels": 65}


def test_collectives_answer_with_the_right_shapes():
    axis = SilentAxis("col", 4, 1, CopyClock(CPU))
    x, ones = torch.randn(3, 5), torch.ones(2, dtype=torch.long)
    assert axis.all_gather(x).equal(x.expand(4, 3, 5))
    assert axis.all_reduce(x).equal(x) and axis.all_reduce(ones).tolist() == [4, 4]
    assert axis.all_reduce(ones, "max").tolist() == [1, 1]
    assert axis.reduce_scatter(torch.randn(4, 3)).shape == (3,)
    assert axis.all_to_all(x, [3, 0, 0, 0], [2, 2, 2, 1]).shape == (7, 5)
    assert axis.all_to_all(x[:0], [0] * 4, [1] * 4).shape == (4, 5)
    assert axis.permute(x).shape == x.shape and axis.sent["all_gather"]


REFUSED = (
    (dict(rank=4), GridError, "grid 2x2 has no rank 4"),
    (dict(device="mps"), AutotpError, "a dry run cannot run on mps"),
)


@pytest.mark.parametrize("options, kind, what", REFUSED)
def test_refusals(options, kind, what):
    model, inputs = mlp()
    with pytest.raises(kind) as error:
        autotp.dryrun(model, (2, 2), inputs, cluster=CLUSTER, **options)
    assert error.value.what == what and error.value.remedies


def test_plans_that_do_not_belong_are_refused():
    model, inputs = mlp()
    plan = autotp.plan(model, (2, 2), inputs, cluster=CLUSTER)
    with pytest.raises(PlanError):
        autotp.dryrun(model, (4, 1), inputs, plan=plan, cluster=CLUSTER)
    object.__setattr__(plan, "cluster", "my cluster")
    with pytest.raises(AutotpError) as error:
        autotp.dryrun(model, (2, 2), inputs, plan=plan)
    assert error.value.what == "the plan was made for my cluster, which is known here by no name"


def test_a_rank_that_the_host_cannot_hold_is_refused():
    with torch.device("meta"):
        model, x = nn.Linear(2**18, 2**18), torch.ones(1, 2**18)
    with pytest.raises(AutotpError) as error:
        autotp.dryrun(model, (1, 1), (x,), device="cpu", cluster=bandwidth_bound())
    assert error.value.what == "one rank of grid 1x1 does not fit this device"


def test_command_line(capsys):
    command = ["dryrun", "gpt2", "--small", "--grid", "4x2", "--rank", "5", "--batch", "4"]
    command += ["--seq", "8", "--device", "cpu", "--steps", "1", "--cluster", "dgx_h100"]
    assert main(command) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == (
        "dry run of GPT2LMHeadModel: one training step of rank 5 of grid 4x2 of dgx_h100,"
        " run alone on cpu"
    )
    assert rows[0].split() == ["predicted", "measured"]
    assert rows[-2:] == [
        "  fits the 80 GB of a rank",
        "  nothing was sent and weights are random: times and sizes are real, values mean nothing",
    ]
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["grid"] == {"row": 4, "col": 2} and figures["measured"]["peak_bytes"] > 0
