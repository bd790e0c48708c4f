"""
The language model's pass over one token, recorded as a CUDA graph.

Of one token there is little to compute, and hundreds of launches of it keep the CPU busy for longer
than the GPU. A graph records them once and replays them. It needs every tensor at the same place
each time, so a tail, which grows in Alpamayo.think, has all its room from the beginning:

                 Alpamayo.think             here
    prompt       P tokens                   a multiple of 128, so that many prompts share a graph
    tail         S tokens, then S + 1       `room` places, and a mask of those that are taken
    own token    behind the tail            behind the room; then it takes place S

What is recorded is the model's own code with its adapters and kernels. But Python runs when a graph
is recorded, and not when it is replayed. So only what is known to do the same each time is recorded
(stock.py), and again where its weights lie elsewhere.
"""
import weakref

import torch

from kernels import by_hand, stock

SHARED = 128  # a prompt's room is a multiple of it
MOST = 4  # graphs that a model keeps


class Recording:
    """Pass after pass over what N samples say. prefix: of each layer the prompt's keys and values
    (B, G, P, d); angles: cos and sin (1, 1, room, d / 2) of the places behind it."""

    def __init__(self, lm, layers, N, P, angles):
        k = layers[0][0]
        B, G, _, d = k.shape
        room = angles[0].shape[2]
        self.lm, self.graph, self.x = lm, None, None
        self.prefix = k.new_zeros(len(layers), 2, B, G, P, d)
        self.tails = k.new_zeros(len(layers), 2, N, G, room, d)
        self.angles = [torch.zeros_like(a) for a in angles]
        self.token = torch.zeros(N, dtype=torch.long, device=k.device)
        self.place = torch.zeros(1, dtype=torch.long, device=k.device)  # the token's
        self.there = torch.zeros(B, P, dtype=torch.bool, device=k.device)
        self.taken = torch.zeros(N, 1, room + 1, dtype=torch.bool, device=k.device)

    def begin(self, layers, angles):
        """Another prompt, and nothing said yet."""
        P = layers[0][0].shape[2]
        there = self.prefix[..., :P, :].flatten(0, 1).unbind(0)
        torch._foreach_copy_(there, [x for kv in layers for x in kv])
        torch._foreach_copy_(self.angles, angles)
        self.prefix[..., P:, :] = 0  # unseen, but 0 times another prompt's NaN were NaN
        self.tails.zero_()
        self.there.zero_()[:, :P] = True
        self.taken.zero_()[..., -1] = True  # every token sees itself
        self.place.zero_()

    def run(self):
        """As in Alpamayo.think, but that a token is then written to its place."""
        angles = [a.index_select(2, self.place) for a in self.angles]
        past = [
            stock.Past(tuple(prompt), tuple(tail), self.there, self.taken)
            for prompt, tail in zip(self.prefix, self.tails)
        ]
        self.x, cache = self.lm(self.lm.embed_tokens(self.token)[:, None], *angles, past)
        own = torch.stack([x[:, :, -1:] for kv in cache for x in kv])  # (2 layers, N, G, 1, d)
        self.tails.flatten(0, 1).index_copy_(3, self.place, own)
        self.taken.index_fill_(2, self.place, True)
        self.place += 1

    def read(self, token):
        """token (N,) to its hidden state (N, 1, C), there until the next is read. On a GPU the
        first one runs, then the graph is recorded."""
        self.token.copy_(token)
        if self.graph is not None:
            self.graph.replay()
            return self.x
        self.run()
        x = self.x
        if x.is_cuda:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            device = x.device.type
            again = torch.autocast(
                device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device),
                cache_enabled=False,  # weights that learn are cast in every replay
            )  # fmt: skip
            with again, torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                self.run()  # only records
            self.graph = graph
        return x

    def tail(self, T):
        """Keys and values (N, G, T, d) of the T tokens read, of each layer: a copy."""
        return [tuple(kv) for kv in self.tails[..., :T, :].clone()]


kept = weakref.WeakKeyDictionary()  # language model: (what it was, {shape: its last Recording})


@torch.no_grad()
def recorded(think, model, layers, N, angles):
    """A Recording that reads behind a prompt, or None where the loop in Alpamayo.think has to.
    layers, angles: see Recording. N samples. think: that method."""
    lm = model.vlm.model.language_model
    room, weight = angles[0].shape[2], lm.embed_tokens.weight
    if not room or not by_hand(weight.device, weight.dtype):
        return None
    if not stock.is_thought(think, model, layers):
        return None
    now = stock.state_of(lm)
    if lm not in kept or kept[lm][0] != now:
        kept[lm] = now, {}
    mine = kept[lm][1]
    B, _, P, _ = layers[0][0].shape
    P = -(-P // SHARED) * SHARED
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    shape = B, N, P, room, layers[0][0].dtype, cast
    with torch.inference_mode(False), torch.no_grad():  # usable in every mode
        if shape not in mine:
            if len(mine) == MOST:
                mine.pop(next(iter(mine)))
            mine[shape] = Recording(lm, layers, N, P, angles)
        mine[shape].begin(layers, angles)
    return mine[shape]
