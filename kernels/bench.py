"""
The kernels against PyTorch and against what the hardware allows.

    python -m kernels.bench

prints a table, and as its last line the same as JSON. With a GPU: milliseconds (median) of each kernel and of what else
computes the same (SDPA, compiled FlexAttention, flash-attn where installed), the largest error against float64 on the same
inputs, operations and bytes a second, and how far that is from the floor: no kernel can take less time than its products
at the rate of a large matrix product, nor than its inputs and outputs at the rate of a copy, both measured first.

Without a GPU nothing is measured. The table then has the counted operations and bytes, the floors that they would have on
an H200, and what each launch compiles to for four chips. All of that is arithmetic, and says nothing of speed.
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

import kernels
from kernels import pruned_attention, salience

# What a copy and a large bf16 product reach on an H200, bytes/s and operations/s: for floors where there is no GPU.
H200 = 4.3e12, 788e12
UNPRUNED = "SDPA, nothing pruned"  # what pruning is to be faster than; it has another answer
CHIPS = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090 and RTX PRO 6000
SHAPES = {"release": (16, 720, 16, 72), "nano": (8, 32, 4, 24)}  # images of a scene, patches of an image, heads, d


@dataclass
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    operations: float  # of the products that the formula asks for, two for each multiplication and addition
    traffic: float  # bytes: inputs read once, outputs written once
    make: Callable  # (device, dtype): ours, {name: what else computes it}, exact, all functions of nothing


def exact(f, *args):
    """f of args in float64."""
    return lambda: f(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))


# ----------------------------------------------------------------------------------------------------------------------
# Cases: a function for each kernel. prefix_attention and flow_step add theirs to CASES.


def salience_cases(name, images, patches, H, d):
    def make(device, dtype):
        q, k = torch.randn(2, images, patches, H, d, dtype=dtype, device=device).transpose(2, 3)
        ours = lambda: salience.column_means(q, k)
        return ours, {"PyTorch": lambda: salience.specification(q, k)}, exact(salience.specification, q, k)

    pairs = images * patches**2 * H
    yield Case("salience", f"{name}, {images} x {patches}", 2 * 2 * d * pairs, 2 * 2 * images * patches * H * d, make)


def kept_at_random(images, patches, keep, device):
    """offsets and rows of patches that are kept in groups of 4: as in the tower, other numbers in each image."""
    groups = torch.randperm(images * patches // 4, generator=torch.Generator().manual_seed(0))
    groups = groups[: round(keep * len(groups))].sort().values
    rows = (groups[:, None] * 4 + torch.arange(4)).flatten()
    counts = (rows // patches).bincount(minlength=images)
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(device), rows.to(device), counts


def attention_cases(name, images, patches, H, d):
    """Patches gathered in the kernel, from the joint matrix of queries, keys and values. The others are given a copy."""

    def inputs(device, dtype, keep):
        qkv = torch.randn(images * patches, 3, H, d, dtype=dtype, device=device)
        offsets, rows, counts = kept_at_random(images, patches, keep, device)
        return qkv.requires_grad_(), offsets, rows, counts

    def forward(device, dtype, keep):
        qkv, offsets, rows, counts = inputs(device, dtype, keep)
        qkv = qkv.detach()
        q, k, v = qkv.unbind(1)
        ours = lambda: pruned_attention.pruned_attention(q, k, v, offsets, patches, rows)
        return ours, others(q, k, v, offsets, rows, counts), exact(pruned_attention.specification, q, k, v, offsets, patches, rows)

    def others(q, k, v, offsets, rows, counts):
        kept = [a[rows] for a in (q, k, v)]
        dense = [a.view(images, patches, H, d).transpose(1, 2) for a in (q, k, v)]
        found = {
            UNPRUNED: lambda: F.scaled_dot_product_attention(*dense).transpose(1, 2).reshape(-1, H, d)[rows],
            "SDPA, image by image": lambda: pruned_attention.specification(*kept, offsets, patches),
        }
        if q.is_cuda:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            image = torch.arange(images, device=q.device).repeat_interleave(counts.to(q.device))
            same = create_block_mask(lambda b, h, i, j: image[i] == image[j], None, None, len(rows), len(rows), q.device)
            flex, heads = torch.compile(flex_attention), [a.transpose(0, 1)[None] for a in kept]
            found["FlexAttention"] = lambda: flex(*heads, block_mask=same)[0].transpose(0, 1)
            try:
                from flash_attn import flash_attn_varlen_func
            except ImportError:
                return found
            cu, most = offsets.int(), int(counts.max())
            found["flash-attn"] = lambda: flash_attn_varlen_func(*kept, cu, cu, most, most)
        return found

    def both(device, dtype, keep):
        qkv, offsets, rows, counts = inputs(device, dtype, keep)
        grad = torch.randn(len(rows), H, d, dtype=dtype, device=device)
        run = lambda f, x, g: torch.autograd.grad(f(*x.unbind(1), offsets, patches, rows), x, g)[0]
        ours = lambda: run(pruned_attention.pruned_attention, qkv, grad)
        images_in_turn = lambda: run(pruned_attention.specification, qkv, grad)
        in_double = lambda: run(pruned_attention.specification, qkv.detach().double().requires_grad_(), grad.double())
        return ours, {"SDPA, image by image": images_in_turn}, in_double

    for keep in (1.0, 0.5, 0.25):
        _, rows, counts = kept_at_random(images, patches, keep, "cpu")
        pairs, vector = int(counts.square().sum()) * H, 2 * len(rows) * H * d  # vector: bytes of q, or k, v, out
        shape = f"{name}, keep {keep}"
        yield Case("pruned_attention", shape, 2 * 2 * d * pairs, 4 * vector, lambda *a, keep=keep: forward(*a, keep))
        # 2 products forward, 5 backward; q, k, v, out, and again with grad, and their gradients, of all rows
        traffic = 9 * vector + 3 * 2 * images * patches * H * d
        yield Case("and its gradients", shape, 7 * 2 * d * pairs, traffic, lambda *a, keep=keep: both(*a, keep))


CASES = (salience_cases, attention_cases)

# ----------------------------------------------------------------------------------------------------------------------
# With a GPU


def ceilings(clock, device):
    """Bytes a second of a copy, operations a second of a large product in bf16."""
    a, b = torch.empty(2, 2**29, dtype=torch.uint8, device=device)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * a.numel() / clock(lambda: b.copy_(a)), 2 * 8192**3 / clock(lambda: x @ x)


def floor(case, ceiling):
    """Seconds, and what sets them."""
    memory, compute = case.traffic / ceiling[0], case.operations / ceiling[1]
    return max(memory, compute), "memory" if memory > compute else "compute"


def measure(case, device, clock, dtype=torch.bfloat16):
    """Seconds of ours and of the others, and the largest error of each, relative to the largest number."""
    ours, others, truth = case.make(device, dtype)
    truth, result = truth(), {}
    for name, f in {"ours": ours, **others}.items():
        error = float((f().double() - truth).abs().max() / truth.abs().max())
        result[name] = dict(error=None if name == UNPRUNED else error, seconds=clock(f))
    return result


def on_gpu(cases, device):
    from triton.testing import do_bench

    clock = lambda f: do_bench(f, return_mode="median") / 1e3
    ceiling = ceilings(clock, device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {kernels.triton.__version__}")
    print(f"a copy {ceiling[0] / 1e12:.2f} TB/s, a large bf16 product {ceiling[1] / 1e12:.0f} TFLOP/s\n")
    print(f"{'':18}{'':26}{'ms':>9}{'error':>9}{'TFLOP/s':>9}{'TB/s':>7}{'x floor':>9}{'x ours':>8}")
    rows = []
    for case in cases:
        least, _ = floor(case, ceiling)
        result = measure(case, device, clock)
        for name, r in result.items():
            s = r["seconds"]
            rates = f"{case.operations / s / 1e12:9.1f}{case.traffic / s / 1e12:7.2f}{s / least:9.2f}"
            head = f"{case.kernel:18}{case.shape:26}" if name == "ours" else f"{'':20}{name:24}"
            error = "-" if r["error"] is None else f"{r['error']:.1e}"
            print(f"{head}{s * 1e3:9.4f}{error:>9}{rates}{s / result['ours']['seconds']:8.2f}", flush=True)
        rows.append(dict(kernel=case.kernel, shape=case.shape, floor=least, **result))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Without


def analytic(cases):
    print("Nothing was measured: there is no GPU here. Floors are arithmetic, for an H200 at "
          f"{H200[0] / 1e12} TB/s and {H200[1] / 1e12:.0f} TFLOP/s.\n")  # fmt: skip
    print(f"{'':18}{'':26}{'GFLOP':>10}{'MB':>9}{'floor, us':>11}")
    rows = []
    for case in cases:
        least, by = floor(case, H200)
        counted = f"{case.operations / 1e9:10.3f}{case.traffic / 1e6:9.2f}{least * 1e6:11.2f} {by}"
        print(f"{case.kernel:18}{case.shape:26}{counted}")
        rows.append(dict(kernel=case.kernel, shape=case.shape, floor=least))
    return rows


def compile_report(cases):
    """What the launches of these cases compile to, by tests/cpu_triton.py."""
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests"))
    from cpu_triton import compiling

    print(f"\nCompiled by triton {kernels.triton.__version__} for chips that are not here, bf16. blocks: how many fit on a "
          "multiprocessor\n\n"  # fmt: skip
          f"{'':18}{'':26}{'chip':>6}{'registers':>11}{'spilled':>9}{'shared, KB':>12}{'blocks x warps':>16}  matrix")
    rows, seen = [], set()
    kernels.use("triton")
    for case in cases:
        for chip in CHIPS:
            with compiling(chip) as builds:
                case.make("cpu", torch.bfloat16)[0]()
            for b in builds:
                if b.sass in seen:  # the same at another shape
                    continue
                seen.add(b.sass)
                print(f"{b.kernel:18}{case.shape:26}{b.chip:6}{b.registers:11}{b.spilled:9}{b.shared / 1024:12.1f}"
                      f"{f'{b.blocks} x {b.warps}':>16}  {b.instructions[b.matrix()]} {b.matrix()}", flush=True)  # fmt: skip
                rows.append(dict(kernel=b.kernel, shape=case.shape, chip=b.chip, registers=b.registers, spilled=b.spilled,
                                 shared=b.shared, blocks=b.blocks, warps=b.warps, matrix=b.matrix()))  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="this one only (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="without a GPU: leave out the compile report")
    flags = parser.parse_args()
    shapes = [flags.shape] if flags.shape else SHAPES
    cases = [case for make in CASES for name in shapes for case in make(name, *SHAPES[name])]
    if torch.cuda.is_available():
        kernels.use("triton")
        report = dict(device=torch.cuda.get_device_name(), measured=True, cases=on_gpu(cases, torch.device("cuda")))
    else:
        report = dict(device="none", measured=False, cases=analytic(cases))
        if kernels.triton.__version__ is None:
            print("\nTriton is not installed: nothing was compiled.")
        elif not flags.no_compile:
            report["builds"] = compile_report(cases)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
