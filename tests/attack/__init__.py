"""A standing attack: crafted files, kills, full disks, rival writers, bad values, steps that fail, extreme tiles.

`make attack` runs it. Each kind is a file with a function ``attack(seed, folder) -> Found``: one case, made of a seed alone.
"""
