import json
import os
import sys
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)  # small tensors: threads would only wait for one another
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, "tests", "golden")
sys.path.insert(0, ROOT)
if os.environ.get("ALPAMAYO_KERNELS") == "triton" and not torch.cuda.is_available():
    # The whole suite by the kernels, in Triton's interpreter; but what tests start as processes of their own is PyTorch's.
    import cpu_triton  # noqa: F401

    import kernels

    kernels.use(os.environ.pop("ALPAMAYO_KERNELS"))
    kernels.processors = 2  # the interpreter has one program run after another: the fewer, the faster


def pytest_configure(config):
    config.addinivalue_line("markers", "in_pytorch(why): with the kernels everywhere else, this stays PyTorch's")


@pytest.fixture(autouse=True)
def in_pytorch(request, monkeypatch):
    if request.node.get_closest_marker("in_pytorch"):
        monkeypatch.setattr("kernels._choice", "torch")


def made_up(name, shape):
    """A weight of the golden checkpoint, by the formula in tests/golden/README.md."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    u = torch.frac(torch.sin(12.9898 * k + zlib.crc32(name.encode()) % 100003) * 43758.5453)
    u = u - torch.floor(u)
    if len(shape) > 1:
        w = (2 * u - 1) * (3 / torch.Size(shape[1:]).numel()) ** 0.5
    else:
        w = (u - 0.5) * 0.2 if name.endswith("bias") else 0.7 + 0.6 * u
    return w.view(shape).float()


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory):
    """A tiny checkpoint in the release's format, with the weights that the official code ran with."""
    folder = tmp_path_factory.mktemp("release")
    spec = json.load(open(os.path.join(GOLDEN, "spec.json")))
    space = spec["config.json"]["action_space_cfg"]
    tensors = {}
    for name, shape in spec["tensors"].items():
        if name.startswith("action_space."):
            tensors[name] = torch.tensor(space[name.split(".")[1]])
        elif name.endswith(".freqs"):
            tensors[name] = torch.logspace(0, 2, shape[-1])[None]
        else:
            tensors[name] = made_up(name, shape)
    tensors["vlm.lm_head.weight"][spec["config.json"]["traj_token_ids"]["future_start"]] *= spec["boost_future_start_row"]
    os.makedirs(folder / "vlm")
    for file in ("config.json", "vlm/config.json"):
        (folder / file).write_text(json.dumps(spec[file]))
    (folder / "tokenizer.json").write_text(open(os.path.join(GOLDEN, "tokenizer.json")).read())
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def golden():
    """What the official code computed with it, and the scene it was given."""
    g = load_file(os.path.join(GOLDEN, "io.safetensors"))
    g["scene"] = {
        "images": g["images"][:, None],  # one camera of four frames is the same token sequence as four images
        "camera_ids": torch.zeros(1, 1, dtype=torch.long),
        **{f"ego_{a}_{b}": g[f"ego_{a}_{b}"][:, 0] for a in ("history", "future") for b in ("xyz", "rot")},
    }
    return g
