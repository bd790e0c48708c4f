"""
Table 13: where the milliseconds of one plan go, beside the least that this machine could take.

    python -m tools.experiments latency                            nano and mini
    python -m tools.experiments latency --presets alpamayo-r1-10b  on a GPU of 40 GB or more

Weights are random, on a GPU in bfloat16. A reasoning is 40 tokens and a flow 5 Euler steps, as the
paper's. The floor of a stage is the longer of two times: to read its weights once for every pass,
and to multiply what it multiplies, at the rates of a large copy and a large product, which the tool
measures.
"""
import time
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import memory
import rl
from alpamayo import HORIZON, OF_EXPERT, PRESETS, ActionSpace, Alpamayo, Vocabulary
from doors import whole
from tools import markdown

ABOUT = "Table 13: the milliseconds of a plan, stage by stage"
NEEDS = "a minute of a GPU; of a core not timed yet"
SIZES = {  # H W, pixels of an image
    "nano": (64, 128),
    "mini": (128, 256),
    "alpamayo-r1-10b": (320, 576),
}
STEPS = 5  # Euler's
TOKENS = 40  # of a reasoning
STAGES = ("vision", "prefill", "reasoning", "flow")
ROWS = {  # what drives, and whether it thinks first
    "path only, by flow": ("flow", False),
    "AR1, path by flow": ("flow", True),
    "AR1, path by tokens": ("tokens", True),
}
PAPER = """\
| the paper's Table 13, ms | vision | prefill | reasoning | path | all |
| --- | ---: | ---: | ---: | ---: | ---: |
| path only, by flow | 3.43 | 16.54 | - | 8.75 | 29 |
| AR1, path by flow | 3.43 | 16.54 | 70 | 8.75 | 99 |
| AR1, path by tokens | 3.43 | 16.54 | 70 | 222 | 312 |"""


def plan(model, scene, decode, thinks):
    """One plan, and the seconds of its stages. It thinks TOKENS tokens of one word."""
    options = dict(n=1, temperature=0.6, top_p=0.98, max_new_tokens=TOKENS, seed=0)
    words = [" a" * TOKENS]  # it is cut off at as many tokens
    choose = rl.saying(model, words, **options) if thinks else None
    out = model.sample(scene, steps=STEPS, reason=thinks, decode=decode, choose=choose, **options)
    seconds = dict(out.seconds)
    if decode == "tokens":  # they are said behind the reasoning, in one go
        said = out.tokens.shape[2]
        seconds["flow"] = seconds["reasoning"] * 2 * HORIZON / said
        seconds["reasoning"] -= seconds["flow"]
    return seconds


def rates(device, dtype, rounds=5):
    """(bytes read and written, floating-point operations) a second, of a large copy and product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.empty_like(a)
    seconds = []
    for work in (lambda: b.copy_(a), lambda: torch.mm(a, a, out=b)):
        work()
        times = []
        for _ in range(rounds):
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return 2 * a.nbytes / seconds[0], 2 * n**3 / seconds[1]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def floors(model, scene, speed):
    """The least seconds of each stage of a plan that thinks; `flow` and `tokens` are of its path.
    speed: see `rates`."""
    size = {"vision": 0, "language": 0, "expert": 0}
    for name, p in model.named_parameters():
        part = "vision" if ".visual." in name else "language"
        if name.startswith(OF_EXPERT):
            part = "expert"
        if "embed_tokens" not in name:  # of a table only some rows are read
            size[part] += p.nbytes
    copied, multiplied = speed
    counted = {}
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # a CPU's fused attention is not counted
        with FlopCounterMode(display=False) as flops:
            prompt = model.embed_prompt(scene, reason=True)
        counted["vision"] = flops.get_total_flops()
        with FlopCounterMode(display=False) as flops:
            model.prefill(prompt)
        counted["prefill"] = flops.get_total_flops()
    read = {"vision": size["vision"], "prefill": size["language"]}
    found = {name: max(read[name] / copied, counted[name] / multiplied) for name in read}
    found["reasoning"] = TOKENS * size["language"] / copied
    found["flow"] = STEPS * size["expert"] / copied
    found["tokens"] = 2 * HORIZON * size["language"] / copied
    return found


def milliseconds(preset, args):
    """{row: {stage: milliseconds}} of a preset with random weights, and of its floors."""
    cfg = PRESETS[preset]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vocabulary = memory.stand_in(cfg) if cfg.chat else Vocabulary(cfg)
    torch.set_default_dtype(dtype)  # the 10B in float32 would not fit first
    with torch.device(device):
        model = Alpamayo(cfg, vocabulary).eval()
    torch.set_default_dtype(torch.float32)
    model.action_space = ActionSpace(cfg).to(device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    scene = data.make_scenes([0], **data.view_of(cfg, SIZES[preset]))
    rows = {}
    for row, (decode, thinks) in tqdm(ROWS.items(), desc=preset, unit="row"):
        laps = [plan(model, scene, decode, thinks) for _ in range(args.plans + 1)][1:]
        rows[row] = {stage: 1000 * median(lap[stage] for lap in laps) for stage in STAGES}
        rows[row]["all"] = 1000 * median(sum(lap.values()) for lap in laps)
        if not thinks:
            del rows[row]["reasoning"]
    least = {name: 1000 * s for name, s in floors(model, scene, rates(device, dtype)).items()}
    by_tokens = least.pop("tokens")
    rows["floor, path by flow"] = least | {"all": sum(least.values())}
    least = least | {"flow": by_tokens}
    rows["floor, path by tokens"] = least | {"all": sum(least.values())}
    return rows


def measure(args):
    """{preset: {row: {stage: milliseconds}}}."""
    return {preset: milliseconds(preset, args) for preset in args.presets}


def text(rows, settings):
    """A table for each preset."""
    tables = []
    for preset, found in rows.items():
        lines = []
        for row, ms in found.items():
            cells = [f"{ms[stage]:.2f}" if stage in ms else "-" for stage in (*STAGES, "all")]
            lines.append([row, *cells])
        header = [f"{preset}, ms", "vision", "prefill", "reasoning", "path", "all"]
        tables.append(markdown(lines, header))
    note = (f"One scene, random weights; {TOKENS} tokens of reasoning; {STEPS} Euler steps or "
            f"{2 * HORIZON} tokens; median of {settings['plans']} plans.")
    return "\n\n".join([*tables, note])


def add_flags(add):
    add("--presets", nargs="+", choices=tuple(SIZES), default=["nano", "mini"], help="whose shape")
    add("--plans", type=whole(1), default=50, help="of which the median is shown")
