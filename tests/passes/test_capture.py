"""Capture: the graph computes what the model computes, gradients and buffers included."""

import copy
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotp.errors import CaptureError, InputError
from autotp.passes.capture.model import capture

transformers = pytest.importorskip("transformers")


# ---- the models


class NanoGPT(nn.Module):
    def __init__(self, h=16, heads=4, vocab=31, layers=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, h), nn.Embedding(8, h)
        self.blocks = nn.ModuleList(Block(h, heads) for _ in range(layers))
        self.head = nn.Linear(h, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).view(-1, 31), targets.view(-1))


class Block(nn.Module):
    def __init__(self, h, heads):
        super().__init__()
        self.heads, self.ln = heads, nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = self.qkv(self.ln(x)).split(h, dim=2)
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.proj(y.transpose(1, 2).contiguous().view(b, s, h)))


class Pair(nn.Module):
    """Two linears; subclasses say what happens between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class MLP(Pair):
    def forward(self, x):
        return self.b(F.gelu(self.a(x))).sum()


class NoGrad(Pair):
    def forward(self, x):
        with torch.no_grad():
            scale = self.a(x) * 2
        frozen = self.a(x)
        frozen.detach_()
        return (self.b(x) * scale + frozen * self.a(x.detach()) + self.b(x).detach()).square().sum()


class DetachedViews(Pair):
    def forward(self, x):
        with torch.no_grad():
            scale = self.a(x) * 2
        flat = self.a(x).flatten().detach() + self.b(x).mT.unsqueeze(0).to(x.dtype).flatten()
        halves = self.a(x).expand(2, -1, -1).detach().flatten(1)
        return (flat * halves * scale.flatten()).square().sum()


class NestedGrad(Pair):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
            with torch.enable_grad():
                z = self.b(x)
            y = y * z
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = y + self.b(y)
        return (y * z).sum()


class Autocast(Pair):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.autocast("cpu", enabled=False):
                y = self.a(y.float())
            y = self.b(y)
        with torch.autocast("cpu", enabled=False):
            return self.b(y.float()).square().sum()


class InPlace(Pair):
    def forward(self, x):
        y = self.a(x)
        y.add_(1)
        y[:, 0] = 2
        y[:, 1] = self.b(x)[:, 2]
        y[:, 2:].mul_(3).relu_()
        return (self.b(y) + torch.tensor([1.0, 2.0, 3.0, 4.0])).square().sum()


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        y = self.bn(self.conv(x)).mean((2, 3)) * self.scale
        self.steps += 1
        with torch.no_grad():
            self.scale = self.scale * 0.9 + y.mean(0) * 0.1
        return y.square().sum()


class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, mask):
        return self.encoder(x, src_key_padding_mask=mask).square().sum()


class CopyInto(Pair):
    def forward(self, x):
        out = torch.zeros(2, 3, 4)
        out[0].copy_(self.a(x))
        out[1] = self.b(x)[0]
        return out.square().sum()


def hugging(kind, config, **fields):
    config = getattr(transformers, config)(**fields)
    return lambda: getattr(transformers, kind)(config)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 31, "n_positions": 16}


def tokens(**more):
    ids = torch.randint(0, 31, (2, 8))
    return {"input_ids": ids, "labels": ids} | more


def images():
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}


def rows(n=3):
    return {"x": torch.randn(n, 4)}


MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CASES = {
    "mlp": (MLP, rows),
    "nanogpt": (NanoGPT, lambda: dict(zip(("ids", "targets"), tokens().values(), strict=True))),
    "no_grad": (NoGrad, rows),
    "detached_views": (DetachedViews, rows),
    "nested_grad": (NestedGrad, rows),
    "autocast": (Autocast, rows),
    "in_place": (InPlace, rows),
    "copy_into": (CopyInto, rows),
    "buffers": (Buffers, lambda: {"x": torch.randn(2, 3, 6, 6)}),
    "encoder": (lambda: Encoder(True), lambda: {"x": torch.randn(2, 5, 16), "mask": MASK}),
    "encoder_seq": (lambda: Encoder(False), lambda: {"x": torch.randn(5, 2, 16), "mask": MASK}),
    "gpt2": (hugging("GPT2LMHeadModel", "GPT2Config", **GPT2), tokens),
    "gpt2_eager": (
        hugging("GPT2LMHeadModel", "GPT2Config", attn_implementation="eager", **GPT2),
        lambda: tokens(use_cache=False),
    ),
    "llama": (
        hugging(
            "LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, intermediate_size=24, **SMALL
        ),
        tokens,
    ),
    "bert": (
        hugging("BertForMaskedLM", "BertConfig", intermediate_size=24, **SMALL),
        lambda: tokens(attention_mask=(~MASK).long().repeat(1, 2)[:, :8]),
    ),
    "vit": (
        hugging(
            "ViTForImageClassification",
            "ViTConfig",
            image_size=8,
            patch_size=4,
            intermediate_size=24,
            **SMALL,
        ),
        images,
    ),
}


# ---- the comparison


def loss_of(out):
    return out.loss if hasattr(out, "loss") else out


def run_program(program, model, args, kwargs):
    """Run the graph on the values of `model`; return the outputs, and the new buffers."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = [params[fqn] for fqn in program.params.values()]
    values += [buffers[fqn] for fqn in program.buffers.values()]
    values += [*program.constants.values(), *program.flatten_inputs(args, kwargs)]
    out = program.graph_module(*values)
    user = len(program.outputs)
    return program.unflatten_outputs(out[:user]), dict(
        zip(program.mutations.values(), out[user:], strict=True)
    )


