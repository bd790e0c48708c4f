"""
The world's cameras: where they are, and the rays of their pixels.

They are equi-angular: f-theta with pixel radius = f * angle. A pinhole of 120 degrees would spend
its pixels on the rim and leave four for a pedestrian ahead. Images are twice as wide as high.
"""

import math

import torch
from torch.nn.functional import normalize

WIDE = math.radians(120)
# id: (position in the ego frame, yaw, horizontal field of view)
RIG = {
    0: ((1.6, 0.9, 1.5), math.radians(55), WIDE),
    1: ((1.6, 0.0, 1.5), 0.0, WIDE),
    2: ((1.6, -0.9, 1.5), math.radians(-55), WIDE),
    6: ((1.6, 0.0, 1.5), 0.0, math.radians(30)),
}


def rays(intrinsics, H, W):
    """Unit directions (H, W, 3) of the pixel centres, in camera axes: the inverse of `project`."""
    kind, width, height, cx, cy, *lens = intrinsics.double().tolist()
    x = ((torch.arange(W) + 0.5) * (width / W) - cx).double()
    y = ((torch.arange(H)[:, None] + 0.5) * (height / H) - cy).double()
    if kind == 1:  # a pinhole
        direction = x / lens[0], y / lens[1], torch.ones(H, W)
    else:
        radius = torch.hypot(x, y)
        angle = angle_at(radius, *lens)
        side = torch.sin(angle) / radius.clamp(min=1e-9)
        direction = x * side, y * side, torch.cos(angle)
    direction = torch.stack(torch.broadcast_tensors(*direction), -1)
    return normalize(direction, dim=-1).float()


def angle_at(radius, a0, a1, a2, a3, a4):
    """Angle off the optical axis (rad) at which the f-theta polynomial is this radius (pixels)."""
    th = (radius - a0) / a1  # exact for an equi-angular lens; Newton's method does the rest
    for _ in range(10):
        error = a0 + th * (a1 + th * (a2 + th * (a3 + th * a4))) - radius
        slope = a1 + th * (2 * a2 + th * (3 * a3 + th * 4 * a4))
        th -= error / slope
    return th


def rig_camera(camera_id, H, W, rig=RIG):
    """intrinsics (10,) and camera_to_ego (4, 4) of a camera of the rig at H x W pixels."""
    if camera_id not in rig:
        raise ValueError(f"camera_ids: the rig has the cameras {tuple(rig)}, not {camera_id}")
    position, yaw, fov = rig[camera_id]
    c = math.cos(yaw)
    s = math.sin(yaw)
    pose = torch.eye(4)
    axes = [[s, 0, c], [-c, 0, s], [0, -1, 0]]  # columns: right, down, out
    pose[:3, :3] = torch.tensor(axes)
    pose[:3, 3] = torch.tensor(position)
    return torch.tensor([0, W, H, W / 2, H / 2, 0, W / fov, 0, 0, 0]), pose


def rig_rays(camera_ids, H, W):
    """intrinsics (cameras, 10), camera_to_ego (cameras, 4, 4), and the rays of the rig's pixels.

    The rays are unit directions (cameras, H, W, 3) in the ego frame."""
    cameras = [rig_camera(i, H, W) for i in camera_ids]
    turned = [rays(lens, H, W) @ pose[:3, :3].T for lens, pose in cameras]
    intrinsics, pose = map(torch.stack, zip(*cameras))
    return intrinsics, pose, torch.stack(turned)
