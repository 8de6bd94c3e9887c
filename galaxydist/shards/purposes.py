"""What a hash is for: always the last integer of a hash, so that two choices about one galaxy never share a draw."""

from enum import IntEnum


class Purpose(IntEnum):
    """Numbers are part of the order's version: never change or reuse one."""

    SHARDS = 1
    WINDOW = 2
    CLASS_DRAWS = 3
    GALAXY_DRAWS = 4
    POSITIONS = 5
    STORAGE = 6
    ANGLE = 16
    FLIP = 17
    ZOOM = 18
    SHIFT_X = 19
    SHIFT_Y = 20
    BRIGHTNESS = 21
    NOISE_LEVEL = 22
    NOISE_PLACE = 23
    NOISE_TABLE = 24
    MIXUP_FACTOR = 32
    CUTMIX_BOX = 33
    MIX_CHANGED = 34
    MIX_KIND = 35
    MODEL = 48
