"""The world's cameras: where they are, and the rays of their pixels. One `project` for all, in alpamayo.py."""
import math

import torch

# The world's cameras: id -> (position in the ego frame, yaw, horizontal field of view), images twice as wide as high.
# They are equi-angular (f-theta with pixel radius = f * angle): a pinhole of 120 degrees would spend its pixels on the
# rim and leave four for a pedestrian ahead.
RIG = {
    0: ((1.6, 0.9, 1.5), math.radians(55), math.radians(120)),
    1: ((1.6, 0.0, 1.5), 0.0, math.radians(120)),
    2: ((1.6, -0.9, 1.5), math.radians(-55), math.radians(120)),
    6: ((1.6, 0.0, 1.5), 0.0, math.radians(30)),
}


def rays(intrinsics, H, W):
    """The inverse of `project` at every pixel centre: unit directions (H, W, 3) in camera axes."""
    kind, width, height, cx, cy, a0, a1, a2, a3, a4 = intrinsics.double().tolist()
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    x, y = (u * (width / W) - cx).double(), (v * (height / H) - cy).double()
    if kind == 1:
        direction = torch.stack([x / a0, y / a1, torch.ones_like(x)], -1)
    else:
        radius = torch.hypot(x, y)
        th = (radius - a0) / a1                                 # exact when equi-angular; Newton does the rest
        for _ in range(10):
            error = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4))) - radius
            th = th - error / (a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4)))
        side = torch.sin(th) / radius.clamp(min=1e-9)
        direction = torch.stack([x * side, y * side, torch.cos(th)], -1)
    return torch.nn.functional.normalize(direction, dim=-1).float()


def rig_camera(camera_id, H, W, rig=RIG):
    """intrinsics (10,) and camera_to_ego (4, 4) of a camera of the rig at H x W pixels."""
    if camera_id not in rig:
        raise ValueError(f"camera_ids: the rig has the cameras {tuple(rig)}, not {camera_id}")
    position, yaw, fov = rig[camera_id]
    c, s = math.cos(yaw), math.sin(yaw)
    pose = torch.eye(4)
    pose[:3, :3] = torch.tensor([[s, 0, c], [-c, 0, s], [0, -1, 0]])     # columns: right, down, out
    pose[:3, 3] = torch.tensor(position)
    return torch.tensor([0, W, H, W / 2, H / 2, 0, W / fov, 0, 0, 0]), pose

