"""
The paper's experiments in small: each prints Markdown tables, then its numbers as JSON.

    python -m tools.experiments list       their names, and what they need
    python -m tools.experiments vision     Table 12: four ways to see
    python -m tools.experiments rl         Table 9: what each reward adds
    python -m tools.experiments signal     which part of stage rl's gradient is signal
    python -m tools.experiments decoding   Table 11: the path by tokens or by flow
    python -m tools.experiments latency    Table 13: the milliseconds of a plan

What a table needs is trained once, --jobs at a time, and gone on with after a kill: trainings.py.
"""
import doors
from doors import whole
from tools.common import SIDE
from tools.experiments import decoding, latency, rewards, signal, vision

EXPERIMENTS = {
    "vision": vision,
    "rl": rewards,
    "signal": signal,
    "decoding": decoding,
    "latency": latency,
}


def parse_flags():
    p = doors.Flags("Experiments of the paper in small.")
    named = p.add_subparsers(dest="name", required=True, parser_class=doors.Flags)
    named.add_parser("list", description="Names, and what they need.")
    for name, page in EXPERIMENTS.items():
        add = named.add_parser(name, description=page.ABOUT).add_argument
        add("--device", type=doors.device_of,
            help="cpu, cuda or mps (default: a GPU if there is one)")
        add("--size", type=SIDE, nargs=2, default=(64, 128), help="H W, pixels of the images")
        add("--cache", default="data", help="the folder where rendered scenes are kept")
        add("--out", default="out/experiments", type=doors.folder_to_write, help="the models")
        add("--seeds", type=whole(), nargs="+", default=[0], help="trainings of each row")
        add("--jobs", type=whole(1, 1000), default=1, help="trainings at a time, a thread each")
        page.add_flags(add)
    return p.parse_args()


def main():
    args = parse_flags()
    if args.name == "list":
        for name, page in EXPERIMENTS.items():
            print(f"{name:10} {page.ABOUT}; {page.NEEDS}")
    else:
        EXPERIMENTS[args.name].main(args)


if __name__ == "__main__":
    doors.run(main)
