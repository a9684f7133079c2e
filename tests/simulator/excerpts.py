"""Small traces of this folder's own making: conversations over one system prompt, in Mooncake's format."""

import json
import random
from pathlib import Path

BLOCK = 512


def conversations(path: Path, count: int = 24, turns: int = 4, seed: int = 0) -> Path:
    """Each turn repeats the turns before it. Arrivals in buckets of 3 s, as Mooncake's are."""
    draw = random.Random(seed)
    fresh = iter(range(1, 1 << 20))
    lines: list[tuple[int, int, int, list[int]]] = []
    for _ in range(count):
        names, bucket = [0], draw.randrange(4)
        for _ in range(turns):
            names = [*names, *(next(fresh) for _ in range(draw.randint(1, 6)))]
            length = len(names) * BLOCK - draw.randrange(BLOCK)
            lines.append((3000 * bucket, length, draw.randint(1, 200), names))
            bucket += draw.randint(2, 6)
    lines.sort(key=lambda line: line[0])
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines))
    return path
