"""
A small world of traffic, for machines that have no data. It needs no download, and it made the
cause of every scene, so it knows the label. It also knows what it never shows in training: the long
tail. README.md beside this tells how it works and how to add a situation.

    cameras.py    the rig of cameras and their rays
    roads.py      road coordinates: s along a road, d to its left
    causes.py     what a seed draws: a road, its causes, a crowd
    traffic.py    the World: it moves, drives and judges
    render.py     what its cameras see

    seed = world.find("red light", "val")    # the first such scene of the validation split
    traffic = world.World([seed])            # at t0 - 2 s
    for _ in range(world.PAST):
        traffic.step(*traffic.expert())      # to t0
    world.images_of(traffic, (1,), (64, 128))

Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw
left-positive.
"""
from world.cameras import RIG, rays, rig_camera
from world.causes import (
    BUMP,
    COMBINATIONS,
    FRONT,
    FUTURE,
    HISTORY,
    KINDS,
    LEFT,
    LENGTH,
    PAST,
    RARE,
    RIGHT,
    SEEDS,
    SITUATIONS,
    WHEELBASE,
    WIDTH,
    WORLD_VERSION,
    draw,
    find,
)
from world.render import images_of
from world.roads import LANE, locate, place
from world.traffic import World
