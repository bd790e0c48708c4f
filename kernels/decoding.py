"""
The language model's pass over one token, recorded as a CUDA graph.

Of one token there is little to compute: a thousand launches, which keep the CPU busy for longer
than the GPU. A graph records them once and replays them. It needs every tensor at the same place
each time, so a tail, which grows in Alpamayo.think, has all its room from the beginning. When S
tokens have been read:

                 Alpamayo.think             here
    prompt       P tokens                   a multiple of 128, so that many prompts share a graph
    tail         S tokens                   `room` places, and a mask of the S that are taken
    own token    behind the tail            behind the room; then it takes place S

What is recorded is the model's own code with its adapters and kernels. But Python runs when a graph
is recorded, and not when it is replayed. So only code that does the same each time is recorded
(stock.py), and it is recorded again where the weights lie elsewhere.
"""
import weakref

import torch

from kernels import by_hand, in_multiples, stock

SHARED = 128  # a prompt's room is a multiple of it
MOST = 4  # graphs that a model keeps


class Recording:
    """Reads what N samples say, token by token. layers: of each the prompt's keys and values
    (B, G, P, d); angles: cos and sin (1, 1, room, d / 2) of the places behind it."""

    def __init__(self, lm, layers, N, P, angles):
        k = layers[0][0]
        B, G, _, d = k.shape
        room = angles[0].shape[2]
        self.lm, self.graph, self.x = lm and weakref.ref(lm), None, None
        self.shelf = None  # where it goes when it is done
        self.prompt = k.new_zeros(len(layers), 2, B, G, P, d)
        self.tails = k.new_zeros(len(layers), 2, N, G, room, d)
        self.angles = [torch.zeros_like(a) for a in angles]
        self.token = torch.zeros(N, dtype=torch.long, device=k.device)
        self.place = torch.zeros(1, dtype=torch.long, device=k.device)  # the token's
        self.filled = torch.zeros(B, P, dtype=torch.bool, device=k.device)
        self.taken = torch.zeros(N, 1, room + 1, dtype=torch.bool, device=k.device)

    def begin(self, layers, angles):
        """Another prompt, and nothing said yet."""
        P = layers[0][0].shape[2]
        filled = self.prompt[..., :P, :].flatten(0, 1).unbind(0)
        torch._foreach_copy_(filled, [x for kv in layers for x in kv])
        torch._foreach_copy_(self.angles, angles)
        self.prompt[..., P:, :] = 0  # unseen, but 0 times another prompt's NaN were NaN
        self.tails.zero_()
        self.filled.zero_()[:, :P] = True
        self.taken.zero_()[..., -1] = True  # every token sees itself
        self.place.zero_()

    def run(self):
        """As in Alpamayo.think, but that a token is then written to its place."""
        angles = [a.index_select(2, self.place) for a in self.angles]
        past = [
            stock.Past(tuple(prompt), tuple(tail), self.filled, self.taken)
            for prompt, tail in zip(self.prompt, self.tails)
        ]
        lm = self.lm()
        self.x, cache = lm(lm.embed_tokens(self.token)[:, None], *angles, past)
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
            graph, stream, device = torch.cuda.CUDAGraph(), torch.cuda.Stream(), x.device.type
            cast_anew = torch.autocast(  # a replay casts the weights of then, as they learn
                device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device),
                cache_enabled=False,
            )  # fmt: skip
            mode = dict(stream=stream, capture_error_mode="thread_local")
            with cast_anew, torch.cuda.graph(graph, **mode):
                self.run()  # only records
            self.graph = graph
        return x

    def tail(self, T):
        """Keys and values (N, G, T, d) of the T tokens read, of each layer: a copy. Then this may
        read for others."""
        recordings, shape = self.shelf
        while len(recordings) >= MOST:
            recordings.pop(next(iter(recordings)))
        recordings[shape], self.shelf = self, None
        return [tuple(kv) for kv in self.tails[..., :T, :].clone()]


kept = weakref.WeakKeyDictionary()  # language model: (what it was, {shape: a Recording})


def recorded(think, model, layers, N, angles):
    """A Recording that reads behind a prompt, or None where the loop in Alpamayo.think has to.
    layers, angles: see Recording. N samples. think: that method.

    Nobody else has it until its `tail` was asked for."""
    lm, k = model.vlm.model.language_model, layers[0][0]
    B, _, P, _ = k.shape
    room = angles[0].shape[2]
    if not room or not by_hand(k.device, k.dtype) or not stock.is_thought(think, model, layers):
        return None
    state = stock.state_of(lm)
    if lm not in kept or kept[lm][0] != state:
        kept[lm] = state, {}
    recordings = kept[lm][1]
    P = in_multiples(P, SHARED)
    device = k.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    shape = B, N, P, room, k.dtype, angles[0].dtype, cast
    with torch.inference_mode(False):  # usable in every mode
        one = recordings.pop(shape, None) or Recording(lm, layers, N, P, angles)
        one.shelf = recordings, shape
        one.begin(layers, angles)
    return one
