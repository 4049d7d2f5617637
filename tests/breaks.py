"""Planted mistakes: what a wrong engine would do, so that every test of the right one can be seen to fail.

In a prepared model, in an engine, in the rows of sparse blocks, in the sources of Triton's kernels, and in the emulated
CUDA kernels.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import torch

from flmoe_fast.engines import portable, sparse_rows
from flmoe_fast.engines.prepared import PreparedModel
from flmoe_fast.engines.sparse_rows import choose
from flmoe_fast.model.sparse import slots_per_network


def break_gain(model: PreparedModel) -> None:
    """One expert's folded LayerNorm gain is forgotten."""
    first, *others = model.stack.layers
    up = first.up.clone()
    up[1] *= 1.001
    model.stack = dataclasses.replace(model.stack, layers=(dataclasses.replace(first, up=up), *others))


def break_scale(model: PreparedModel) -> None:
    """The second layer's scores are not divided by the root of the head width."""
    first, second, *others = model.stack.layers
    width = model.stack.attended
    qkv = second.qkv.clone()
    qkv[:, :, :width] *= (width // model.stack.heads) ** 0.5
    model.stack = dataclasses.replace(model.stack, layers=(first, dataclasses.replace(second, qkv=qkv), *others))


def break_states(engine):
    """Keys of present and absent tokens are confused."""
    engine.states = dataclasses.replace(engine.states, k=engine.states.k.flip(2))


def break_values(engine):
    """Values of one token are confused."""
    v = engine.states.v.clone()
    v[:, :, :, 0] = v[:, :, :, 0].flip(2)
    engine.states = dataclasses.replace(engine.states, v=v)


def break_queries(engine):
    """Absent tokens ask with the query of their present state."""
    q = engine.states.q.clone()
    q[:, :, 0] = q[:, :, 1]
    engine.states = dataclasses.replace(engine.states, q=q)


def break_routing(engine):
    """A player's absence does not reach the routing."""
    step = engine.routing.step.clone()
    step[0] = 0
    engine.routing = dataclasses.replace(engine.routing, step=step)


#: Planted in a prepared model, before an engine is made of it; and in an engine.
IN_THE_MODEL = (break_gain, break_scale)


IN_THE_ENGINE = (break_states, break_values, break_queries, break_routing)


def swap_down(model: PreparedModel) -> None:
    """The second matrices of two networks of the last sparse layer are confused."""
    layers = list(model.stack.layers)
    at = max(i for i, layer in enumerate(layers) if layer.networks is not None)
    down = layers[at].networks.down.clone()
    down[:2] = down[:2].flip(0)
    layers[at] = dataclasses.replace(layers[at], networks=dataclasses.replace(layers[at].networks, down=down))
    model.stack = dataclasses.replace(model.stack, layers=tuple(layers))


def forget_gate_bias(model: PreparedModel) -> None:
    """The first layer's gates have no bias."""
    first, *others = model.stack.layers
    networks = dataclasses.replace(first.networks, gate_bias=torch.zeros_like(first.networks.gate_bias))
    model.stack = dataclasses.replace(model.stack, layers=(dataclasses.replace(first, networks=networks), *others))


def mistake_scores(model: PreparedModel) -> None:
    """A switch gate's scores are all 1, another's are probabilities among all networks."""
    model.stack = dataclasses.replace(model.stack, gate="naive" if model.stack.gate == "switch" else "switch")


def give_room(engine) -> None:
    """No capacity."""
    engine.sample.room = None


def unpadded_room(engine) -> tuple[int, ...]:
    """Slots of each modality that a network would take if padding did not count."""
    config, lengths = engine.problem.model.config, [stop - start for start, stop in engine.problem.segments]
    return tuple(slots_per_network(config.gate, tokens, config.ffn_experts, False) for tokens in lengths)


def room_of_valid_tokens(engine) -> None:
    """Capacity from the valid tokens only."""
    engine.sample.room = unpadded_room(engine)


SPARSE_IN_THE_MODEL = (swap_down, forget_gate_bias, mistake_scores)


def forget_room(monkeypatch, engine):
    """No capacity."""
    free = sparse_rows.dispatch
    monkeypatch.setattr(portable, "dispatch", lambda c, x, block, blocks, room: free(c, x, block, blocks, None))


def share_room(monkeypatch, engine):
    """Modalities compete for the same slots."""
    real = sparse_rows.dispatch

    def merged(chosen, networks, block, blocks, room):
        return real(chosen, networks, block // 2, blocks // 2, room[::2])

    monkeypatch.setattr(portable, "dispatch", merged)


def forget_padding(monkeypatch, engine):
    """Capacity from the valid tokens only."""
    engine.sample.room = unpadded_room(engine)


def last_come(monkeypatch, engine):
    """Later tokens win."""
    real = sparse_rows.dispatch

    def backwards(chosen, networks, block, blocks, room):
        sent = real(chosen.flip(1), networks, block.flip(0), blocks, room)
        rows = chosen.shape[1] * chosen.shape[2]
        row, slot = (sent.slot % rows) // chosen.shape[2], sent.slot % chosen.shape[2]
        turned = (chosen.shape[1] - 1 - row) * chosen.shape[2] + slot
        return dataclasses.replace(sent, slot=sent.slot - sent.slot % rows + turned)

    monkeypatch.setattr(portable, "dispatch", backwards)


def rescale(monkeypatch, engine):
    """Scores of a switch gate sum to one."""
    monkeypatch.setattr(
        portable, "choose", lambda logits, gate, k: (choose(logits, gate, k)[0], torch.ones_like(logits[..., :k]))
    )


def swap_networks(monkeypatch, engine):
    """Networks are confused."""
    first = engine.packed.layers[0]
    first = dataclasses.replace(first, networks=dataclasses.replace(first.networks, up=first.networks.up.roll(1, 0)))
    engine.packed = dataclasses.replace(engine.packed, layers=(first, *engine.packed.layers[1:]))


def forget_bias(monkeypatch, engine):
    """Gates have no bias."""
    first = engine.packed.layers[0]
    networks = dataclasses.replace(first.networks, gate_bias=torch.zeros_like(first.networks.gate_bias))
    first = dataclasses.replace(first, networks=networks)
    engine.packed = dataclasses.replace(engine.packed, layers=(first, *engine.packed.layers[1:]))


#: Of sparse blocks in the portable engine.
PORTABLE_SPARSE = (forget_room, share_room, forget_padding, last_come, rescale, swap_networks, forget_bias)


def break_kernels(name: str, right: str, wrong: str, monkeypatch, tmp_path: Path) -> None:
    """Put kernels into the module of that name whose source says ``wrong`` where it said ``right``."""
    module = importlib.import_module(f"flmoe_fast.engines.gpu.kernels.{name}")
    source = Path(module.__file__).read_text()
    assert right in source
    file = tmp_path / f"broken_{module.__name__.rsplit('.', 1)[1]}.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, broken)
    spec.loader.exec_module(broken)
    for kernel in dir(broken):
        if kernel.endswith("_kernel") or kernel in ("_pooled_product", "_largest"):
            monkeypatch.setattr(module, kernel, getattr(broken, kernel))


#: Of the kernels of dense models: module, what it says, what it would wrongly say.
KERNELS = {
    "sign of the corner update": ("attention", "exp2(top - higher)", "exp2(higher - top)"),
    "mask of the keys": ("attention", 'tl.where(m_n[None, :], score, float("-inf"))', "score"),
    "state of a query": ("attention", "present(words_ptr, batch, words, o_m, m_m)", "(1 + 0 * o_m)"),
    "state of a key": ("attention", "present(words_ptr, member, words, token, m_n)", "(1 + 0 * token)"),
    "context of a coalition": ("attention", "context = (batch + offset) // group", "context = 0 * batch"),
    "mask of the pool": ("linear", "(token >= start) & (token < stop)", "token < stop"),
    "statistics": ("linear", "squares += share[None, :] * apart * apart", "squares += 0.0 * apart"),
    "state of the residual": ("linear", "(expert * 2 + state)", "(expert * 2 + 1 + 0 * state)"),
    "residual": ("linear", 'if RESIDUAL == "stream":', 'if RESIDUAL == "nothing":'),
    "small terms": ("linear", "low = tl.load(p_a + a_plane, mask=m_a, other=0.0)", "low = a"),
    "bits of the routing": ("routing", "bits.to(tl.float32), step", "(1 - bits).to(tl.float32), step"),
    "tiles of the pool": ("head", "range(0, tiles)", "range(1, tiles + 1)"),
}  # fmt: skip


#: Of the kernels of sparse blocks: the shape that shows it, and the same.
SPARSE_KERNELS = {
    "a queue one too long": ("SWITCH", "order", "kept = m_s & (queue < room)", "kept = m_s & (queue <= room)"),
    "no capacity": ("SWITCH", "order", "kept = m_s & (queue < room)", "kept = m_s"),
    "counts without capacity": ("LAST", "choice", "tl.minimum(count, tl.load(room_ptr + modality))", "count"),
    "the modality's first token": ("SWITCH", "order", "* length * SLOTS + o_s", "* length * SLOTS + o_s - start"),
    "all runs at the start": ("SWITCH", "order", "total + tl.cumsum(count, 0) - count,", "0 * count,"),
    "all networks at the start": ("SWITCH", "order", "tl.cumsum(totals, 0) - totals", "0 * totals"),
    "tile map off by one": ("SWITCH", "grouped", "(tl.cumsum(needed, 0) <= tile)", "(tl.cumsum(needed, 0) < tile)"),
    "another network's matrix": (
        "SWITCH",
        "grouped",
        "expert * networks + network",
        "expert * networks + 0 * network",
    ),
    "rows not gathered": ("SWITCH", "grouped", "tl.load(order_ptr + place, mask=m_m, other=0) // SLOTS", "within"),
    "dropped slots read": ("SWITCH", "combine", "mask=there[:, None] & m_x", "mask=m_x"),
    "slots not added up": ("DEEP", "combine", "x += score[:, None]", "x = score[:, None]"),
    "scores of other networks": ("SWITCH", "choice", "if AMONG_ALL:", "if not AMONG_ALL:"),
    "gate without bias": ("SWITCH", "choice", "logits + bias[None, :]", "logits"),
    "gate of rows not normalised": ("LAST", "choice", "a = (a - mean[:, None]) * scale[:, None]", "a = a + 0.0"),
    "statistics not renewed": ("SWITCH", "combine", "tl.store(p_s, mean, mask=m_m)", "pass"),
    "pool without scores": ("LAST", "combine", "tl.sum(score[:, None] * rows, 0)", "tl.sum(rows, 0)"),
    "pool of another run": ("LAST", "combine", "+ tl.load(starts_ptr + run)", "+ 0 * tl.load(starts_ptr + run)"),
    "no bias on the way down": (
        "LAST",
        "combine",
        "tl.where(o_e == 0, weight, 0.0)",
        "tl.where(o_e < 0, weight, 0.0)",
    ),
}


#: Planted mistakes (csrc/fused/emulator.h), and how each shows: as an error, or as numbers out of bounds.
FAULTS = {
    "consumers wait for no copy": (1, "an arrival too many"),
    "copies wait for no consumer": (2, "an arrival too many"),
    "consumers keep their stages": (3, "nobody can go on: .*warp 8 waits for barrier"),
    "products are not waited for": (4, None),
    "swizzle": (5, None),
}
