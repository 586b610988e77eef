"""What got slower: `python -m benchmarks.compare old.json new.json`.

A case is slower, or faster, where the medians differ by more than both spreads together. Exit status: 0 nothing slower,
1 something slower, 2 not comparable (another machine, or no case in common).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.stored import Figure, figures, load, machine


def changes(old: dict[tuple, Figure], new: dict[tuple, Figure]) -> list[tuple[str, Figure, Figure]]:
    """("slower" | "faster" | "same", old, new) for every case that both hold."""
    out = []
    for key in (key for key in old if key in new):
        was, now = old[key], new[key]
        noise = was.spread + now.spread
        word = "slower" if now.median - was.median > noise else "faster" if was.median - now.median > noise else "same"
        out.append((word, was, now))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--across-machines", action="store_true", help="compare although the machines differ")
    args = parser.parse_args(argv)
    old, new = load(args.old), load(args.new)
    if machine(old) != machine(new) and not args.across_machines:
        print(f"not comparable: {machine(old)} and {machine(new)} (--across-machines compares them all the same)")
        return 2
    found = changes({f.key: f for f in figures(old)}, {f.key: f for f in figures(new)})
    if not found:
        print("not comparable: no case in common")
        return 2
    for word, was, now in found:
        if word != "same":
            case = "×".join(map(str, was.case))
            print(
                f"{word}: {was.suite} {case} {was.variant}: {was.median:.4g} -> {now.median:.4g} ms "
                f"({now.median / was.median:.2f}×; spreads {was.spread:.2g}, {now.spread:.2g})"
            )
    slower = sum(word == "slower" for word, *_ in found)
    print(f"{len(found)} compared, {slower} slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
