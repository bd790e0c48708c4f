"""
Does the rule that grades reasoning in stage rl agree with a language model that does the same?

    python -m tools.judge http://localhost:8000/v1 --checkpoint checkpoints/nano --scenes 64

A checkpoint reasons about held-out scenes of split tail, once each, as in stage rl's rollouts.
rl.grade and a model behind the OpenAI-compatible endpoint, rl.Judge, grade each from 0 to 5. Among
few scenes, and where almost all is right, agreement says little: look at both means.
"""
import json

import numpy as np

import doors
import rl
from alpamayo import NANO, load_model
from tools import markdown
from tools.common import COUNT, SIDE, batches, world_scenes


def reasoning_of(model, scenes):
    """What the model says of each scene, and the truth: [(said, true)]."""
    pairs = []
    for first, scene in batches(scenes):
        out = model.sample(scene, n=1, temperature=1.5, top_p=1.0, steps=1, seed=first)
        pairs += zip((texts[0] for texts in out.reasoning), scene["reasoning"])
    return pairs


def agreement(ours, theirs):
    """How two lists of grades compare: {name: number}."""
    apart = abs(np.array(ours) - np.array(theirs))
    equal = np.mean(apart == 0)
    near = np.mean(apart <= 1)
    return {
        "scenes": len(ours),
        "rule, mean": np.mean(ours),
        "judge, mean": np.mean(theirs),
        "equal": equal,
        "within one": near,
    }


def main():
    p = doors.Flags("Compare the rule that grades reasoning with a language model.")
    add = p.add_argument
    add("url", metavar="URL", type=rl.endpoint,
        help="an OpenAI-compatible endpoint; its key is in JUDGE_API_KEY")
    add("--model", default="judge", help="its name there")
    add("--checkpoint", metavar="FOLDER", default=NANO, help="whose reasoning is graded")
    add("--device", type=doors.device_of, help="cpu, cuda or mps (default: a GPU if there is one)")
    add("--scenes", type=COUNT, default=64,
        help="held-out scenes that training never shows the like")
    add("--size", type=SIDE, nargs=2, default=(64, 128), help="H W, pixels of the images")
    add("--cache", metavar="FOLDER", default="data", help="where rendered scenes are kept")
    args = p.parse_args()
    judge = rl.Judge(args.url, args.model)
    model = load_model(args.checkpoint, args.device)
    pairs = reasoning_of(model, world_scenes(model.cfg, "tail", args.scenes, args))
    found = agreement([rl.grade(*pair) for pair in pairs], judge(pairs))
    print(markdown([[f"{value:.4g}" for value in found.values()]], list(found), left=0))
    print(json.dumps({"checkpoint": args.checkpoint, **found}))


if __name__ == "__main__":
    doors.run(main)
