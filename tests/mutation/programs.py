"""Local programs, exchanges, the ring, draws and gradients, with one expression damaged.

A row of DAMAGES names a function, what stands in its source, and what is put there. Each family
has its proofs: the rules that use it, by arithmetic, and the fast tests of its own file.
"""

import ast
import inspect
import itertools
import sys
from collections import Counter
from unittest import mock

import torch

from autotp import (
    collectives,
    local_lookups,
    local_losses,
    local_programs,
    local_statistics,
    random_programs,
    randomness,
    routing,
    split_attention,
)
from autotp.passes import choices
from autotp.passes.emit import move_calls, sites
from autotp.passes.rules import find
from tests.mutation.moves import random_plans_fail
from tests.mutation.mutant import Mutant, edited, raises, refuted
from tests.rules import draws, test_draws
from tests.rules.varied import FIXED
from tests.runtime import test_randomness, test_routing, test_split_attention
from tests.runtime.test_collectives import LINE, SQUARE

aten = torch.ops.aten

# Sums of local programs --------------------------------------------------------------------------

PROGRAMS = (local_lookups, local_losses, local_programs, local_statistics, split_attention)


def program_mutants():
    own = [op for op in FIXED if (rule := find(op)) and rule.program]
    for module in PROGRAMS:
        for name, line in sums_of(module):
            yield Mutant(
                "program",
                f"{module.__name__.removeprefix('autotp.')}.{name}",
                lambda module=module, line=line: without_sum(module, line),
                lambda: any(refuted(op, FIXED[op]) for op in own),
            )


def sums_of(module):
    """Yield the function and the line of every sum over ranks."""
    count = Counter()
    for top in ast.parse(inspect.getsource(module)).body:
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "total_over":
                count[top.name] += 1
                yield f"{top.name}, sum {count[top.name]}", node.lineno


def without_sum(module, line):
    total = module.total_over

    def wrong(x, axes, *op):
        here = sys._getframe(1)
        return x if here.f_lineno == line else total(x, axes, *op)

    return mock.patch.object(module, "total_over", wrong)


# Damaged expressions -----------------------------------------------------------------------------

