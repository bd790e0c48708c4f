"""
What is in the built-in world, what a scene costs, and how scenes look.

    python -m tools.world --splits                          # of what the splits are made
    python -m tools.world --cost                            # milliseconds of a scene, by part
    python -m tools.world --look sheet.png --seeds 0 12     # twelve scenes on a sheet
"""

import time
from collections import Counter

import torch

import store
from data import BATCH, SIDE, SPLITS, make_scenes
from doors import Flags, run, whole, write_atomically
from draw import pyplot
from tools import markdown
from world import COMBINATIONS, FUTURE, PAST, RARE, SEEDS, SITUATIONS, World, draw, images_of

AIR = ("*day*", "*dusk*", "*rain*", "*haze*", "*dusk and rain*", "*shown after t0*")
MOST = 300  # scenes on a sheet: Matplotlib draws no more than 65,536 pixels


def splits(scenes):
    """Of what the first scenes of each split are made, as Markdown: their number by kind."""
    combines = {name: "" for name in (*SITUATIONS, *COMBINATIONS, *RARE, *AIR)}
    for name, causes in COMBINATIONS.items():
        combines[name] = " + ".join(causes or ("any",))
    for name, cause in RARE.items():
        does = "does as a" if cause == "pedestrian" else "stands as"
        combines[name] = f"{does} {cause}"
    counts = []
    for split in SPLITS:
        seeds = range(SEEDS[split], SEEDS[split] + scenes)
        counts.append(Counter(kind for seed in seeds for kind in kinds_of(draw(seed))))
    rows = [[name, text, *(count[name] for count in counts)] for name, text in combines.items()]
    return markdown(rows, ["scene", "combines", *SPLITS], left=2)


def kinds_of(one):
    """The rows of the table in which a Draw counts."""
    air = ["dusk"] if one.dusk > 0 else []
    if one.rain > 0:
        air.append("rain")
    elif one.visibility < 150:
        air.append("haze")
    kinds = [one.situation, f"*{' and '.join(air) or 'day'}*"]
    return [*kinds, "*shown after t0*"] if one.late > 0 else kinds


def cost(workers):
    """A table of `cost_of` in Markdown."""
    torch.set_num_threads(1)
    rows = []
    with store.crew("tools.world.make_and_forget", workers) as make:
        list(make([[[0, 1], {}]] * workers))  # to warm up
        for camera_ids in ((1, 6), (0, 1, 2, 6)):
            for size in ((32, 64), (64, 128), (128, 256)):
                rows.append(cost_of(camera_ids, size, make, workers))
    return markdown([row.values() for row in rows], list(rows[0]))


def cost_of(camera_ids, size, make, workers, n=32):
    """What a scene of four frames costs: ms of one core, by part, and scenes/s of all workers."""
    world = World(range(n))
    look = (world, camera_ids, size)
    full = 4 * milliseconds(images_of, *look) / n
    world.things.kind *= 0  # nothing stands on the ground any more
    ground = 4 * milliseconds(images_of, *look) / n
    drive = milliseconds(_drive, n) / n
    jobs = []
    for i in range(2 * workers):
        seeds = range(i * BATCH, (i + 1) * BATCH)
        jobs.append([list(seeds), {"camera_ids": camera_ids, "size": size}])
    begin = time.perf_counter()
    list(make(jobs))
    rate = len(jobs) * BATCH / (time.perf_counter() - begin)
    return {
        "cameras": len(camera_ids),
        "image": f"{size[0]} x {size[1]}",
        "drive, ms": round(drive, 2),
        "ground, ms": round(ground, 2),
        "boxes, ms": round(full - ground, 2),
        "together, ms": round(drive + full, 2),
        f"scenes/s, {workers} processes": round(rate, 1),
    }


def milliseconds(work, *arguments, times=4):
    """Of this process, for a call of work; the mean of some, after one to warm up."""
    work(*arguments)
    begin = time.process_time()
    for _ in range(times):
        work(*arguments)
    return 1000 * (time.process_time() - begin) / times


def _drive(n):
    world = World(range(n))
    for _ in range(PAST + FUTURE):
        world.step(*world.expert())


def make_and_forget(seeds, view):
    """What a worker does that shows how fast it is."""
    make_scenes(seeds, **view)


def look(path, seeds, size):
    """Draw a contact sheet: a row a scene, the cameras at t0, the expert's path from above."""
    plt = pyplot()
    scene = make_scenes(seeds, size=size, frames=1)
    rows = len(seeds)
    figure, axes = plt.subplots(
        rows, 5, figsize=(17, 2.1 * rows), squeeze=False, layout="constrained"
    )
    for i, (*cameras, above) in enumerate(axes):
        for k, ax in enumerate(cameras):  # cross left, front wide, cross right, front tele
            ax.imshow(scene["images"][i, k, -1].permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        title = f"{seeds[i]} {scene['name'][i]}: {scene['reasoning'][i]}"
        cameras[0].set_title(title, loc="left", fontsize=9)
        x, y, _ = scene["ego_future_xyz"][i].T
        above.plot(x, y, "C0.", markersize=3)
        above.set(xlim=(-25, 95), ylim=(-30, 30), aspect="equal")
    write_atomically(path, lambda part: figure.savefig(part, dpi=100, format="png"))


def main():
    parser = Flags("Look into the built-in world.")
    add = parser.add_argument
    seed = whole(0, SEEDS["end"])
    pixels = whole(1, SIDE)
    add("--splits", type=whole(1, SEEDS["val"]), nargs="?", const=2000, metavar="N",
        help="print of what the first N scenes of each split are made")  # fmt: skip
    add("--cost", action="store_true", help="print what a scene costs on this machine")
    add("--workers", type=whole(1, 1024), default=2, help="with --cost: processes that make scenes")
    add("--look", metavar="PNG", help="draw a contact sheet of the seeds")
    add("--seeds", type=seed, nargs=2, default=(0, 12), metavar=("FROM", "TO"), help="with --look")
    add("--size", type=pixels, nargs=2, default=(64, 128), metavar=("H", "W"), help="with --look")
    args = parser.parse_args()
    seeds = range(*args.seeds)
    if args.splits is None and not args.cost and not args.look:
        parser.error("expected one of --splits, --cost, --look")
    if not 1 <= len(seeds) <= MOST:
        parser.error(f"--seeds: expected FROM < TO, at most {MOST} of them, not {args.seeds}")
    if args.splits is not None:
        print(splits(args.splits))
    if args.cost:
        print(cost(args.workers))
    if args.look:
        look(args.look, seeds, args.size)


if __name__ == "__main__":
    run(main)
