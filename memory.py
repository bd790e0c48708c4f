"""
Training in less memory: adapters in place of the language model's matrices, and activations computed twice.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from alpamayo import Layer, Triplane, VisionBlock


class Adapted(nn.Module):
    """A matrix W that stays and a change of rank r that learns: y = W x + B (A x), with A (r, in), B (out, r) in float32
    (LoRA, arXiv 2106.09685). B starts at zero, so that the model starts as it was. LoRA's factor alpha / r is 1 here: to
    Adam, which forgets the size of gradients, another one is little else than another learning rate. Neither the paper
    nor the release adapts in this way: rank, matrices and learning rate are the user's to try.

    In a state_dict it is the one matrix W + B A: what is saved is a checkpoint like any other, without adapters."""

    def __init__(self, linear, rank, generator=None):
        super().__init__()
        out, size = linear.weight.shape
        like = dict(device=linear.weight.device, dtype=torch.float32)
        self.weight, self.on = linear.weight, True
        a = torch.randn(rank, size, generator=generator) * size**-0.5  # on the CPU: the same on any device
        self.lora_A, self.lora_B = nn.Parameter(a.to(**like)), nn.Parameter(torch.zeros(out, rank, **like))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) if self.on else y

    @torch.no_grad()
    def merged(self):
        return (self.weight.float() + self.lora_B @ self.lora_A).to(self.weight.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.merged().cpu()  # all of them would not fit beside a large model


def add_adapters(model, rank, generator=None):
    """Adapters of this rank in place of the language model's seven matrices a layer: q, k, v, o, gate, up, down."""
    for layer in model.vlm.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Adapted(linear, rank, generator))


@contextmanager
def without_adapters(model):
    """The model as it was before its adapters learned anything: RL's reference, which so costs no second model. Without
    gradients, for a layer that is computed again in a later backward pass would have its adapters again."""
    adapted = [m for m in model.modules() if isinstance(m, Adapted)]
    for m in adapted:
        m.on = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for m in adapted:
            m.on = True


def checkpoint_activations(model):
    """From now on every block and layer keeps what it was given and what it returns (the cache too), and in the backward
    pass computes again what lies between: the memory of one layer at a time, for the time of a second forward pass."""

    def twice(forward):
        again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)  # nothing inside is random
        return lambda *args, **more: (again if torch.is_grad_enabled() else forward)(*args, **more)

    for m in model.modules():
        if isinstance(m, (VisionBlock, Layer)):
            m.forward = twice(m.forward)
        elif isinstance(m, Triplane):
            m.update = twice(m.update)  # a slab of cells, of which there are many