RING = split_attention._Ring
NORM, BATCH_NORM = local_programs._Norm, local_statistics._BatchNorm
FIRST = "{}[tuple(map(slice, {}.shape))]"
"""The first rank's part for every rank."""
DAMAGES = {
    "routing": (
        (routing._send, "rows[leaving.argsort(stable=True)]", "rows"),
        (routing._send, "rows[coming.argsort(stable=True)] = got", "rows = got"),
        (routing._send, "source = moved", "pass"),
        (routing._send, "* rows.itemsize", ""),
        (routing._Exchange.forward, "(target, source, axes", "(source, target, axes"),
        (routing._peer_ranges, "range(a.size) if a in shared else (a.index,)", "range(a.size)"),
        (routing._rank, "rank * axis.size + place", "rank + place"),
        (routing.owner_places, "-((-length) // axis.size)", "length // axis.size"),
        (routing.owner_places, "torch.minimum(step, length - place * step)", "step"),
        (routing.split_index, "torch.where(index < 0, index + size_v, index)", "index"),
        (routing.split_index, "masked_fill(~here", "masked_fill(here & ~here"),
        (routing.split_index, "index - mine[0]", "index % len(rows)"),
        (routing.split_index_add, ", alpha=alpha", ""),
        (routing.split_index_add, "routes.owner == routes.me", "routes.asker == routes.me"),
        (routing.split_index_add, "[routes.asker == routes.me]]", "[routes.owner == routes.me]]"),
        (routing._routes, "here & (place == axis.index)", "here"),
        (routing._routes, "wanted[here] - low", "wanted[here]"),
        (routing._routes, "(b - a) * width", "(b - a)"),
        (routing._fetched, "routes.place[routes.asker == routes.me]", "torch.arange(len(got))"),
        (routing._gathered, "b[: high - low]", "b"),
        (routing._gathered, "reversed(axes)", "axes"),
        (routing._routed, "right=True", "right=False"),
        (routing._routed, "expert < size_e", "expert <= size_e"),
        (routing._routed, "here & (place == axis.index)", "here"),
        (routing._routed, " - my_range(size_t, split_t)[0]", ""),
        (routing._routed, " - my_range(size_e, split_e)[0]", ""),
        (routing._routed, "exchange(made, target, source,", "exchange(made, source, target,"),
        (routing._routed, ".index_copy(0, own, back)", ".index_copy(0, own.flip(0), back)"),
        (routing._aligned_product, "out[:, : out.shape[1] - o] if o else out", "out"),
    ),
    "ring": (
        (RING.forward, "total * shrink +", "total +"),
        (RING.forward, "out * shrink +", "out +"),
        (RING.forward, "widened(query) * scale", "widened(query)"),
        (RING.forward, "total.masked_fill(total == 0, 1)", "total"),
        (RING.forward, "columns[0] >= causal[1]", "columns[0] >= causal[0]"),
        (RING.backward, "columns[0] >= causal[1]", "columns[0] >= causal[0]"),
        (RING.backward, "grad @ v.mT - along", "grad @ v.mT"),
        (RING.backward, "held[1] = axes[level].permute(held[1], by)", "pass"),
        (RING.backward, "dq * scale", "dq"),
        (RING.backward, "dq += dx @ k", "dq = dx @ k"),
        (RING.backward, "block += dx", "block[:] = 2 * dx"),
        (RING.backward, "p.mT @ grad", "grad.mT.mT"),
        (split_attention._travel, "- 1) %", "+ 1) %"),
        (split_attention._lower, ">= column", "> column"),
        (split_attention._scores, "columns[1] - 1 > causal[0]", "columns[1] - 1 > causal[1]"),
        (split_attention._scores, "~block", "block"),
        (split_attention._columns, "mask.shape[-1] == 1", "False"),
        (split_attention._columns, "columns[0], columns[1]", "0, columns[1]"),
        (split_attention._exp, "top.masked_fill(top == -math.inf, 0)", "top"),
        (split_attention._by_key_heads, "if mask.shape[-3] == 1 else", "if True else"),
        (split_attention.way_home, "-steps.count", "steps.count"),
        (split_attention.split_attention, "_lower(rows, (0", "_lower((0, rows[1] - rows[0]), (0"),
        (split_attention.split_attention, "rows if is_causal else None", "None"),
    ),
    "random": (
        (random_programs.dropout, "1 / (1 - p)", "1"),
        (random_programs.dropout, "keep_mask(x, p,", "keep_mask(x, 1 - p,"),
        (random_programs.dropout, "rng, site, split)", "rng, 0, split)"),
        (random_programs.dropout, "rng, site, split)", "rng, site, ())"),
        (random_programs._Masked.backward, "grad * mask", "grad"),
        (random_programs._Masked.backward, "* ctx.scale", ""),
        (random_programs.sdpa_dropout, "[axis.index for axis in split]", "[]"),
        (random_programs.sdpa_dropout, "rng.step_seed, site", "rng.step_seed, 0"),
        (random_programs.sdpa_dropout, "rng.step_seed, site", "0, site"),
        (random_programs.exact_dropout, "blank(x, wholes[0])", "torch.ones_like(x)"),
        (random_programs.exact_dropout, "cut(noise, results[0])", FIRST.format("noise", "x")),
        (random_programs.exact_sdpa, "True, rng=rng), results[0])", "True, rng=rng), ())"),
        (random_programs.exact_sdpa, "repeat_interleave(groups, -3)", "repeat(1, groups, 1, 1)"),
        (random_programs.exact_sdpa, ".tril()", ""),
        (random_programs.exact_sdpa, "if scale is None else scale", ""),
        (random_programs.exact_sdpa, "scores + attn_mask", "scores"),
        (random_programs.exact_part, "put(a, next(rest))", "blank(a, next(rest))"),
        (random_programs.exact_part, "cut(made, results[0])", "made"),
        (random_programs.exact_part, "cut(m, part)", "m"),
        (random_programs.blank, "empty_strided(shape, stride,", "empty(shape,"),
        (random_programs.cut, "for a, b in ranges", "for a, b in ranges[::-1]"),
        (randomness.site_seed, "(site, len(coords), *coords)", "(len(coords), *coords)"),
        (randomness.site_seed, "(site, len(coords), *coords)", "(site, len(coords))"),
        (randomness.seeded_call, "[axis.index for axis in split]", "[]"),
        (randomness.seeded_call, "rng.step_seed, site", "rng.step_seed, 0"),
        (randomness.drawn_call, "rng.own[device] = generator.get_state()", "pass"),
        (randomness.drawn_call, "rng.step_seed, device", "0, device"),
        (sites.Sites._site, "self.count += 1", "pass"),
        (sites.Sites.split, '"split": axes', '"split": ()'),
        (sites.Sites._exact, "rule.exact or exact_part", "exact_part"),
    ),
    "gradient": (
        (choices._split, "R if g else I", "I"),
        (choices._split, "P if summed and i in sig.added else", ""),
        (choices.axis_choices, '"R", R, R', '"R", R, I'),
        (choices._partial_choices, "R if g else I for g", "I for g"),
        (choices._partial_choices, "P if i == k or i in op.signature.added", "P if i == k"),
        (collectives._move, "x.requires_grad and", "False and"),
        (collectives._Move.backward, "ctx.dual, ctx.kernel", "ctx.kernel, ctx.kernel"),
        (move_calls.move_args, 'else {"to": to}', 'else {"to": "I"}'),
        (move_calls.move_args, 'return {"to": to}', 'return {"to": "I"}'),
        (NORM.backward, "dw = (grad * xhat)", "dw = total_over(grad * xhat, ctx.axes)"),
        (NORM.backward, "db = grad.sum_to_size", "db = total_over(grad, ctx.axes).sum_to_size"),
        (NORM.backward, "h - xhat * along", "h"),
        (BATCH_NORM.backward, "dw.to(weight.dtype)", "(along * ctx.count).to(weight.dtype)"),
        (BATCH_NORM.backward, "db.to(ctx.bias_dtype)", "(flat * ctx.count).to(ctx.bias_dtype)"),
    ),
}


