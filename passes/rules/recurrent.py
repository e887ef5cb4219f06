"""Rules of recurrent networks: the batch may split, unless the layers draw dropout masks."""

from __future__ import annotations

import torch

from autotp.passes.rules.table import Call, rule

aten = torch.ops.aten


def recurrent(call: Call) -> str:
    """Steps, features and weights are whole; states are (layers, batch, features)."""
    states = len(call.results) - 1
    names = [argument.name for argument in call.op._schema.arguments]
    layers, dropout, train, batch_first = (
        call.arg(names.index(name)) for name in ("num_layers", "dropout", "train", "batch_first")
    )
    b = "[b]" if train and dropout and layers > 1 else "b"
    steps = f"{b} [s]" if batch_first else f"[s] {b}"
    weights = [
        " ".join(f"[w{k}_{d}]" for d in range(len(t.shape)))
        for k, t in enumerate(call.operands[1 + states :])
        if t
    ]
    before = [f"[l] {b} [h{k}]" for k in range(states)]
    left, right = [f"{steps} [i]", *before, *weights], [f"{steps} [o]", *before]
    return f"{', '.join(left)} -> {', '.join(right)}"


def recurrent_flops(call: Call) -> str:
    """Every matrix multiplies each step of each row of the batch."""
    weights = call.operands[len(call.results) :]
    matrices = [k for k, t in enumerate(weights) if t and len(t.shape) == 2]
    return " + ".join(f"b s w{k}_0 w{k}_1" for k in matrices)


rule(aten.gru.input, recurrent, flops=recurrent_flops)
rule(aten.lstm.input, recurrent, flops=recurrent_flops)
rule(aten.rnn_relu.input, recurrent, flops=recurrent_flops)
rule(aten.rnn_tanh.input, recurrent, flops=recurrent_flops)
