"""
A small world of traffic, for machines that have no data: it needs no download, and because it made the cause of every
scene it knows the label. It also knows what it never shows in training: the long tail.

    cameras.py    the rig and its rays
    roads.py      road coordinates
    causes.py     what a seed draws: a road, its causes, a crowd
    traffic.py    the World that moves, drives and judges
    render.py     what its cameras see
    README.md     how to add a situation

Ego frame: origin at the rear axle on the ground, x forward, y left, z up; metres, seconds, yaw left-positive.
"""
from world.cameras import RIG, rays, rig_camera
from world.causes import (
    BUMP, COMBINATIONS, FRONT, FUTURE, HISTORY, LEFT, LENGTH, PAST, RARE, RIGHT, SEEDS, SITUATIONS, WHEELBASE, WIDTH,
    WORLD_VERSION, draw, split_of)
from world.render import images_of
from world.roads import LANE, locate, place
from world.traffic import World, follow