def damage_mutants(kind):
    for function, old, new in DAMAGES[kind]:
        yield Mutant(
            kind,
            f"{inspect.unwrap(function).__qualname__}: {old} -> {new or 'nothing'}",
            lambda function=function, old=old, new=new: edited(function, old, new),
            NOTICED[kind],
        )


# What notices them -------------------------------------------------------------------------------

BATCHED = aten._native_batch_norm_legit_functional.default
ROUTERS = {
    routing.split_index, routing.split_index_select, routing.split_index_add,
    routing.grouped_mm, routing.grouped_mm_fallback,
}  # fmt: skip
PROOFS_OF_DRAWS = (
    test_randomness.test_dropout_scales_and_sends_the_gradient_through_its_mask,
    test_randomness.test_site_seeds_are_fixed_and_distinct,
)
ATTENTION = aten.scaled_dot_product_attention.default
ROUTED = [op for op in FIXED if (rule := find(op)) and rule.program in ROUTERS]
DRAWING = [op for op in FIXED if (rule := find(op)) and rule.random]
GRADIENTS = (aten.linear.default, aten.layer_norm.default, BATCHED, aten.mul.Tensor)


def routing_is_off():
    exchanged = test_routing.test_an_exchange_brings_rows_to_their_targets_and_gradients_back
    looked_up = test_routing.test_a_lookup_whose_table_and_indices_are_split_over_all_axes
    return (
        any(raises(exchanged, grid) for grid in (LINE, SQUARE, test_routing.CUBE))
        or any(raises(test_routing.test_owners_are_those_that_hold_the_chunks, n) for n in (24, 13))
        or any(raises(looked_up, grid) for grid in (SQUARE, test_routing.CUBE))
        or any(refuted(op, FIXED[op]) for op in ROUTED)
    )


def ring_is_off():
    tried = itertools.product(test_split_attention.PLACES, test_split_attention.MASKS)
    check = test_split_attention.check_attention
    return (
        raises(test_split_attention.test_a_tour_meets_every_rank_and_comes_home)
        or any(raises(check, *place_and_mask) for place_and_mask in tried)
        or refuted(ATTENTION, FIXED[ATTENTION])
    )


def draws_are_off():
    apart = test_draws.test_sites_of_a_program_draw_apart_and_every_step_anew
    alike = test_randomness.test_masks_are_equal_where_replicated_and_different_where_split
    return (
        any(raises(alike, fn) for fn in (test_randomness.drop, test_randomness.attend))
        or any(raises(proof) for proof in PROOFS_OF_DRAWS)
        or any(raises(apart, rng) for rng in ("fast", "exact"))
        or any(raises(draws.assert_drawn_like_one, *call) for call in draws.CALLS)
        or any(refuted(op, FIXED[op]) for op in DRAWING)
    )


def gradients_are_off():
    return any(refuted(op, FIXED[op]) for op in GRADIENTS) or random_plans_fail()


NOTICED = {
    "routing": routing_is_off,
    "ring": ring_is_off,
    "random": draws_are_off,
    "gradient": gradients_are_off,
}
