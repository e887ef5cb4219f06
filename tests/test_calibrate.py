"""Calibration on real ranks, its cache, and what is refused."""

import dataclasses
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.calibrate import cached_cluster, calibrated, identity_of
from autotp.calibration_file import Calibration, Identity, cache_path, load, save
from autotp.cli import main
from autotp.cost_model.calibration import fit
from autotp.cost_model.cluster import dgx_h100
from autotp.cost_model.collectives import OTHERS
from autotp.cost_model.levels import STAGES
from autotp.errors import CalibrationError
from autotp.launch import launch
from autotp.measure import Effort, ranks_per_node, shapes_of
from tests.cost_model.test_calibration import measured, product

CPU = torch.device("cpu")
TINY = Effort(0.1, (2**12, 2**16), rounds=2)
HERE = Identity("vm", "a CPU", 2, "cpu", "gloo", 4, 4, 1, "2.13.0", "0.1.0")


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


# The measurement ---------------------------------------------------------------------------------


def measure_and_plan():
    """One launch for all that needs ranks: measured, kept, planned for, on one node and on two."""
    dist.init_process_group("gloo")
    path = cache_path(identity_of(CPU, ranks_per_node()))
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True)
        path.write_text("{")
    dist.barrier()
    first = calibrated(CPU, TINY)
    again = calibrated(CPU, TINY)
    torch.manual_seed(0)
    model = autotp.parallelize(mlp(), (2, 2), (torch.randn(8, 64),))
    model(torch.randn(8, 64)).sum().backward()
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if torchrun had started two on each of two nodes
    two_nodes = calibrated(CPU, TINY).cluster
    return first, again, model.plan.cluster, model.plan.hash, two_nodes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def by_rank(cache):
    return launch(measure_and_plan, 4)


def test_all_ranks_have_one_calibration_and_one_plan(by_rank):
    assert all(result == by_rank[0] for result in by_rank)


def test_what_is_measured_is_kept_in_place_of_a_spoilt_file_and_usable(by_rank):
    first, again, planned_for = by_rank[0][:3]
    cluster = first.cluster
    assert again == first and planned_for == cluster.name == "measured_gloo"
    assert cluster.ranks_per_node == 4 and {r.ranks for r in cluster.intra.rates} == {2, 4}
    for kind, algorithms in OTHERS.items():
        plain = "exchange" if kind == "reduce_scatter" else ""
        assert cluster.intra.measured(kind) == tuple(by for by in algorithms if by != plain)
    (crossing,) = [link for members, link in by_rank[0][4].crossings if members == 2]
    assert all("nodes_of_2" in crossing.measured(kind) for kind in STAGES)
    assert 1e6 < cluster.memory_bandwidth_bytes_per_s < 1e13
    assert 1e7 < cluster.matmul_flops_per_s("float32") < 1e14
    assert 1e-8 < cluster.op_overhead_s < 1e-1 and cluster.memory_bytes > 1e8
    assert 1e-6 < cluster.update_s < 1e-1 and cluster.update_bytes_per_s > 1e6


def test_what_was_measured_is_known_without_ranks(by_rank):
    assert cached_cluster(4, CPU) == by_rank[0][0].cluster
    plan = autotp.plan(mlp(), (2, 2), (torch.randn(8, 64),), cluster="measure")
    assert plan.hash == by_rank[0][3]


def test_links_inside_and_between_nodes_are_measured_apart(by_rank):
    cluster = by_rank[0][4]
    assert cluster.ranks_per_node == 2 and [m for m, _ in cluster.crossings] == [2]
    assert cluster.intra != cluster.inter
    assert cluster.link((4,), 0) is cluster.crossings[0][1]


