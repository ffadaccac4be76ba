"""Check whether a checkpoint is really sparse: any safetensors folder or state dict, layer by layer, without building the model.

python examples/verify_a_checkpoint.py FOLDER [PATTERN]

Without a pattern, a checkpoint that bisparse wrote is checked against its own pattern; for others, the patterns that they obey
are printed. Exit code 1 if a layer breaks the pattern.
"""

import sys
from pathlib import Path

import bisparse
from bisparse.checkpoint import SIDECAR, detect_patterns


def main(folder: str, pattern: str | None = None) -> int:
    if pattern is None and not (Path(folder) / SIDECAR).exists():
        for layer in detect_patterns(folder):
            print(f"{layer.layer:50} density {layer.density:.3f}  {', '.join(map(str, layer.notable)) or 'no pattern'}")
        return 0
    result = bisparse.verify_checkpoint(folder, pattern)
    for layer in result.layers:
        print(f"{'ok' if layer else 'BROKEN':7} {layer.message}")
    print(result.message)
    return 0 if result else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) in (2, 3) else __doc__)
