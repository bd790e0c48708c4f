"""
Do many processes learn what one does? On this machine: its GPUs, or else its CPU.

    python -m tools.many --processes 2

Trains nano for some steps in every stage: in one process with --accumulate N, in N by DDP, and in N
sharded. Prints the largest relative difference between their logs. On a GPU the arithmetic is
bfloat16, where sums in another order differ by a percent."""
import json
import os
import subprocess
import sys
import tempfile

import doors
from doors import whole

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = {
    "action": "--stage action",
    "all": "--stage all --action-share 0.5",
    "expert": "--stage reason --train expert --init checkpoints/nano",
    "adapters": "--stage reason --lora 4 --init checkpoints/nano",
    "rl": "--stage rl --split val --credit total --group 4 --init checkpoints/nano",
}
HOWS = {"by DDP": "", "sharded": "--shard"}


def train(words, processes, out):
    """The lines of the log of a run; ValueError, with what it said last, where it fails."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launch * (processes > 1), "train.py", *words, "--out", out]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return doors.read_json_lines(os.path.join(out, "log.jsonl"))


def numbers_of(line):
    """{name: float} of a line of the log and of its validations."""
    found = {name: value for name, value in line.items() if isinstance(value, float)}
    for name in line.keys() & {"val", "before"}:
        found |= {f"{name} {key}": value for key, value in line[name].items()}
    found.pop("mismatch", None)  # itself a rounding error
    return found


def apart(ours, theirs):
    """(Largest relative difference, the name of what differs so) of two logs."""
    worst = 0.0, ""
    for a, b in zip(map(numbers_of, ours), map(numbers_of, theirs), strict=True):
        for name, value in a.items():
            worst = max(worst, (abs(value - b[name]) / max(abs(value), 0.01), name))
    return worst


def main():
    parser = doors.Flags("Do many processes learn what one does?")
    parser.add_argument("--processes", type=whole(2, 1024), default=2, help="to share a batch")
    parser.add_argument("--steps", type=whole(1), default=4, help="of each run")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES),
                        help="which to try")
    parser.add_argument("--cache", default="data", help="where rendered scenes are kept")
    args = parser.parse_args()
    n = args.processes
    common = f"--steps {args.steps} --batch {2 * n} --scenes 64 --val-scenes {n + 1} --val-every 99"
    common = [*common.split(), "--save-every", "99", "--cache", os.path.abspath(args.cache)]
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            words = [*common, *STAGES[stage].split()]
            one = train([*words, "--accumulate", str(n)], 1, os.path.join(folder, stage, "one"))
            for how, more in HOWS.items():
                out = os.path.join(folder, stage, how)
                far, name = apart(one, train([*words, *more.split()], n, out))
                result = {"stage": stage, "processes": n, "how": how, "apart": far, "in": name}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    doors.run(main)
