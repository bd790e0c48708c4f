"""
What is in the built-in world, what a scene and a drive cost, and how scenes look.

    python -m tools.world --splits                          # of what the splits are made
    python -m tools.world --cost                            # milliseconds of a scene, by part
    python -m tools.world --cost drive                      # steps a second of closed loop
    python -m tools.world --look sheet.png --seeds 0 12     # twelve scenes on a sheet
"""

import time
from collections import Counter

import torch

import store
from alpamayo import NANO, load_model
from data import BATCH, SIDE, SPLITS, Recorder, View, make_scenes, view_of
from doors import Flags, device_of, run, whole, write_atomically
from draw import pyplot
from rl import likeliest_of
from tools import markdown
from world import COMBINATIONS, FUTURE, PAST, RARE, SEEDS, SITUATIONS, World, draw, images_of

AIR = ("*day*", "*dusk*", "*rain*", "*haze*", "*dusk and rain*", "*shown after t0*")
PACE = 5  # steps between two looks, and plans
PLAN_STEPS = 5  # of Euler in a plan, as in the closed loop's table
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
    """Of scenes: a table of `cost_of` in Markdown."""
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


DRIVE_TICKS = 10  # of 0.1 s, that are timed: a second, with two looks and plans
ROUNDS = 2  # and the fastest counts: other programs only slow one down


def drive_cost(checkpoint, device):
    """Steps of 0.1 s a second of closed loop, all scenarios of a batch together, as Markdown."""
    model = load_model(checkpoint, device)
    rows = []
    for cores in (1, 2) if model.device.type == "cpu" else (1,):
        torch.set_num_threads(cores)
        for batch in (1, 8, 32, 128):
            world = World(range(SEEDS["val"], SEEDS["val"] + batch), model.device)
            rates = [steps_a_second(world, model, *what) for what in ((0, 0), (1, 0), (1, 1))]
            rows.append([cores, batch, *(f"{rate:,.0f}" for rate in rates)])
    return markdown(rows, ["cores", "scenarios", "world alone", "with images", "with the model"], 0)


def steps_a_second(world, model, looks, plans):
    """Steps of all scenarios of a World a second. The expert drives, whatever the model plans.

    looks, plans: whether its cameras look and the model plans, every PACE steps, as in data.drive.
    """
    view = view_of(model.cfg, (64, 128))
    recorder = Recorder(world.repeat(1), View(**view))
    world = recorder.world
    for tick in range(PAST):
        recorder.note(look=looks and tick % PACE == 0)
        world.step(*world.expert())
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for tick in range(DRIVE_TICKS):
            recorder.note(look=looks and tick % PACE == 0)
            if plans and tick % PACE == 0:
                likeliest_of(model, recorder.scene(), PLAN_STEPS, model.cfg.reasoning == "on")
            world.step(*world.expert())
            world.judge()
        world.speed.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return len(world.x) * DRIVE_TICKS / min(seconds)


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
    add("--cost", choices=("scene", "drive"), nargs="?", const="scene",
        help="print what a scene costs on this machine, or driving in closed loop")
    add("--workers", type=whole(1, 1024), default=2, help="with --cost: processes that make scenes")
    add("--checkpoint", default=NANO, metavar="FOLDER", help="with --cost drive: the model")
    add("--device", type=device_of,
        help="with --cost drive: cpu, cuda or mps (default: a GPU if there is one)")
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
    if args.cost == "scene":
        print(cost(args.workers))
    if args.cost == "drive":
        print(drive_cost(args.checkpoint, args.device))
    if args.look:
        look(args.look, seeds, args.size)


if __name__ == "__main__":
    run(main)
