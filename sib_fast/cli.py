"""The command line: only parses. `sib-fast` and `python -m sib_fast` are the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sib_fast._version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sib-fast", description="Spatial Information Bottleneck (S-IB) training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what was built, which backends are usable here, and why not")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    parser.parse_args(argv)
    from sib_fast import doctor

    return doctor.main()
