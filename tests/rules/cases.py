"""Calls of every op in the rule table, and of pointwise ops that have a rule by torch's tag.

Sizes are small and mostly distinct; those that are split in blocks divide by two, three or both.
`x` is differentiated, `c` is a constant.
"""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401 - it brings its op

aten = torch.ops.aten


def x(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def c(*shape):
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape):
    return torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()


def share(*shape):
    return torch.rand(shape, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()


def mask(*shape):
    out = torch.rand(*shape) > 0.3
    out[..., 0] = True
    return out


def ints(high, *shape):
    return torch.randint(high, shape)


def definite(count, size):
    half = torch.randn(count, size, size, dtype=torch.float64)
    return (half @ half.mT + torch.eye(size)).requires_grad_()


def single(*shape):
    return torch.randn(shape).requires_grad_()


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def targets(high, count):
    out = torch.randint(high, (count,))
    out[1] = -100
    return out


FAMILIES = {
    "attention": lambda: [
        (aten.scaled_dot_product_attention.default, *call)
        for call in [
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 3)),
            (x(2, 6, 4, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), None, 0.0, True),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), None, 0.0, True),
            (x(2, 6, 7, 5), x(2, 6, 4, 5), x(2, 6, 4, 3), None, 0.0, True),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), mask(2, 1, 4, 7)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), mask(2, 1, 4, 7) & (c(4, 1) > 0)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), x(1, 6, 4, 1)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), mask(2, 1, 1, 7)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), mask(1, 1, 4, 7)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), mask(4, 7)),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 5), x(1, 6, 4, 7)),
            (x(2, 6, 4, 5), x(2, 1, 7, 5), x(2, 1, 7, 5)),
            (x(6, 4, 5), x(6, 7, 5), x(6, 7, 5)),
            (x(6, 4, 5), x(6, 7, 5), x(6, 7, 5), mask(6, 4, 7)),
            (x(6, 4, 5), x(6, 7, 5), x(6, 7, 5), mask(4, 7)),
            (x(4, 5), x(7, 5), x(7, 5)),
            (x(2, 3, 4, 5, 6), x(2, 3, 4, 7, 6), x(2, 3, 4, 7, 6), mask(2, 3, 1, 5, 7)),
            (x(2, 12, 3, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), {"enable_gqa": True}),
            (x(2, 4, 5, 3), x(2, 2, 5, 3), x(2, 2, 5, 3), None, 0.0, True, {"enable_gqa": True}),
            (x(2, 12, 3, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), mask(2, 1, 3, 4), {"enable_gqa": True}),
            (x(2, 12, 3, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), mask(3, 4), {"enable_gqa": True}),
            (x(2, 12, 3, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), x(2, 12, 3, 4), {"enable_gqa": True}),
            (x(2, 6, 3, 5), x(2, 6, 4, 5), x(2, 6, 4, 5), {"enable_gqa": True, "scale": 0.3}),
            (x(12, 3, 5), x(6, 4, 5), x(6, 4, 5), {"enable_gqa": True}),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 4), mask(2, 1, 4, 7), 0.4),
            (x(2, 6, 4, 5), x(2, 6, 7, 5), x(2, 6, 7, 4), x(1, 6, 4, 7), 0.4, {"scale": 0.3}),
            (x(2, 4, 5, 3), x(2, 2, 5, 3), x(2, 2, 5, 3), None, 0.4, True, {"enable_gqa": True}),
        ]
    ],
    "convolution": lambda: [
        (aten.conv1d.default, x(4, 6, 7), x(8, 6, 3), x(8), [1], [1]),
        (aten.conv1d.default, x(4, 6, 7), x(6, 1, 3), x(6), [1], [1], [1], 6),
        (aten.conv1d.default, x(6, 7), x(8, 6, 3), x(8)),
        (aten.conv2d.default, x(4, 3, 6, 6), x(6, 3, 2, 2), x(6), [2, 2]),
        (aten.conv2d.default, x(4, 3, 6, 6), x(6, 3, 2, 2)),
        (aten.conv2d.default, x(4, 6, 4, 4), x(6, 2, 2, 2), None, [1, 1], [0, 0], [1, 1], 3),
        (aten.conv3d.default, x(2, 3, 3, 3, 3), x(4, 3, 2, 2, 2), x(4)),
        (aten.conv3d.default, x(2, 4, 2, 2, 2), x(4, 2, 2, 2, 2), x(4), *STEP3, 2),
        (aten.conv_transpose1d.default, x(4, 6, 5), x(6, 8, 3), x(8), [2]),
        (aten.conv_transpose1d.default, x(4, 6, 5), x(6, 2, 3), x(4), [1], [0], [0], 2),
        (aten.conv_transpose1d.default, x(6, 5), x(6, 8, 3)),
        (aten.conv_transpose2d.input, x(4, 6, 3, 3), x(6, 8, 2, 2), x(8), [2, 2]),
        (aten.conv1d.default, x(4, 6, 7), x(12, 1, 3), x(12), [1], [1], [1], 6),
        (aten.conv1d.default, x(5, 7, 4), x(7, 1, 2), None, [1], [0], [1], 7),
        (aten.conv1d.padding, x(4, 6, 7), x(8, 6, 3), x(8), [1], "same"),
        (aten.conv1d.padding, x(4, 6, 7), x(6, 1, 3), x(6), [1], "same", [1], 6),
        (aten.conv2d.default, x(4, 12, 4, 4), x(8, 3, 2, 2), x(8), [1, 1], [0, 0], [1, 1], 4),
        (aten.conv2d.default, x(2, 8, 4, 4), x(2, 4, 2, 2), x(2), [1, 1], [0, 0], [1, 1], 2),
        (aten.conv2d.padding, x(4, 6, 5, 5), x(6, 2, 2, 3), None, [1, 1], "valid", [1, 1], 3),
        (aten.conv3d.padding, x(2, 4, 3, 3, 3), x(4, 2, 2, 2, 2), x(4), ONES, "same", ONES, 2),
        (aten.conv_transpose1d.default, x(4, 6, 5), x(6, 1, 3), x(6), [2], [0], [0], 6),
        (aten.conv_transpose2d.input, x(4, 8, 3, 3), x(8, 3, 2, 2), x(12), [2], [0], [0], 4),
        (aten.conv_transpose3d.input, x(2, 4, 2, 2, 2), x(4, 6, 2, 2, 2), x(6), [2] * 3),
        (aten.conv_transpose3d.input, x(2, 4, 2, 2, 2), x(4, 3, 2, 2, 2), x(6), *UP3, 2),
    ],
    "creation": lambda: [
        (aten.full_like.default, x(4, 6), 3.0),
        (aten.new_full.default, x(4, 6), [2, 6], 3.0),
        (aten.new_ones.default, x(4, 6), []),
        (aten.new_ones.default, x(4, 6), [4, 6, 2], {"dtype": torch.bool}),
        (aten.new_zeros.default, x(4, 6), [4, 8]),
        (aten.new_zeros.default, x(), [4]),
        (aten.ones_like.default, x(4, 6)),
        (aten.zeros_like.default, x(4, 6), {"dtype": torch.int64}),
    ],
    "einsum": lambda: [
        (aten.addbmm.default, x(4, 5), x(3, 4, 8), x(3, 8, 5)),
        (aten.addbmm.default, x(5), x(3, 4, 8), x(3, 8, 5), {"beta": 0.5, "alpha": 3}),
        (aten.addmm.default, x(6), x(4, 8), x(8, 6)),
        (aten.addmm.default, x(4, 6), x(4, 8), x(8, 6), {"beta": 0.5, "alpha": 3}),
        (aten.addmm.default, x(4, 1), x(4, 8), x(8, 6)),
        (aten.addmm.default, x(1, 6), x(4, 8), x(8, 6)),
        (aten.addmm.default, x(), x(4, 8), x(8, 6)),
        (aten.addmv.default, x(4), x(4, 8), x(8)),
        (aten.addmv.default, x(1), x(4, 8), x(8), {"beta": 0.5, "alpha": 3}),
        (aten.addr.default, x(4, 6), x(4), x(6)),
        (aten.addr.default, x(6), x(4), x(6), {"beta": 0.5, "alpha": 3}),
        (aten.baddbmm.default, x(3, 4, 6), x(3, 4, 8), x(3, 8, 6)),
        (aten.baddbmm.default, x(1, 4, 6), x(3, 4, 8), x(3, 8, 6)),
        (aten.baddbmm.default, x(6), x(3, 4, 8), x(3, 8, 6)),
        (aten.bilinear.default, x(4, 6), x(4, 8), x(5, 6, 8), x(5)),
        (aten.bmm.default, x(3, 4, 8), x(3, 8, 5)),
        (aten.dot.default, x(7), x(7)),
        (aten.einsum.default, "bsi,oi->bso", [x(2, 3, 6), x(8, 6)]),
        (aten.einsum.default, "b n s d, b n t d -> b n s t", [x(2, 4, 3, 5), x(2, 4, 6, 5)]),
        (aten.einsum.default, "...ij,...jk->...ik", [x(4, 3, 5), x(4, 5, 6)]),
        (aten.einsum.default, "ij,jk", [x(3, 5), x(5, 6)]),
        (aten.einsum.default, "bij->b", [x(3, 4, 5)]),
        (aten.einsum.default, "ii,ij->j", [x(4, 4), x(4, 5)]),
        (aten.linear.default, x(2, 3, 8), x(6, 8), x(6)),
        (aten.linear.default, x(2, 3, 8), x(6, 8)),
        (aten.linear.default, x(8), x(6, 8), x(6)),
        (aten.linear.default, c(4, 8), x(6, 8), x(6)),
        (aten.matmul.default, x(2, 4, 3, 6), x(2, 4, 6, 5)),
        (aten.matmul.default, x(2, 1, 3, 6), x(4, 6, 5)),
        (aten.matmul.default, x(2, 3, 6), x(6, 5)),
        (aten.matmul.default, x(2, 3, 6), x(6)),
        (aten.matmul.default, x(6), x(2, 6, 5)),
        (aten.matmul.default, x(4), x(4)),
        (aten.mm.default, x(4, 8), x(8, 6)),
        (aten.mv.default, x(4, 8), x(8)),
        (aten.outer.default, x(4), x(6)),
    ],
    "experts": lambda: [
        (GROUPED, x(12, 4), x(4, 4, 6), ends(2, 2, 7, 12)),
        (GROUPED, x(11, 4), x(5, 4, 6), ends(1, 2, 7, 7, 9)),
        (aten._grouped_mm.default, single(12, 8), single(4, 8, 12), ends(2, 2, 7, 12)),
        (aten._grouped_mm.default, single(4, 4, 8), single(4, 8, 12)),
        (aten._grouped_mm.default, single(4, 4, 4), single(4, 4, 12)),
    ],
    "index": lambda: [
        (aten.embedding.default, x(12, 6), ints(12, 3, 4)),
        (aten.embedding.default, x(11, 4), ints(11, 5), 3),
        (aten.embedding.default, x(12, 6), ints(12, 4, 6), -1, True),
        (aten.embedding_bag.padding_idx, x(12, 6), ints(12, 8), BAGS, False, 0, *BAGGED),
        (aten.embedding_bag.padding_idx, x(12, 6), ints(12, 8), BAGS, False, 1, *BAGGED),
        (aten.gather.default, x(4, 6), 1, ints(6, 4, 8)),
        (aten.gather.default, x(4, 6), 0, ints(4, 3, 6)),
        (aten.gather.default, x(4, 6, 2), -1, ints(2, 4, 3, 5)),
        (aten.histc.default, c(4, 6), 5),
        (aten.bucketize.Tensor, c(4, 6), torch.tensor([-0.5, 0.0, 0.5]).double()),
        (aten.embedding_bag.padding_idx, x(12, 6), ints(12, 8), BAGS, False, 2, *BAGGED),
        (aten.embedding_bag.padding_idx, x(12, 6), ints(12, 8), BAGS, False, 0, *WEIGHTED),
        (aten.index_copy.default, x(4, 6), 1, torch.tensor([3, 0]), x(4, 2)),
        (aten.index_fill.int_Scalar, x(4, 6), 1, torch.tensor([3, 0]), 2.0),
        (aten.index_fill.int_Tensor, x(4, 6), 0, torch.tensor([3, 0]), x()),
        (aten.index_reduce.default, x(4, 6), 1, ints(6, 3), x(4, 3), "amax"),
        (aten.masked_scatter.default, x(4, 6), mask(4, 6), x(5, 6)),
        (aten.scatter_reduce.two, x(4, 6), 1, ints(6, 4, 8), x(4, 8), "amax"),
        (aten.scatter_reduce.two, x(4, 6), 1, ints(6, 4, 3), x(4, 3), "mean"),
        (aten.searchsorted.Tensor, c(6).sort()[0], c(4, 6)),
        (aten.searchsorted.Tensor, c(4, 6).sort()[0], c(4, 3)),
        (aten.searchsorted.Tensor, FALLING, c(4, 5), {"sorter": torch.arange(6).flip(0)}),
        (aten.searchsorted.Tensor, FALLING.expand(4, 6), c(4, 5), {"sorter": BACKWARDS}),
        (aten.take.default, x(4, 6), ints(24, 3)),
        (aten.take.default, x(4, 6), ints(24, 4, 6)),
        (aten.index.Tensor, x(4, 6, 2), [ints(4, 8)]),
        (aten.index.Tensor, x(5, 6), [ints(5, 7) - 3]),
        (aten.index.Tensor, x(4, 6, 2), [None, ints(6, 3, 2)]),
        (aten.index.Tensor, x(4, 6, 2), [None, ints(6, 3, 1), ints(2, 4)]),
        (aten.index.Tensor, x(4, 6, 2), [ints(4, 3, 4), None, ints(2, 4)]),
        (aten.index.Tensor, x(4, 6, 2), [None, ints(6)]),
        (aten.index.Tensor, x(4, 6, 2), [mask(4, 6)]),
        (aten.index.Tensor, x(4, 6, 2), [None, mask(6)]),
        (aten.index_add.default, x(4, 6), 0, ints(4, 8), x(8, 6)),
        (aten.index_add.default, x(4, 6), -1, ints(6, 2), x(4, 2), {"alpha": 2}),
        (aten.index_put.default, x(4, 6), [torch.tensor([2, 0])], x(2, 6)),
        (aten.index_put.default, x(4, 6), [ints(4, 8)], x(6), True),
        (aten.index_put.default, x(4, 6, 2), [None, ints(6, 3)], x(3, 1), True),
        (aten.index_put.default, x(5, 6), [torch.tensor([4, -5, 1])], x(3, 1)),
        (aten.index_put.default, c(5).long(), [torch.tensor([4, 0, 2, 3, 1])], torch.arange(5)),
        (aten.index_put.default, x(7, 3), [ints(7, 5, 2) - 3], x(5, 2, 3), True),
        (aten.index_put.default, x(2, 5, 3), [None, torch.tensor([[4], [-5]])], x(2, 1, 1)),
        (aten.index_put.default, x(4, 6), [mask(4, 6)], x()),
        (aten.index_select.default, x(4, 6), 1, ints(6, 8)),
        (aten.scatter.src, x(4, 6), 1, torch.arange(6).flip(0).repeat(4, 1), x(4, 6)),
        (aten.scatter.src, x(4, 6), 1, torch.arange(2).repeat(4, 1), c(4, 6)),
        (aten.scatter.value, x(4, 6), 1, ints(6, 4, 2), 3.0),
        (aten.scatter.value, x(4, 6), 0, ints(4, 3, 4), 3.0),
        (aten.scatter_add.default, x(4, 6), 0, ints(4, 8, 6), x(8, 6)),
        (aten.scatter_add.default, x(4, 6), 1, ints(6, 4, 2), c(4, 3)),
        (aten.sort.default, x(4, 6)),
        (aten.sort.default, x(4, 6), 0, True),
        (aten.sort.stable, x(4, 6), {"stable": True, "dim": 0}),
        (aten.argsort.default, x(4, 6)),
        (aten.argsort.stable, x(4, 6), {"stable": True, "dim": 0}),
        (aten.topk.default, x(4, 6), 2),
        (aten.topk.default, x(4, 6), 3, 0),
    ],
    "layout": lambda: [
        (aten.diag_embed.default, x(4, 6)),
        (aten.diag_embed.default, x(4, 2, 6), 1, 0, -1),
        (aten.diagonal.default, x(4, 6, 6), 0, 1, 2),
        (aten.diagonal.default, x(4, 6, 5), 1, 0, -1),
        (aten.diagonal_scatter.default, x(4, 6, 5), x(4, 5), 0, 1, 2),
        (aten.rot90.default, x(4, 6, 5), 1, [1, 2]),
        (aten.rot90.default, x(4, 6)),
        (aten.select_scatter.default, x(4, 6, 2), x(4, 2), 1, 3),
        (aten.slice_scatter.default, x(4, 6), x(4, 2), 1, 2, 4),
        (aten.slice_scatter.default, x(4, 6), x(2, 6), 0, 0, 4, 2),
        (aten.trace.default, x(4, 6)),
        (aten.unfold.default, x(4, 8, 6), 1, 3, 2),
    ],
    "loss": lambda: [
        (aten.cross_entropy_loss.default, x(6, 8), targets(8, 6)),
        (aten.cross_entropy_loss.default, x(5, 11), targets(11, 5)),
        (aten.cross_entropy_loss.default, x(6, 8), targets(8, 6), None, 2),
        (aten.cross_entropy_loss.default, x(6, 8), targets(8, 6), None, 0),
        (aten.cross_entropy_loss.default, x(6, 8), targets(8, 6), c(8).abs()),
        (aten.cross_entropy_loss.default, x(6, 8), ints(8, 6), c(8).abs(), 1, 3, 0.1),
        (aten.cross_entropy_loss.default, x(6, 8), targets(8, 6), None, 1, -100, 0.1),
        (aten.cross_entropy_loss.default, x(6, 8), c(6, 8).softmax(1)),
        (aten.cross_entropy_loss.default, x(3, 8, 4), ints(8, 3, 4)),
        (aten.cross_entropy_loss.default, x(6, 8), c(6, 8).softmax(1), c(8).abs(), 1, -100, 0.1),
        (aten.cross_entropy_loss.default, x(4, 6, 5), c(4, 6, 5).softmax(1), None, 0),
        (aten.cross_entropy_loss.default, x(4, 6, 5), c(4, 6, 5).softmax(1)),
        (aten.cross_entropy_loss.default, x(2, 8, 4, 3), ints(8, 2, 4, 3), c(8).abs(), 1, 2, 0.1),
        (aten.cross_entropy_loss.default, x(4, 7, 2, 3, 2), ints(7, 4, 2, 3, 2), None, 0),
        (aten.cross_entropy_loss.default, x(8), ints(8)),
        (aten.cross_entropy_loss.default, x(4, 6), torch.full((4,), -100)),  # no target counts
        (aten.cross_entropy_loss.default, x(4, 6), torch.full((4,), 2), c(6).abs(), 1, 2, 0.1),
        (aten.cross_entropy_loss.default, x(4, 6), ints(6, 4), torch.zeros(6).double()),
        (aten.cross_entropy_loss.default, x(8), c(8).softmax(0)),
        *(
            (loss, x(4, 6), x(4, 6), *reduction)
            for loss in (
                aten.huber_loss.default,
                aten.kl_div.default,
                aten.l1_loss.default,
                aten.mse_loss.default,
                aten.smooth_l1_loss.default,
            )
            for reduction in ((), (0,), (2,))
        ),
        (aten.nll_loss_nd.default, x(6, 8), targets(8, 6)),
        (aten.nll_loss_nd.default, x(6, 8), targets(8, 6), c(8), 2),
        (aten.nll_loss_nd.default, x(6, 8, 3), ints(8, 6, 3), None, 0),
        (aten.nll_loss_nd.default, x(8), ints(8), None, 2),
        (aten.nll_loss_nd.default, x(4, 6), torch.full((4,), -100)),
        (aten.nll_loss_nd.default, x(4, 6), ints(6, 4), torch.zeros(6).double()),
        (aten.nll_loss_nd.default, x(3, 6, 2, 3, 2), ints(6, 3, 2, 3, 2), c(6).abs(), 1, 2),
        (aten.cosine_embedding_loss.default, x(4, 6), x(4, 6), SIGNS, 0.1),
        (aten.cosine_embedding_loss.default, x(4, 6), x(4, 6), SIGNS, 0.1, 0),
        (aten.cosine_embedding_loss.default, x(6), x(6), SIGNS[0]),
        (aten.hinge_embedding_loss.default, x(4, 6), c(4, 6).sign()),
        (aten.margin_ranking_loss.default, x(4, 6), x(4, 6), c(4, 6).sign(), 0.1, 2),
        (aten.margin_ranking_loss.default, x(4, 6), x(4, 6), c(4, 6).sign(), 0.1),
        (aten.multi_margin_loss.default, x(4, 6), ints(6, 4), 1, 1.0, c(6).abs()),
        (aten.multi_margin_loss.default, x(4, 6), ints(6, 4), 1, 1.0, None, 0),
        (aten.multi_margin_loss.default, x(6), ints(6, 1)),
        (aten.multilabel_margin_loss.default, x(4, 6), ints(6, 4, 6)),
        (aten.multilabel_margin_loss.default, x(4, 6), ints(6, 4, 6), 0),
        (aten.poisson_nll_loss.default, x(4, 6), c(4, 6).abs(), True, False, 1e-8, 1),
        (aten.soft_margin_loss.default, x(4, 6), c(4, 6).sign()),
        (aten.soft_margin_loss.default, x(4, 6), c(4, 6).sign(), 0),
        (aten.triplet_margin_loss.default, x(4, 6), x(4, 6), x(4, 6)),
        (aten.triplet_margin_loss.default, *TRIPLETS, 1.0, 2.0, 1e-6, True, 0),
        (aten.binary_cross_entropy.default, share(4, 6), share(4, 6).detach()),
        (aten.binary_cross_entropy.default, share(4, 6), share(4, 6).detach(), c(6), 2),
        (aten.binary_cross_entropy_with_logits.default, x(4, 6), x(4, 6)),
        (aten.binary_cross_entropy_with_logits.default, x(4, 6), x(4, 6), c(4, 1), c(6), 1),
        (aten.binary_cross_entropy_with_logits.default, x(4, 6), x(4, 6), None, c(6), 2),
    ],
    "norm": lambda: [
        (aten._native_batch_norm_legit_functional.default, *BATCHES, *STATISTICS, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, *BATCHES, *STATISTICS, False, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, *IMAGES, *STATISTICS, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit_functional.default, *PLAIN, True, 0.3, 1e-5),
        (aten._native_batch_norm_legit.no_stats, *UNTRACKED, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit.no_stats, x(5, 6), None, None, True, 0.1, 1e-5),
        (aten._native_batch_norm_legit_no_training.default, *BATCHES, *STATISTICS, 0.1, 1e-5),
        (aten.batch_norm.default, x(4, 6, 5), x(6), x(6), *STATISTICS, False, *EPS),
        (aten.batch_norm.default, x(4, 6, 5), x(6), x(6), *STATISTICS, True, *EPS),
        (aten.batch_norm.default, x(4, 6), None, None, *STATISTICS, False, *EPS),
        (aten._weight_norm.default, x(4, 6, 5), x(4, 1, 1)),
        (aten._weight_norm.default, x(4, 3, 6), x(1, 1, 6), 2),
        (aten._weight_norm.default, x(4, 3, 6), x(1, 1, 1), -1),  # one length for all of it
        (aten._weight_norm.default, x(4, 3, 6), x(1, 1, 6), -1),
        (aten.group_norm.default, x(4, 6, 5), 3, x(6), x(6)),
        (aten.group_norm.default, x(4, 6), 2),
        (aten.group_norm.default, x(4, 12, 2, 2), 4, x(12), x(12)),
        (aten.group_norm.default, x(4, 6, 5), 6, x(6), x(6)),
        (aten.instance_norm.default, x(4, 6, 5), x(6), x(6), None, None, True, *EPS),
        (aten.instance_norm.default, x(4, 6, 5, 2), None, None, *STATISTICS, False, *EPS),
        (aten.layer_norm.default, x(2, 3, 8), [8], x(8), x(8)),
        (aten.layer_norm.default, x(2, 3, 7), [7], x(7)),
        (aten.layer_norm.default, x(4, 6), [6]),
        (aten.layer_norm.default, x(4, 6), [6], None, x(6)),
        (aten.layer_norm.default, x(2, 3, 8), [3, 8], x(3, 8), x(3, 8), 1e-3, False),
        (aten.log_softmax.int, x(2, 3, 8), -1),
        (aten.log_softmax.int, x(4, 6), 0, torch.float64),
        (aten.rms_norm.default, x(2, 3, 8), [8], x(8), 1e-6),
        (aten.rms_norm.default, x(4, 7), [7]),
        (aten.rms_norm.default, x(4, 3, 5), [3, 5], x(3, 5)),
        (aten.softmax.int, x(2, 3, 8), -1),
        (aten.softmax.int, x(4, 7, 3), 1),
    ],
    "pointwise": lambda: [
        (aten.add.Tensor, x(2, 3, 4), x(4)),
        (aten.add.Tensor, x(2, 3, 4), x(2, 1, 4), {"alpha": 3}),
        (aten.add.Tensor, x(4, 6), 2.0),
        (aten.add.Tensor, x(4, 6), x()),
        (aten.broadcast_tensors.default, [x(4, 6), x(4, 6)]),
        (aten.broadcast_tensors.default, [x(4, 1), x(6)]),
        (aten.complex.default, x(4, 6), x(6)),
        (aten.conj_physical.default, torch.complex(c(4, 6), c(4, 6)).requires_grad_()),
        (aten.div.Scalar, x(4, 6), 3.0),
        (aten.div.Tensor, x(4, 6), positive(4, 1)),
        (aten.div.Tensor, x(4, 6), 3.0),
        (aten.exp.default, x(4, 6)),
        (aten.__and__.Tensor, mask(4, 6), mask(1, 6)),
        (aten.__or__.Tensor, mask(4, 6), mask(4, 1)),
        (aten.fill.Scalar, x(4, 6), 2.0),
        (aten.fill.Tensor, x(4, 6), x()),
        (aten.floor_divide.Scalar, c(4, 6), 2),
        (aten.floor_divide.default, c(4, 6), c(6)),
        (aten.floor_divide.default, ints(9, 4, 6), 2),
        (aten.hardswish.default, x(4, 6)),
        (aten.masked_fill.Tensor, x(2, 4, 6), mask(4, 6), x()),
        (aten.log_sigmoid.default, x(4, 6)),
        (aten._prelu_kernel.default, x(4, 6, 2), x(1, 6, 1)),
        (aten.mul.Scalar, x(4, 6), 3.0),
        (aten.mul.Tensor, x(2, 3, 4), x(3, 1)),
        (aten.mul.Tensor, x(4, 6), 3.0),
        (aten.mul.Tensor, 3.0, x(4, 6)),
        (aten.neg.default, x(4, 6)),
        (aten.polar.default, positive(4, 6), x(4, 6)),
        (aten.relu.default, x(4, 6)),
        (aten.rsqrt.default, positive(4, 6)),
        (aten.rsub.Tensor, x(4, 6), x(6), {"alpha": 2}),
        (aten.sigmoid.default, x(4, 6)),
        (aten.sqrt.default, positive(4, 6)),
        (aten.sub.Tensor, x(4, 6), x(4, 1)),
        (aten.sub.Tensor, x(4, 6), 1.0),
        (aten.tanh.default, x(4, 6)),
        (aten.where.self, mask(4, 1), x(4, 6), x(6)),
        (aten.where.self, mask(4, 6), x(4, 6), x()),
        (aten.where.ScalarOther, mask(4, 1), x(4, 6), 0.5),
        (aten.where.ScalarSelf, mask(4, 6), 0.5, x(6)),
    ],
    "pointwise by tag": lambda: [
        *((op, x(4, 6)) for op in UNARY),
        *((op, x(4, 6), 0.7) for op in WITH_SCALAR),
        *((op, x(4, 6), x(6)) for op in BINARY),
        (aten.addcmul.default, x(4, 6), x(6), x(4, 1), {"value": 2.0}),
        (aten.clamp.default, x(4, 6), -0.5, 0.5),
        (aten.gelu.default, x(4, 6), {"approximate": "tanh"}),
        (aten.leaky_relu.default, x(4, 6), 0.1),
        (aten.log.default, positive(4, 6)),
        (aten.lerp.Tensor, x(4, 6), x(6), x(4, 1)),
        (aten.logical_not.default, mask(4, 6)),
        (aten.masked_fill.Scalar, x(2, 4, 6), mask(4, 6), -1e9),
        (aten.pow.Scalar, 2.0, x(4, 6)),
        (aten.pow.Tensor_Scalar, positive(4, 6), 3.0),
        (aten.reciprocal.default, positive(4, 6)),
        (aten.rsub.Scalar, x(4, 6), 1.0),
    ],
    "random": lambda: [
        (aten.dropout.default, x(4, 6), 0.0, True),
        (aten.dropout.default, x(4, 6), 0.5, False),
        (aten.dropout.default, x(4, 6), 0.5, True),
        (aten.dropout.default, x(6, 4).mT, 0.5, True),
        (aten.bernoulli.default, mask(4, 6).double()),
        (aten.bernoulli.default, share(4, 6)),
        (aten.alpha_dropout.default, x(4, 6), 0.0, True),
        (aten.alpha_dropout.default, x(4, 6), 0.5, True),
        (aten.feature_alpha_dropout.default, x(4, 6, 3), 0.0, True),
        (aten.feature_alpha_dropout.default, x(4, 6, 3), 0.5, True),
        (aten.feature_dropout.default, x(4, 6, 3), 0.5, False),
        (aten.feature_dropout.default, x(4, 6, 3), 0.5, True),
        (aten.native_dropout.default, x(4, 6), 0.5, False),
        (aten.native_dropout.default, x(4, 6), 0.5, True),
    ],
    "recurrent": lambda: [
        (aten.gru.input, x(3, 4, 5), x(1, 4, 2), GRU, True, 1, 0.0, True, False, False),
        (aten.gru.input, x(4, 3, 5), x(1, 4, 2), GRU, True, 1, 0.5, True, False, True),
        (aten.lstm.input, x(4, 3, 5), STATES, LSTM, False, 1, 0.5, True, False, True),
        (aten.lstm.input, x(3, 4, 5), WAYS, BOTH, False, 2, 0.0, True, True, False),
        (aten.rnn_relu.input, x(3, 4, 5), x(1, 4, 2), RNN, True, 1, 0.0, True, False, False),
        (aten.rnn_tanh.input, x(4, 3, 5), x(1, 4, 2), RNN, True, 1, 0.0, False, False, True),
    ],
    "reduction": lambda: [
        (aten.all.default, mask(4, 6)),
        (aten.all.dim, mask(4, 6), 1),
        (aten.aminmax.default, x(4, 6), {"dim": 1}),
        (aten.any.default, mask(4, 6)),
        (aten.any.dim, mask(4, 6), 0, True),
        (aten.amax.default, x(2, 3, 4), [-1], True),
        (aten.amax.default, x(4, 6)),
        (aten.amin.default, x(2, 3, 4), [0, 2]),
        (aten.argmax.default, x(4, 6), -1),
        (aten.argmax.default, x(4, 6)),
        (aten.argmin.default, x(4, 6), 0, True),
        (aten._cdist_forward.default, x(2, 4, 5), x(2, 6, 5), 2.0, None),
        (aten._cdist_forward.default, x(4, 5), x(6, 5), 1.0, None),
        (aten._pdist_forward.default, x(4, 5)),
        (aten.cosine_similarity.default, x(4, 6), x(4, 6)),
        (aten.cosine_similarity.default, x(4, 1, 6), x(3, 6), -1),
        (aten.count_nonzero.default, ints(2, 4, 6), 1),
        (aten.count_nonzero.dim_IntList, ints(2, 4, 6, 2), [0, 2]),
        (aten.cummax.default, x(4, 6), 1),
        (aten.cummin.default, x(4, 6), -1),
        (aten.cumprod.default, x(4, 6), 1),
        (aten.cumsum.default, x(4, 6), 1),
        (aten.linalg_vector_norm.default, x(4, 6), 2, [-1], True),
        (aten.linalg_vector_norm.default, x(4, 6)),
        (aten.kthvalue.default, x(4, 6), 2),
        (aten.logcumsumexp.default, x(4, 6), 1),
        (aten.median.default, x(4, 6)),
        (aten.median.dim, x(4, 6), 1),
        (aten.mode.default, ints(3, 4, 6).double().requires_grad_()),
        (aten.nanmedian.default, x(4, 6)),
        (aten.nanmedian.dim, x(4, 6), 0, True),
        (aten.nansum.default, x(4, 6), [1]),
        (aten.nansum.default, c(4, 6).masked_fill(c(4, 6) > 0.5, float("nan")), [1]),
        (aten.norm.Scalar, x(4, 6)),
        (aten.pairwise_distance.default, x(4, 6), x(4, 6)),
        (aten.pairwise_distance.default, x(4, 3, 6), x(3, 6), 2.0, 1e-6, True),
        (aten.renorm.default, x(4, 6, 2), 2, 1, 1.5),
        (aten.std_mean.correction, x(4, 6), [1]),
        (aten.logsumexp.default, x(2, 3, 4), [-1, 0]),
        (aten.max.default, x(4, 6)),
        (aten.max.dim, x(4, 6), 1, True),
        (aten.mean.default, x(4, 5)),
        (aten.mean.dim, x(2, 3, 8), [-1], True),
        (aten.mean.dim, x(4, 5, 6), [0, 1]),
        (aten.mean.dim, x(4, 7), [1]),
        (aten.min.default, x(4, 6)),
        (aten.min.dim, x(4, 6), 0),
        (aten.norm.ScalarOpt_dim, x(4, 6), 2, [1]),
        (aten.prod.default, x(4, 6)),
        (aten.prod.dim_int, x(4, 6), 1),
        (aten.std.correction, x(4, 6), [0]),
        (aten.std.default, x(4, 6), False),
        (aten.std.dim, x(4, 6), [-1], False, True),
        (aten.sum.default, x(4, 7)),
        (aten.sum.default, ints(9, 4, 6)),
        (aten.sum.dim_IntList, x(4, 6), [0]),
        (aten.sum.dim_IntList, x(4, 6), [1], True),
        (aten.sum.dim_IntList, x(4, 6), None),
        (aten.var.correction, x(4, 6), [-1], {"correction": 0, "keepdim": True}),
        (aten.var.correction, x(4, 6)),
        (aten.var.default, x(4, 6)),
        (aten.var.dim, x(4, 6), [1]),
        (aten.var_mean.correction, x(4, 6), [1], {"keepdim": True}),
    ],
    "transform": lambda: [
        (aten._fft_c2c.default, torch.complex(c(4, 6), c(4, 6)), [1], 0, True),
        (aten._fft_c2r.default, torch.complex(c(4, 6, 5), c(4, 6, 5)), [2], 2, 8),
        (aten._fft_r2c.default, c(4, 6, 8), [2, 1], 0, True),
        *((op, x(4, 3, 3)) for op in MATRICES),
        *((op, definite(4, 3)) for op in SYMMETRIC),
        (aten.linalg_qr.default, x(6, 4, 3)),
        (aten.linalg_svd.default, x(4, 3, 3)),
        (aten.matrix_exp.default, x(6, 4, 2, 2)),
        (aten.stft.default, c(4, 16), 8, None, None, c(8).abs(), False, None, True),
        (aten.stft.center, c(16), 8, 4, 8, None, False, "reflect", False, None, True),
        (aten.stft.center, c(4, 16), 8, 4, 8, c(8).abs(), False, "reflect", False, None, True),
        (aten.view_as_complex.default, c(4, 6, 2)),
        (aten.view_as_real.default, torch.complex(c(4, 6), c(4, 6))),
    ],
    "view": lambda: [
        *((op, x(4, 6)) for op in COPIES),
        *((aten.reshape.default, x(2, 4, 6), shape) for shape in SHAPES),
        (aten.view.default, x(2, 4, 6), [8, 2, 3]),
        (aten._to_copy.default, x(4, 6), {"dtype": torch.float32}),
        (aten._to_copy.default, x(4, 6), {"dtype": torch.int64}),
        (aten.cat.default, [x(4, 6), x(4, 6)], 1),
        (aten.cat.default, [x(4, 6), x(4, 12), x(4, 6)], -1),
        (aten.cat.default, [x(4, 5), x(3, 5)]),
        (aten.chunk.default, x(4, 12), 3, -1),
        (aten.chunk.default, x(10, 4), 3),
        (aten.chunk.default, x(4, 8), 2, 1),
        (aten.diff.default, x(4, 6)),
        (aten.diff.default, x(4, 6), 2, 0, x(1, 6), x(2, 6)),
        (aten.expand.default, x(4, 1, 6), [4, 8, 6]),
        (aten.expand.default, x(6), [4, -1]),
        (aten.expand.default, x(2, 1, 3, 5), [2, 4, -1, -1]),
        (aten.pad.default, x(4, 6), [0, 1]),
        (aten.pad.default, x(4, 6, 3), [0, 1], "constant", 0.0),
        (aten.pad.default, x(4, 6), [1, -2, 0, 0], "constant", 3.0),
        (aten.permute.default, x(2, 3, 4), [-1, 0, 1]),
        (aten.repeat.default, x(4, 6), [2, 1, 3]),
        (aten.repeat.default, x(4, 1), [1, 6]),
        (aten.repeat_interleave.self_int, x(4, 6), 3, 1),
        (aten.repeat_interleave.self_int, x(4, 6), 3),
        (aten.repeat_interleave.self_int, x(4, 6), 3, 0, {"output_size": 12}),
        (aten.roll.default, x(4, 6), [2], [1]),
        (aten.roll.default, x(4, 6), [2]),
        (aten.select.int, x(4, 3, 6), 1, -1),
        *((aten.slice.Tensor, x(4, 12), *bounds) for bounds in SLICES),
        (aten.split.Tensor, x(2, 3, 12), 4, 2),
        (aten.split.Tensor, x(12, 3), 8),
        (aten.split_with_sizes.default, x(3, 24), [12, 6, 6], -1),
        (aten.split_with_sizes.default, x(8, 3), [6, 2]),
        (aten.squeeze.default, x(2, 1, 6)),
        (aten.squeeze.default, x(3, 1, 2)),
        (aten.squeeze.dim, x(2, 1, 6), 1),
        (aten.squeeze.dim, x(2, 3, 6), 0),
        (aten.squeeze.dims, x(2, 1, 6, 1), [1, -1]),
        (aten.squeeze.dims, x(2, 1, 3), [0, 1]),
        (aten.stack.default, [x(4, 6), x(4, 6)], 1),
        (aten.stack.default, [x(4), x(4), x(4)], -1),
        (aten.to.dtype, x(4, 6), torch.float32),
        (aten.to.dtype, x(4, 6), torch.bool),
        (aten.to.dtype, mask(4, 6), torch.float64),
        (aten.to.dtype, ints(9, 4, 6), torch.float64),
        (aten.flip.default, x(4, 6), [-1]),
        (aten.glu.default, x(4, 12)),
        (aten.glu.default, x(8, 5), 0),
        (aten.glu.default, x(3, 14, 4), 1),
        (aten.mT.default, x(2, 3, 4)),
        (aten.swapaxes.default, x(2, 3, 4), 0, -1),
        (aten.transpose.int, x(2, 3, 4), 1, -1),
        (aten.tril.default, x(2, 4, 6), -1),
        (aten.triu.default, x(2, 4, 6)),
        (aten.type_as.default, x(4, 6), c(6)),
        (aten.type_as.default, x(4, 6), c(3, 5).float()),
        (aten.unbind.int, x(3, 4, 6)),
        (aten.unbind.int, x(4, 6, 2), -1),
        (aten.unsqueeze.default, x(4, 6), -1),
        (aten.unsqueeze.default, x(4, 6), 0),
    ],
    "window": lambda: [
        (aten.adaptive_avg_pool1d.default, x(4, 6, 8), [2]),
        (aten.adaptive_avg_pool2d.default, x(4, 6, 4, 4), [1, 2]),
        (aten.adaptive_avg_pool3d.default, x(4, 6, 4, 2, 2), [1, 2, 1]),
        (aten.adaptive_max_pool1d.default, x(4, 6, 8), [2]),
        (aten.adaptive_max_pool2d.default, x(4, 6, 4, 4), [1, 2]),
        (aten.adaptive_max_pool3d.default, x(4, 6, 4, 2, 2), [1, 2, 1]),
        (aten.affine_grid_generator.default, x(4, 2, 3), [4, 3, 5, 6], False),
        (aten.affine_grid_generator.default, x(4, 3, 4), [4, 1, 2, 3, 2], True),
        (aten.avg_pool1d.default, x(4, 6, 8), [2]),
        (aten.avg_pool2d.default, x(4, 6, 4, 4), [2, 2], [1, 1], [1, 1]),
        (aten.avg_pool3d.default, x(4, 6, 4, 4, 4), [2, 2, 2]),
        (aten.channel_shuffle.default, x(4, 6, 3, 3), 3),
        (aten.col2im.default, x(4, 24, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
        (aten.col2im.default, x(24, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]),
        (aten.fractional_max_pool2d.default, x(4, 6, 5, 5), [2, 2], [3, 3], DRAWN),
        (aten.fractional_max_pool3d.default, x(4, 6, 4, 4, 4), *CUBES, share(4, 6, 3).detach()),
        (aten.grid_sampler.default, x(4, 6, 4, 5), share(4, 3, 6, 2), 0, 0, False),
        (aten.grid_sampler_2d.default, x(4, 6, 4, 5), share(4, 3, 6, 2), 0, 1, True),
        (aten.grid_sampler_3d.default, x(4, 6, 4, 5, 2), share(4, 3, 2, 2, 3), 0, 0, False),
        (aten.im2col.default, x(4, 6, 4, 5), [2, 2], [1, 1], [1, 0], [2, 1]),
        (aten.im2col.default, x(6, 4, 5), [2, 2], [1, 1], [0, 0], [1, 1]),
        (aten.max_pool1d.default, x(4, 6, 8), [3], [1], [1]),
        (aten.max_pool1d_with_indices.default, x(4, 6, 8), [2]),
        (aten.max_pool2d.default, x(4, 6, 4, 4), [2, 2]),
        (aten.max_pool2d.default, x(6, 4, 4), [2, 2], [1, 1]),
        (aten.max_pool2d_with_indices.default, x(4, 6, 4, 4), [2, 2]),
        (aten.max_pool3d.default, x(4, 6, 4, 4, 4), [2, 2, 2]),
        (aten.max_pool3d_with_indices.default, x(4, 6, 4, 4, 4), [2, 2, 2]),
        (aten.max_unpool2d.default, x(4, 6, 2, 2), PLACES.expand(4, 6, 2, 2), [4, 4]),
        (aten.max_unpool2d.default, x(4, 6, 1, 1).expand(4, 6, 2, 2), ints(1, 4, 6, 2, 2), [4, 4]),
        (aten.max_unpool3d.default, x(4, 6, 1, 2, 2), PLACES.expand(4, 6, 1, 2, 2), *SPREAD),
        (aten.max_unpool3d.default, ALIKE, ints(1, 4, 6, 2, 2, 2), *TWICE),
        (aten.pixel_shuffle.default, x(4, 24, 2, 3), 2),
        (aten.pixel_shuffle.default, x(12, 6, 4), 2),
        (aten.pixel_unshuffle.default, x(4, 3, 4, 8), 2),
        *((op, x(4, 6, 3), None, [2.0]) for op in UPSAMPLE_LINES),
        *((op, x(4, 6, 2, 3), None, [2.0, 2.0]) for op in UPSAMPLE_PLANES),
        *((op, x(4, 6, 2, 3, 2), None, [2.0, 2.0, 1.0]) for op in UPSAMPLE_VOLUMES),
        (aten.upsample_linear1d.vec, x(4, 6, 3), [5], True, None),
        *((op, x(4, 6, 2, 3), [4, 6], False, None) for op in RESIZE_PLANES),
        (aten.upsample_trilinear3d.vec, x(4, 6, 2, 3, 2), [4, 6, 3], False, None),
    ],
}  # fmt: skip

torch.manual_seed(0)  # what follows is drawn when this file is imported
STEP3 = [1] * 3, [0] * 3, [1] * 3
UP3 = [2] * 3, [0] * 3, [0] * 3
BAGS = torch.tensor([0, 3, 4])
BAGGED = [False, None, False, None]
BATCHES = [x(4, 6, 5), x(6), x(6)]
IMAGES = [x(5, 6, 2, 3, 2), x(6), x(6)]
UNTRACKED = [x(3, 6, 2, 2, 2), None, x(6)]
ONES = [1, 1, 1]
PLAIN = [x(6, 4), None, x(4), c(4), share(4).detach()]
GRU = [x(6, 5), x(6, 2), x(6), x(6)]
LSTM = [x(8, 5), x(8, 2)]
STATES = [x(1, 4, 2), x(1, 4, 2)]
STATISTICS = [c(6), positive(6).detach()]
DRAWN = share(4, 6, 2).detach()
CUBES = [[2, 2, 2], [2, 2, 2]]
PLACES = torch.tensor([[0, 3], [9, 14]])
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
ALIKE = x(4, 6, 1, 1, 1).expand(4, 6, 2, 2, 2)
TWICE = [[4, 4, 4], [2, 2, 2], [0, 0, 0]]
FALLING = c(6).sort(descending=True)[0]
BACKWARDS = torch.arange(6).flip(0).expand(4, 6)
SPREAD = [[1, 4, 4], [1, 2, 2], [0, 0, 0]]
UPSAMPLE_LINES = [aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec]
UPSAMPLE_PLANES = [aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec]
UPSAMPLE_VOLUMES = [aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec]
RESIZE_PLANES = [
    aten.upsample_bicubic2d.vec, aten.upsample_bilinear2d.vec, aten._upsample_bicubic2d_aa.vec,
    aten._upsample_bilinear2d_aa.vec,
]  # fmt: skip
BOTH = [w for i in (5, 4) for _ in "-+" for w in (x(8, i), x(8, 2))]
MATRICES = [
    aten.linalg_det.default, aten.linalg_inv.default, aten.linalg_slogdet.default,
    aten.linalg_svdvals.default,
]  # fmt: skip
RNN = [x(2, 5), x(2, 2), x(2), x(2)]
SYMMETRIC = [
    aten.linalg_cholesky.default, aten.linalg_eigh.default, aten.linalg_eigvalsh.default,
    aten.logdet.default,
]  # fmt: skip
TRIPLETS = [x(4, 3, 6), x(4, 3, 6), x(4, 1, 6)]
WAYS = [x(4, 4, 2), x(4, 4, 2)]
WEIGHTED = [False, x(8), False, 3]
GROUPED = torch.ops.transformers.grouped_mm_fallback.default
EPS = [0.1, 1e-5, False]
COPIES = [
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
    aten.numpy_T.default, aten.t.default,
]  # fmt: skip
SHAPES = [
    [8, 6], [2, 24], [48], [2, 2, 2, 6], [2, 4, 2, 3], [2, 1, 4, 6], [2, 4, 3, -1], [4, 12],
    [2, 4, 6, 1], [6, 8],
]  # fmt: skip
SLICES = [
    (1, 0, 6), (1, 6, 12), (1, 4, 8), (1, 0, 9223372036854775807), (1, -4), (1, 0, 5),
    (1, 0, 12, 2), (0, 1), (1, 3, 9),
]  # fmt: skip
UNARY = [
    aten.abs.default, aten.cos.default, aten.elu.default, aten.erf.default, aten.gelu.default,
    aten.sinh.default,
    aten.mish.default, aten.relu6.default, aten.sign.default, aten.silu.default,
    aten.sin.default, aten.softplus.default, aten.square.default,
]  # fmt: skip
WITH_SCALAR = [
    aten.add.Scalar, aten.eq.Scalar, aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.lt.Scalar,
    aten.ne.Scalar, aten.sub.Scalar,
]  # fmt: skip
BINARY = [
    aten.atan2.default, aten.eq.Tensor, aten.le.Tensor, aten.maximum.default, aten.minimum.default,
    aten.ne.Tensor,
]  # fmt: skip


def calls(family):
    """Return (op, args, kwargs) of every call of a family: a dict at the end holds keywords."""
    torch.manual_seed(0)
    out = []
    for op, *args in FAMILIES[family]():
        kwargs = args.pop() if isinstance(args[-1], dict) else {}
        out.append((op, tuple(args), kwargs))
    return out
