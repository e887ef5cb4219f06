"""What a line of a random program may be: one function per family, from what is there to a text.

A text is an expression, or statements that make `{out}`. A family raises Skip where nothing fits.
"""

import math


class Skip(Exception):
    """This line cannot be written here; another may."""


POINTWISE = """
torch.tanh({a}) | torch.sigmoid({a}) | F.gelu({a}) | F.gelu({a}, approximate="tanh") | F.relu({a})
F.silu({a}) | -{a} | torch.exp(-{a}.abs()) | {a}.square() * 0.1 | {a}.abs() | 0.5 * {a} | {a} + 1.5
3 - {a} | {a} / 3 | {a}.clamp(-1, 1) | ({a} ** 2 + 1).rsqrt() | (1 + {a}.abs()).log() | {a}.sin()
{a} * 2 - 1 | F.elu({a}) | F.leaky_relu({a}, 0.1) | F.softplus({a}) | {a}.erf() | F.hardswish({a})
1 / (1 + {a}.square()) | ({a}.abs() + 0.5).sqrt() | {a}.detach() | {a}.clone() | {a} * {a}.detach()
{a}.to(torch.float64) | F.dropout({a}, 0.3, self_training) | {a}.sign() * {a} | F.mish({a})
torch.full_like({a}, 0.5) * {a} | torch.zeros_like({a}) + {a} | {a} * torch.ones_like({a})
"""
PAIRS = """
{a} + {b} | {a} + {b} | {a} - {b} | {a} * {b} | {a} / (1 + {b}.square()) | {b} - {a} | {b} * {a}
torch.maximum({a}, {b}) | torch.minimum({a}, {b}) | torch.add({a}, {b}, alpha=2) | {a} + {b} + {a}
torch.where({m}, {a}, {b}) | torch.where({m}, {b}, {a}) | torch.lerp({a}, {b}, 0.3)
torch.addcmul({a}, {b}, {a}, value=0.5) | {a}.masked_fill({m}, 0.5) | torch.where({m}, {a}, 0.0)
torch.where({a} > {b}, {a}, {b} * 0.1) | torch.where({m}, -1.0, {a}) | torch.atan2({a}, {b})
torch.sub({a}, {b}, alpha=3) | {a}.masked_fill(~{m}, -2.0) | {a}.expand_as({a}) * {b}
torch.broadcast_tensors({a}, {b})
"""
NORMS = """
F.layer_norm({a}, ({n},), {w}, {c}) | F.layer_norm({a}, ({n},)) | F.layer_norm({a}, ({n},), {w})
F.rms_norm({a}, ({n},), {w}) | F.rms_norm({a}, ({n},)) | {a}.softmax(-1) | {a}.log_softmax(-1)
F.layer_norm({a}, ({n},), None, {c})
{a} * ({a}.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * {w}
({a} - {a}.mean(-1, keepdim=True)) / ({a}.var(-1, keepdim=True) + 1).sqrt() | {a}.softmax({d})
F.normalize({a}, dim=-1) | {a}.log_softmax({d}) | ({a} * {w}).softmax(-1)
"""
REDUCTIONS = """
{a}.sum({d}) | {a}.mean({d}) | {a}.sum({d}, keepdim=True) | {a}.mean({d}, keepdim=True)
{a}.sum(({d}, {e})) | {a}.mean(({d}, {e})) | {a}.amax({d}) | {a}.logsumexp({d}) | {a}.cumsum({d})
{a}.var({d}) | {a}.std({d}, keepdim=True) | {a}.norm(dim={d}) | {a}.sigmoid().prod({d})
{a}.sum() | {a}.mean() | {a}.max() | {a}.max({d}).values | {a}.min({d}).values | {a}.square().sum()
{a}.topk(2, {d})[0] | {a}.sort({d})[0] | torch.var_mean({a}, {d}) | {a}.amin({d})
{a} - {a}.mean({d}, keepdim=True) | {a} / (1 + {a}.abs().sum({d}, keepdim=True))
{a}.mean(({d}, {e}), keepdim=True) | {a}.logsumexp(({d}, {e}))
"""
MOVES = """
{a}.transpose({d}, {e}) | {a}.unsqueeze({d}) | {a}.mT | {a}.movedim({d}, {e}) | {a}.flip({d})
{a}.flatten({f}, {g}) | {a}.flatten() | {a}.roll(1, {d}) | {a}.tril() | {a}.triu(1)
{a}.contiguous() | {a}.transpose({d}, {e}).contiguous() | {a}.unsqueeze(0).squeeze(0)
{a}.repeat_interleave(2, {d}) | torch.stack([{a}, {a} * 0.5], {d}) | {a}.diff(dim={d})
torch.cat([{a}, {a}.tanh()], {d}) | F.pad({a}, (1, 0)) | F.pad({a}, (0, 0, 0, 1))
{a}.transpose(0, -1).flatten(0, 1)
"""