def write_back(model, new):
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in new.items():
            buffers[name].copy_(value)


def gradients(model, loss):
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_graph_equals_model(name, train):
    torch.manual_seed(0)
    build, inputs = CASES[name]
    model, batch = build().train(train), inputs()
    program = capture(model, (), batch, train=train)
    torch.manual_seed(1)
    twin = copy.deepcopy(model)
    expected = twin(**batch)
    wanted = gradients(twin, loss_of(expected))
    torch.manual_seed(1)
    out, new = run_program(program, model, (), batch)
    write_back(model, new)
    got = gradients(model, loss_of(out))
    assert type(out) is type(expected)
    torch.testing.assert_close(loss_of(out), loss_of(expected))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


class Watch(torch.fx.Interpreter):
    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            self.seen.add(n.name)
        return result


@pytest.mark.parametrize("name", CASES)
def test_requires_grad_is_what_autograd_says(name):
    build, inputs = CASES[name]
    model, batch = build().train(), inputs()
    next(model.parameters()).requires_grad_(False)
    program = capture(model, (), batch, train=True)
    watch = Watch(program.graph_module)
    watch.seen = set()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    watch.run(
        *[params[fqn] for fqn in program.params.values()],
        *[buffers[fqn] for fqn in program.buffers.values()],
        *program.constants.values(),
        *program.flatten_inputs((), batch),
    )
    tensors = {n.name for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert program.requires_grad & tensors == watch.seen


@pytest.mark.parametrize("name", CASES)
def test_graph_is_functional_and_complete(name):
    build, inputs = CASES[name]
    batch = inputs()
    program, again = (capture(build(), (), batch, train=True) for _ in range(2))
    nodes = list(program.graph.nodes)
    calls = [n for n in nodes if n.op == "call_function"]
    ops = [n.target for n in calls if isinstance(n.target, torch._ops.OpOverload)]
    assert not any(op._schema.is_mutable for op in ops)
    assert torch.ops.aten.view.default not in ops
    assert all(n.meta["val"] is not None for n in nodes if n.op != "output")
    assert [n.name for n in nodes if n.op == "placeholder"] == [
        *program.params, *program.buffers, *program.constants, *program.inputs
    ]  # fmt: skip
    assert len(set(program.names.values())) == len(nodes)
    assert set(program.where) >= {n.name for n in calls}
    assert (program.names, str(program.graph)) == (again.names, str(again.graph))


# ---- names


def test_names_follow_the_modules():
    batch = CASES["gpt2"][1]()
    program = capture(CASES["gpt2"][0](), (), batch, train=True)
    names = set(program.names.values())
    assert names >= {
        "transformer.wte.weight", "transformer.wte", "transformer.h.0.attn.c_attn",
        "transformer.h.1.mlp.c_fc", "transformer.h.0.attn.scaled_dot_product_attention",
        "lm_head", "cross_entropy_loss", "input_ids",
    }  # fmt: skip
    assert program.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in program.params.values()


def test_where_is_the_users_line():
    program = capture(MLP(), (torch.randn(3, 4),), {}, train=True)
    assert all(at.startswith("test_capture.py:") for at in program.where.values())


def test_buffers_are_written_back():
    program = capture(Buffers(), (torch.randn(2, 3, 6, 6),), {}, train=True)
    assert set(program.mutations.values()) == {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "steps", "scale"
    }  # fmt: skip
    assert (
        "bn.running_mean"
        not in capture(Buffers(), (torch.randn(2, 3, 6, 6),), {}, train=False).mutations.values()
    )


# ---- the model is left as it was


def test_flags_and_config_are_restored():
    model = hugging("GPT2LMHeadModel", "GPT2Config", **GPT2)().train()
    model.transformer.h[0].eval()
    flags = [m.training for m in model.modules()]
    capture(model, (), tokens(), train=False)
    assert flags == [m.training for m in model.modules()]
    assert model.config.use_cache is True


def test_frozen_modules_stay_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[1].eval()
    program = capture(model, (torch.randn(2, 4),), {}, train=True)
    assert "dropout" not in str(program.graph)


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode])
def test_capture_does_not_see_the_callers_grad_mode(ambient):
    model, x = NoGrad(), torch.randn(3, 4)
    with ambient():
        program = capture(model, (x,), {}, train=True)
    assert program.requires_grad == capture(model, (x,), {}, train=True).requires_grad


