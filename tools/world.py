"""
What is in the built-in world: of what its splits are made, what a scene costs, how scenes look.
"""
import argparse
import json
import multiprocessing
import sys
import time

import torch

from data import BATCH, SPLITS, make_scenes
from world import COMBINATIONS, FUTURE, HISTORY, PAST, RARE, SEEDS, SITUATIONS, World, draw, images_of


def look(path, seeds, size):
    """A contact sheet: a row a scene, the cameras at t0, and the expert's path from above."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    order = (1, 6, 0, 2)
    scene = make_scenes(seeds, size=size, frames=1)
    at = [scene["camera_ids"][0].tolist().index(i) for i in order]
    figure, axes = plt.subplots(len(seeds), 5, figsize=(17, 2.1 * len(seeds)), squeeze=False, layout="constrained")
    for i, row in enumerate(axes):
        for ax, camera in zip(row, at):
            ax.imshow(scene["images"][i, camera, -1].permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        row[0].set_title(f"{seeds[i]} {scene['name'][i]}: {scene['reasoning'][i]}", loc="left", fontsize=9)
        x, y, _ = torch.cat([scene["ego_history_xyz"][i], scene["ego_future_xyz"][i]]).unbind(-1)
        row[4].plot(x[:HISTORY], y[:HISTORY], "0.6", x[HISTORY:], y[HISTORY:], "C0.", markersize=3)
        row[4].set(xlim=(-25, 95), ylim=(-30, 30), aspect="equal")
        row[4].grid(alpha=0.3)
        row[4].tick_params(labelsize=6)
    figure.savefig(path, dpi=100)


def splits(scenes):
    """Of what the first scenes of each split are made, as Markdown: how many of each situation and weather."""
    rows = {name: "" for name in SITUATIONS}
    rows |= {name: " + ".join(causes or ("any",)) for name, causes in COMBINATIONS.items()}
    rows |= {name: f"does as a {cause}" if cause == "pedestrian" else f"stands as {cause}"
             for name, cause in RARE.items()}
    weather = {"day": (0, 0, 0), "dusk": (1, 0, 0), "rain": (0, 1, 0), "haze": (0, 0, 1),
               "both dusk and rain": (1, 1, 0)}
    lines = ["| scene | combines | " + " | ".join(SPLITS) + " |", "| --- | --- |" + " ---: |" * len(SPLITS)]
    draws = [[draw(seed) for seed in range(SEEDS[split], SEEDS[split] + scenes)] for split in SPLITS]
    for name, combines in rows.items():
        lines.append([name, combines, *(sum(one.situation == name for one in some) for some in draws)])
    weather_of = lambda one: (one.dusk > 0, one.rain > 0, one.rain == 0 and one.visibility < 150)
    for name, kind in weather.items():
        lines.append([f"*{name}*", "", *(sum(weather_of(one) == kind for one in some) for some in draws)])
    lines.append(["*shown after t0*", "", *(sum(one.late > 0 for one in some) for some in draws)])
    return "\n".join(line if isinstance(line, str) else "| " + " | ".join(map(str, line)) + " |" for line in lines)


def measure(camera_ids, size, pool, workers, scenes=32, frames=4):
    """What a scene of this many frames costs: ms of one core by part, and scenes/s of workers that do nothing else."""
    clock = [time.process_time()]
    world = World(range(scenes))
    for _ in range(PAST + FUTURE):
        world.step(*world.expert())
    clock.append(time.process_time())
    world = World(range(scenes))
    for things in (True, False):                # then with nothing that stands on the ground
        world.things.kind *= things
        images_of(world, camera_ids, size)          # to warm up
        clock.append(time.process_time())
        for _ in range(frames):
            images_of(world, camera_ids, size)
        clock.append(time.process_time())
    drive, full, ground = (1000 * (clock[i + 1] - clock[i]) / scenes for i in (0, 2, 4))
    jobs = [dict(seeds=range(i * BATCH, (i + 1) * BATCH), camera_ids=camera_ids, size=size) for i in range(2 * workers)]
    begin = time.perf_counter()
    pool.map(_make_and_forget, jobs, chunksize=2)
    rate = len(jobs) * BATCH / (time.perf_counter() - begin)
    return {"cameras": len(camera_ids), "image": f"{size[0]} x {size[1]}", "drive, ms": round(drive, 2),
            "ground, ms": round(ground, 2), "boxes, ms": round(full - ground, 2),
            "together, ms": round(drive + full, 2), f"scenes/s, {workers} processes": round(rate, 1)}


def _make_and_forget(options):
    make_scenes(**options)


def cost(workers):
    """A table of `measure` in Markdown, and the same as a line of JSON."""
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        pool.map(_make_and_forget, [dict(seeds=range(2), size=(32, 64))] * workers, chunksize=1)
        rows = [measure(camera_ids, size, pool, workers)
                for camera_ids in ((1, 6), (0, 1, 2, 6)) for size in ((32, 64), (64, 128), (128, 256))]
    for line in (rows[0], ["---:"] * len(rows[0]), *(row.values() for row in rows)):
        print("|", " | ".join(map(str, line)), "|")
    print(json.dumps(rows))


def main():
    parser = argparse.ArgumentParser(description="Look into the built-in world.")
    parser.add_argument("--splits", type=int, nargs="?", const=2000, metavar="N",
                        help="print of what the first N scenes of each split are made")
    parser.add_argument("--cost", action="store_true", help="print what a scene costs on this machine")
    parser.add_argument("--look", metavar="PNG", help="draw a contact sheet of the seeds")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 12), metavar=("FROM", "TO"), help="seeds to look at")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 128), metavar=("H", "W"), help="pixels of an image")
    parser.add_argument("--workers", type=int, default=2, help="processes that make scenes")
    args = parser.parse_args()
    if args.splits is not None:
        print(splits(args.splits))
    if args.cost:
        cost(max(1, args.workers))
    if args.look:
        look(args.look, range(*args.seeds), args.size)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.world: {error}")