def texts(table):
    """Return the texts of a table; `|` and line ends stand between them."""
    return [t.strip() for line in table.strip().split("\n") for t in line.split(" | ")]


def from_table(table, *ndims):
    """Return a family that fills a text of a table with what is there."""
    choices = texts(table)

    def family(g):
        a = g.value(*ndims)
        text = g.rng.choice(choices)
        shape = g.shape(a)
        dims = sorted(g.rng.sample(range(len(shape)), min(2, len(shape)))) or [0]
        first, last = dims[0], dims[-1]
        fill = {
            "a": a,
            "d": first if g.rng.random() < 0.5 else first - len(shape),
            "e": last,
            "f": first,
            "g": last,
            "n": shape[-1] if shape else 1,
        }
        need = {
            "b": lambda: g.beside(a),
            "m": lambda: g.mask(shape),
            "w": lambda: g.parameter(shape[-1:]),
            "c": lambda: g.parameter(shape[-1:]),
        }
        fill |= {k: make() for k, make in need.items() if f"{{{k}}}" in text}
        return text.replace("self_training", "self.training").format(**fill)

    return family


# Products ----------------------------------------------------------------------------------------


def linear(g):
    a = g.value(where=lambda s: len(s) > 0)
    o, i = g.size(), g.shape(a)[-1]
    w, bias = g.parameter((o, i)), f", {g.parameter((o,))}" if g.rng.random() < 0.6 else ""
    return f"F.linear({a}, {w}{bias})"


def product(g):
    """A product with a parameter, in one of the ways to write it."""
    a = g.value(2, 3, 4)
    i, o = g.shape(a)[-1], g.size()
    w = g.parameter((i, o))
    forms = ["{a} @ {w}", 'torch.einsum("...i,io->...o", {a}, {w})', "torch.matmul({a}, {w})"]
    if len(g.shape(a)) == 2:
        forms += ["torch.mm({a}, {w})", "torch.addmm({b}, {a}, {w})"]
        forms += ["torch.addmm({b}, {a}, {w}, beta=0.5, alpha=2)"]
    return g.rng.choice(forms).format(a=a, w=w, b=g.parameter((o,)))


def mlp(g):
    """Two products with something pointwise between them, and the residual."""
    a = g.value(2, 3)
    i, o = g.shape(a)[-1], g.size()
    act = g.rng.choice(["F.gelu({})", "F.relu({})", "torch.tanh({})", "{}"])
    up = act.format(f"F.linear({a}, {g.parameter((o, i))}, {g.parameter((o,))})")
    down = f"F.linear({up}, {g.parameter((i, o))})"
    return f"{a} + {down}" if g.rng.random() < 0.7 else down


def batched(g):
    """A product of two values, or of a value with itself."""
    a = g.value(3, 4)
    forms = ["{a} @ {a}.mT", "{a}.mT @ {a}", 'torch.einsum("...sd,...td->...st", {a}, {a})']
    if len(g.shape(a)) == 3:
        forms += ["torch.bmm({a}, {a}.mT)", "torch.baddbmm({p}, {a}, {a}.mT)"]
    s = g.shape(a)[-2]
    return g.rng.choice(forms).format(a=a, p=g.parameter((s, s))) + " * 0.3"


def vectors(g):
    a = g.value(1)
    p = g.parameter(g.shape(a))
    return g.rng.choice([f"torch.outer({a}, {p})", f"torch.dot({a}, {p})", f"{a} @ {a}"])