# ---- inputs and outputs


class Batch(nn.Module):
    def forward(self, x, batch, flip=False, *, bias=None):
        y = x + batch["y"][0]
        return {"out": (-y if flip else y), "none": None, "pair": (y, 3)}


def batch_args(n=2):
    return torch.ones(n, 3), {"y": [torch.ones(n, 3)]}


def test_inputs_are_accepted_however_they_are_passed():
    x, batch = batch_args()
    program = capture(Batch(), (x,), {"batch": batch}, train=True)
    for args, kwargs in [((x, batch), {}), ((), {"batch": batch, "x": x, "flip": False})]:
        flat = program.flatten_inputs(args, kwargs)
        assert [id(t) for t in flat] == [id(x), id(batch["y"][0])]
    out = program.unflatten_outputs(program.graph_module(*flat))
    assert out["none"] is None and out["pair"][1] == 3
    torch.testing.assert_close(out["out"], torch.full((2, 3), 2.0))


def test_wrong_inputs_are_all_listed():
    x, batch = batch_args()
    program = capture(Batch(), (x, batch), {}, train=True)
    with pytest.raises(InputError) as error:
        program.flatten_inputs((x.double(), {"y": [torch.ones(4, 3)]}), {"flip": True})
    assert error.value.at == (
        ("x", "float64[2, 3], planned float32[2, 3]"),
        ("batch['y'][0]", "float32[4, 3], planned float32[2, 3]"),
        ("flip", "True, planned False"),
    )
    with pytest.raises(InputError, match="with requires_grad, planned"):
        program.flatten_inputs((x.clone().requires_grad_(), batch), {})
    with pytest.raises(InputError, match="forward"):
        program.flatten_inputs((), {"nothing": x})


def test_one_tensor_given_twice_is_two_inputs():
    ids = torch.zeros(2, 8, dtype=torch.long)
    program = capture(NanoGPT(), (ids, ids), {}, train=True)
    users = {n.name: len(n.users) for n in program.graph.nodes}
    assert [users[name] > 0 for name in program.inputs] == [True, True]


# ---- meta


def test_meta_xl_is_captured_in_seconds():
    with torch.device("meta"):
        model = hugging(
            "GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}
        )()
        ids = torch.zeros(2, 16, dtype=torch.long)
    start = time.process_time()
    program = capture(model, (), {"input_ids": ids, "labels": ids}, train=True)
    assert time.process_time() - start < 30
    assert len(program.params) == 12 * 48 + 4
    assert math.prod(program.graph.find_nodes(op="placeholder")[0].meta["val"].shape) == 31 * 1600


# ---- refusals


class Branch(Pair):
    def forward(self, x):
        y = self.a(x)
        if y.sum() > 0:
            y = y * 2
        return y


class Item(Pair):
    def forward(self, x):
        return self.a(x).sum().item()


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return -g


class Reversed(Pair):
    def forward(self, x):
        return Reverse.apply(self.a(x))


class HiddenWrite(Pair):
    def forward(self, x):
        y = self.a(x)
        with torch.no_grad():
            y.mul_(2)
        return y


class WritesInput(Pair):
    def forward(self, x):
        return self.a(x.add_(1))


class NoGradInAutocast(Pair):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
            with torch.no_grad():
                return y + self.b(x)


class Unowned(Pair):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        return self.a(x) * self.hidden[0]


@pytest.mark.parametrize(
    "model, words",
    [
        (Branch, ["test_capture.py:", "if y.sum() > 0:", "torch.where"]),
        (Item, ["test_capture.py:", "item", "depends on a tensor"]),
        (Reversed, ["test_capture.py:", "Reverse", "backward"]),
        (HiddenWrite, ["test_capture.py:", "mul_", "differentiable"]),
        (WritesInput, ["x", "in place"]),
        (NoGradInAutocast, ["test_capture.py:", "no_grad", "autocast"]),
        (Unowned, ["not registered", "hidden"]),
    ],
)
def test_refusals_name_the_place(model, words):
    with pytest.raises(CaptureError) as error:
        capture(model(), (torch.randn(3, 4),), {}, train=True)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_gradient_checkpointing_is_noted_by_layer():
    model = hugging("GPT2LMHeadModel", "GPT2Config", **GPT2)()
    model.gradient_checkpointing_enable()
    program = capture(model, (), tokens(), train=True)
    assert set(program.regions.values()) == {"transformer.h.0", "transformer.h.1"}
    assert not capture(model, (), tokens(), train=False).regions