@pytest.mark.parametrize(("world", "node"), [(4, 4), (4, 2), (4, 1), (16, 8), (12, 6)])
def test_groups_of_a_shape_are_all_ranks_once_and_cross_nodes_as_told(world, node):
    for shape in shapes_of(world, node):
        groups = {tuple(shape.group(rank)) for rank in range(world)}
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        for group in groups:
            nodes = [rank // node for rank in group]
            assert {nodes.count(n) for n in nodes} == {shape.members}


# The command -------------------------------------------------------------------------------------


def test_the_command_measures_prints_and_keeps(cache, capfd):
    assert main(["calibrate", "--ranks", "2", "--seconds", "0"]) == 0
    out, err = capfd.readouterr()
    assert "autotp: this machine was not calibrated: measuring gloo on 2 ranks" in err
    assert "gloo on 2 ranks of" in out and "products of float32" in out
    assert any(str(path) in err for path in (cache / "autotp").glob("*-2ranks-*.json"))


def test_one_rank_is_refused_by_the_command(capsys):
    assert main(["calibrate", "--ranks", "1"]) == 2
    assert capsys.readouterr().err == (
        "CalibrationError: one rank sends nothing\n"
        "  at      --ranks   1\n"
        "  remedy  --ranks 2 or more\n"
    )


# The cache ---------------------------------------------------------------------------------------


def calibration(identity=HERE):
    ladder = [product("float32", (n, 64, 64), 1e9 * n) for n in (1, 8, 64)]
    cluster = fit(measured(ladder, ((2, 2, 8e9), (2, 1, 1e8), (4, 2, 2e8))), "here")
    return Calibration(identity, cluster, 2.5, {"streams": [1, 2.5]})


def test_a_calibration_reads_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.json"
    save(calibration(), path)
    assert load(path, HERE) == calibration() and hash(load(path, HERE).cluster)
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_link_of_two_protocols_reads_back(tmp_path):
    path = tmp_path / "file.json"
    save(dataclasses.replace(calibration(), cluster=dgx_h100()), path)
    assert load(path, HERE).cluster == dgx_h100()


def refusal(path, identity=HERE):
    with pytest.raises(CalibrationError) as caught:
        load(path, identity)
    return str(caught.value).replace(str(path), "FILE")


def test_a_stale_file_is_refused_by_what_differs(tmp_path):
    path = tmp_path / "file.json"
    save(calibration(), path)
    assert refusal(path, dataclasses.replace(HERE, torch="2.14.0", cores=8)) == (
        "CalibrationError: calibration FILE holds for something else\n"
        "  at      cores   2 in the file, 8 here\n"
        "  at      torch   2.13.0 in the file, 2.14.0 here\n"
        "  remedy  autotp calibrate --force"
    )


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "file.json"
    save(calibration(), path)
    text = path.read_text()
    path.write_text(text[: int(kept * len(text))])
    assert refusal(path).startswith(
        "CalibrationError: calibration FILE cannot be read\n  at      file   JSONDecodeError: "
    )


@pytest.mark.parametrize("edit", ["cluster", "format", "digest", "list"])
def test_an_edited_file_is_refused(tmp_path, edit):
    path = tmp_path / "file.json"
    save(calibration(), path)
    body = json.loads(path.read_text())
    if edit == "cluster":
        body["cluster"]["memory_bandwidth_bytes_per_s"] *= 2
    elif edit == "digest":
        del body["digest"]
    elif edit == "format":
        body["format"] = 0
    path.write_text(json.dumps([1] if edit == "list" else body))
    assert refusal(path) == (
        "CalibrationError: calibration FILE is not as autotp writes it\n"
        "  at      digest   differs from that of the content\n"
        "  remedy  autotp calibrate --force"
    )


def test_what_was_never_measured_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CalibrationError, match="3 ranks were not measured on this machine"):
        autotp.plan(mlp(), (1, 3), (torch.randn(6, 64),), cluster="measure")


def test_to_measure_takes_ranks():
    with pytest.raises(CalibrationError) as caught:
        autotp.parallelize(mlp(), (1, 1), (torch.randn(6, 64),), cluster="measure")
    dist.destroy_process_group()
    assert str(caught.value) == (
        "CalibrationError: to measure takes two ranks or more that talk over gloo or nccl\n"
        "  at      process group   1 ranks\n"
        "  at      backend         gloo\n"
        "  remedy  cluster= a name or a Cluster\n"
        "  remedy  autotp calibrate --ranks 4"
    )