def matrix_vector(g):
    a = g.value(2, 3)
    p = g.parameter(g.shape(a)[-1:])
    return f"{a} @ {p}" if len(g.shape(a)) > 2 else f"torch.mv({a}, {p})"


def conv(g):
    """A convolution with a kernel of 1, 2 or 3, at times grouped or strided."""
    a = g.value(3, 4)
    dims = len(g.shape(a)) - 2
    c, o = g.shape(a)[1], g.size()
    groups = c if g.rng.random() < 0.2 else 1
    o, k = (c if groups > 1 else o), g.rng.randint(1, 3)
    w = g.parameter((o, c // groups, *(k,) * dims))
    bias = g.parameter((o,)) if g.rng.random() < 0.5 else None
    return (
        f"F.conv{dims}d({a}, {w}, {bias}, stride={g.rng.randint(1, 2)}, padding=1, groups={groups})"
    )


# Views -------------------------------------------------------------------------------------------


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def reshape(g):
    """Any shape with as many elements: dims merged, split and cut anew."""
    a = g.value(where=lambda s: len(s) > 0)
    left, sizes = math.prod(g.shape(a)), []
    for _ in range(g.rng.randint(0, 3)):
        sizes.append(g.rng.choice(divisors(left)))
        left //= sizes[-1]
    sizes.append(left)
    g.rng.shuffle(sizes)
    if g.rng.random() < 0.3:
        sizes[g.rng.randrange(len(sizes))] = -1
    return f"{a}.reshape({sizes})"


def regroup(g):
    """Split one dim, or merge two neighbours: what heads do."""
    a = g.value(where=lambda s: len(s) > 0)
    shape = list(g.shape(a))
    d = g.rng.randrange(len(shape))
    if g.rng.random() < 0.4 and d + 1 < len(shape):
        return f"{a}.reshape({[*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :]]})"
    k = g.rng.choice([k for k in divisors(shape[d]) if k > 1] or [1])
    method = g.rng.choice(["reshape", "unflatten"])
    if method == "unflatten":
        return f"{a}.unflatten({d}, ({k}, -1))"
    return f"{a}.reshape({[*shape[:d], k, shape[d] // k, *shape[d + 1 :]]})"


def permute(g):
    a = g.value(2, 3, 4)
    dims = list(range(len(g.shape(a))))
    g.rng.shuffle(dims)
    return f"{a}.permute({dims})"


def expand(g):
    a = g.value()
    shape = [g.size() if n == 1 else n for n in g.shape(a)]
    new = [g.rng.choice([2, 3])] if g.rng.random() < 0.5 else []
    return g.rng.choice([f"{a}.expand({new + shape})", f"{a}.repeat({new + [1] * len(shape)})"])


def repeat(g):
    a = g.value(1, 2, 3)
    times = [g.rng.choice([1, 1, 2]) for _ in g.shape(a)]
    return f"{a}.repeat({times})"


def pieces(g):
    """A fused dim taken apart: split, chunk, unbind or unflattened, all pieces or some."""
    a = g.value(where=lambda s: len(s) > 0)
    d = g.dim(a)
    n = g.shape(a)[d]
    k = g.rng.choice([k for k in divisors(n) if 1 < k <= 4] or [1])
    cut = g.rng.randint(1, max(n - 1, 1))
    forms = [f"{a}.chunk({k}, {d})", f"{a}.split({n // k}, {d})"]
    if 0 < cut < n:
        forms += [f"{a}.split([{cut}, {n - cut}], {d})"]
    if n % 4 == 0:
        forms += [f"{a}.split([{n // 2}, {n // 4}, {n // 4}], {d})"]
    if n <= 4:
        forms += [f"{a}.unbind({d})"]
    return g.rng.choice(forms)


def fused(g):
    """A projection made in one product and taken apart."""
    a = g.value(2, 3)
    i, o, k = g.shape(a)[-1], g.rng.choice([2, 4, 6]), g.rng.choice([2, 3])
    w = g.parameter((k * o, i))
    whole = f"F.linear({a}, {w})"
    forms = [
        f"{whole}.chunk({k}, -1)", f"{whole}.split({o}, -1)",
        f"{whole}.unflatten(-1, ({k}, {o})).unbind(-2)",
        f"{whole}.unflatten(-1, ({o}, {k})).unbind(-1)",
        f"{whole}[..., {o}:] * {whole}[..., :{(k - 1) * o}]",
    ]  # fmt: skip
    return g.rng.choice(forms)


def taken(g):
    """A slice, a row, or a few."""
    a = g.value(where=lambda s: len(s) > 0)
    d = g.dim(a)
    n = g.shape(a)[d]
    lead = ", ".join(":" for _ in range(d % len(g.shape(a))))
    lead += ", " if lead else ""
    low = g.rng.randrange(n)
    high = g.rng.randint(low + 1, n)
    forms = [
        f"{a}.select({d}, {g.rng.randrange(-n, n)})", f"{a}[{lead}{low}:{high}]",
        f"{a}.narrow({d}, {low}, {high - low})", f"{a}[{lead}::2]", f"{a}[{lead}{n // 2}:]",
        f"{a}[{lead}: {n // 2 or 1}]", f"{a}[{lead}[0, {n - 1}, {low}]]",
        f"{a}.index_select({d}, {g.ints(n, (4,))})", f"{a}[{lead}{g.ints(n, (2, 3))}]",
    ]  # fmt: skip
    return g.rng.choice(forms)


def joined(g):
    """Several values side by side, or on top of each other."""
    a = g.value(where=lambda s: len(s) > 0)
    d = g.dim(a) % len(g.shape(a))
    rest = [n for k, n in enumerate(g.shape(a)) if k != d]
    others = [
        n for n in g.values()
        if len(g.shape(n)) == len(g.shape(a)) and g.scope[n].is_floating_point()
        and [m for k, m in enumerate(g.shape(n)) if k != d] == rest
    ]  # fmt: skip
    names = [a, *g.rng.choices(others, k=g.rng.randint(1, 2))]
    alike = all(g.shape(n) == g.shape(a) for n in names)
    g.rng.shuffle(names)
    join = "stack" if alike and g.rng.random() < 0.3 else "cat"
    return f"torch.{join}([{', '.join(names)}], {d})"


# Lookups -----------------------------------------------------------------------------------------


def embedding(g):
    ids = g.any(lambda t: not t.is_floating_point() and t.dtype.itemsize == 8 and t.ndim < 4)
    count = max(int(g.scope[ids].max()) + 1, 2) + g.rng.choice([0, 1, 3])
    if g.scope[ids].min() < 0:
        raise Skip
    table = g.parameter((count, g.size()))
    padding = f", padding_idx={g.rng.randrange(count)}" if g.rng.random() < 0.3 else ""
    ids = ids if ids[0] == "x" else f"{ids} % {count}"
    return f"F.embedding({ids}, {table}{padding})"


def tokens(g):
    """New tokens, looked up at once."""
    high, shape = g.rng.choice([5, 8, 12]), g.rng.choice([(4, 6), (2, 4), (8,), (6, 4)])
    ids = g.ints(high, shape)
    return f"F.embedding({ids}, {g.parameter((high, g.size()))})"


def indices(g):
    """What is no float, made of what is."""
    a = g.value(where=lambda s: len(s) > 0)
    d = g.dim(a)
    forms = ["{a}.argmax({d})", "{a} > 0.1", "{a}.argsort({d})", "{a}.argmin({d}, keepdim=True)"]
    forms += ["({a} > 0).any({d})", "({a} > -1).all({d}, keepdim=True)", "{a}.sign().long().abs()"]
    forms += ["({a} * 3).floor().long().clamp(0, 4)", "{a}.detach() > {a}.detach().mean()"]
    return g.rng.choice(forms).format(a=a, d=d)


def gather(g):
    a = g.value(1, 2, 3)
    d = g.dim(a)
    shape = list(g.shape(a))
    high, shape[d] = shape[d], g.size()
    return f"{a}.gather({d}, {g.ints(high, shape)})"


def scatter(g):
    """Add rows to rows, or set them."""
    a = g.value(2, 3)
    d = g.dim(a)
    shape = list(g.shape(a))
    high, shape[d] = shape[d], g.size()
    source = g.any(lambda t: t.is_floating_point() and list(t.shape) == list(g.shape(a)))
    forms = [
        f"{a}.index_add({d}, {g.ints(high, (high,))}, {source})",
        f"{a}.scatter_add({d}, {g.ints(high, g.shape(a))}, {source})",
        f"{a}.scatter({d}, {g.ints(high, g.shape(a))}, 0.5)",
        f"torch.zeros_like({a}).scatter_add({d}, {g.ints(high, g.shape(a))}, {source})",
    ]
    return g.rng.choice(forms)


# Masks, places, attention ------------------------------------------------------------------------


def causal(g):
    """A mask that is built in the graph, of positions only."""
    a = g.value(3, 4)
    s, t = g.shape(a)[-2:]
    return (
        f"rows = torch.arange({s}, device={a}.device)[:, None]\n"
        f"keep = rows >= torch.arange({t}, device={a}.device)\n"
        f"{{out}} = {a}.masked_fill(~keep, -2.0)"
    )


def positions(g):
    """Places added, from a table or as waves, as a transformer does."""
    a = g.value(3)
    s, d = g.shape(a)[-2:]
    table = g.parameter((s + g.rng.choice([0, 2]), d))
    if g.rng.random() < 0.5:
        return f"{a} + F.embedding(torch.arange({s}, device={a}.device), {table})"
    return (
        f"with torch.no_grad():\n"
        f"    angle = torch.arange({s}, device={a}.device).double()[:, None] / {d}\n"
        f"    wave = torch.cat([angle.cos().expand({s}, {d - 1}), angle.sin()], -1)\n"
        f"{{out}} = {a} * wave"
    )


def attention(g):
    """Attention of heads, with one of its masks, by the fused op or step by step."""
    a = g.value(3, where=lambda s: s[2] % 2 == 0)
    b, s, d = g.shape(a)
    heads, keys = g.rng.choice([(2, 2), (4, 2), (4, 4), (2, 1), (6, 3), (3, 3)])
    size = g.rng.choice([2, 3])
    q, k, v = (g.parameter((n * size, d)) for n in (heads, keys, keys))
    lines = [
        f"q, k, v = F.linear({a}, {q}), F.linear({a}, {k}), F.linear({a}, {v})",
        f"q = q.view({b}, {s}, {heads}, {size}).transpose(1, 2)",
        f"k = k.view({b}, {s}, {keys}, {size}).transpose(1, 2)",
        f"v = v.view({b}, {s}, {keys}, {size}).transpose(1, 2)",
    ]
    if keys != heads and g.rng.random() < 0.5:
        lines.append(f"k, v = (t.repeat_interleave({heads // keys}, 1) for t in (k, v))")
        keys = heads
    lines += weighed(g, (b, s), "enable_gqa=True" if keys != heads else "")
    lines.append(f"{{out}} = y.transpose(1, 2).reshape({b}, {s}, {heads * size})")
    return "\n".join(lines)


def weighed(g, rows, grouped):
    """Return the lines that weigh v by q and k."""
    b, s = rows
    form = g.rng.choice(["plain", "causal", "mask", *([] if grouped else ["eager"])])
    more = f", {grouped}" if grouped else ""
    if form == "eager":
        return ["w = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)", "y = w @ v"]
    if form == "causal":
        return [f"y = F.scaled_dot_product_attention(q, k, v, is_causal=True{more})"]
    if form == "mask":
        shape = g.rng.choice([(b, 1, 1, s), (b, 1, s, s), (s, s), (1, 1, s, s)])
        keep = g.input(f"torch.rand({list(shape)}) > 0.3")
        keep = f"{keep} | torch.eye({s}, dtype=torch.bool)"
        return [f"y = F.scaled_dot_product_attention(q, k, v, {keep}{more})"]
    return [f"y = F.scaled_dot_product_attention(q, k, v{more})"]


def loss(g):
    """A loss over what is there; its targets are an input."""
    a = g.value(2, 3)
    shape = g.shape(a)
    rows, classes = math.prod(shape[:-1]), shape[-1]
    kind = g.rng.choice(["mean", "sum", "none"])
    forms = {
        "cross": "F.cross_entropy({a}.reshape(-1, {c}), {t}, reduction={k!r}{s})",
        "nll": "F.nll_loss({a}.log_softmax(-1).reshape(-1, {c}), {t}, reduction={k!r})",
        "mse": "F.mse_loss({a}, {b}.expand({shape}), reduction={k!r})",
        "l1": "F.l1_loss({a}, {b}.expand({shape}), reduction={k!r})",
        "huber": "F.smooth_l1_loss({a}, {b}.expand({shape}), reduction={k!r})",
        "bce": "F.binary_cross_entropy_with_logits({a}, {b}.sigmoid().expand({shape}), reduction={k!r})",  # noqa: E501
    }
    text = forms[g.rng.choice([*forms, "cross", "cross"])]
    fill = {"a": a, "c": classes, "k": kind, "shape": list(shape)}
    fill["s"] = g.rng.choice(["", ", label_smoothing=0.1", ", ignore_index=1"])
    fill["t"] = g.ints(classes, (rows,)) if "{t}" in text else ""
    fill["b"] = g.beside(a) if "{b}" in text else ""
    return text.format(**fill)


# Writes ------------------------------------------------------------------------------------------


def in_place(g):
    """A copy that is written to."""
    a = g.value(where=lambda s: len(s) > 0)
    n = g.shape(a)[-1]
    forms = [
        "{out}.add_({b})", "{out}.mul_({b})", "{out}.masked_fill_({m}, 0.5)", "{out}.mul_(0.5)",
        "{out}[..., 0] = 0.5", "{out}[..., {h}:] = 0.0", "{out}[..., {h}:] += 1.0",
        "{out}[..., :1] = {a}[..., -1:]", "{out}.relu_()", "{out}.tanh_()", "{out}.copy_({b})",
        "{out}.sub_({b}).div_(2)", "{out}[0] = {out}[-1] * 2", "{out}.clamp_(-1, 1)",
    ]  # fmt: skip
    text = g.rng.choice(forms)
    fill = {"a": a, "h": n // 2, "out": "{out}"}
    fill["b"] = g.beside(a) if "{b}" in text else ""
    fill["m"] = g.mask(g.shape(a)) if "{m}" in text else ""
    return f"{{out}} = {a}.clone()\n" + text.format(**fill)


def quiet(g):
    """What is computed without gradient."""
    a = g.value()
    text = g.rng.choice(["{a}.tanh()", "{a}.abs() + 1", "{a}.mean()", "{a} * 0.5"]).format(a=a)
    return f"with torch.no_grad():\n    {{out}} = {text}"


def windows(g):
    a = g.value(3, 4)
    dims = len(g.shape(a)) - 2
    forms = ["F.avg_pool{n}d({a}, 2)", "F.max_pool{n}d({a}, 2)", "F.adaptive_avg_pool{n}d({a}, 1)"]
    return g.rng.choice(forms).format(a=a, n=dims)


def grouped_norm(g):
    a = g.value(3, 4, where=lambda s: s[1] % 2 == 0)
    c = g.shape(a)[1]
    forms = ["F.group_norm({a}, 2, {w}, {b})", "F.batch_norm({a}, None, None, {w}, {b}, True)"]
    forms += ["F.group_norm({a}, 1)", "F.instance_norm({a})"]
    w, b = g.parameter((c,)), g.parameter((c,))
    return g.rng.choice(forms).format(a=a, w=w, b=b)


FAMILIES = {
    from_table(POINTWISE): 6,
    from_table(PAIRS): 8,
    from_table(NORMS, 1, 2, 3, 4): 3,
    from_table(REDUCTIONS, 1, 2, 3, 4): 4,
    from_table(MOVES, 2, 3, 4): 4,
    linear: 5, product: 3, mlp: 2, batched: 2, vectors: 1, matrix_vector: 1, conv: 2,
    reshape: 3, regroup: 4, permute: 2, expand: 2, repeat: 1, pieces: 3, fused: 3, taken: 3,
    joined: 3, embedding: 2, tokens: 1, indices: 2, gather: 1, scatter: 1, causal: 1,
    positions: 1, attention: 2, loss: 2, in_place: 2, quiet: 1, windows: 1, grouped_norm: 1,
}  # fmt: skip
