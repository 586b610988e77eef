"""The command line: only parses. `sib-fast` and `python -m sib_fast` are the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sib_fast import _interrupts, doctor
from sib_fast._version import __version__
from sib_fast.lab import panel, train
from sib_fast.lab.results import report_interrupt
from sib_fast.lab.shortcut import command as diagnose
from sib_fast.lab.study import command as study
from sib_fast.nn.inspect import add_arguments as add_inspect_arguments
from sib_fast.nn.inspect import main as inspect_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sib-fast", description="Spatial Information Bottleneck (S-IB) training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    what = "train one network, plain or S-IB, on one of the data sets (extra [lab])"
    command = commands.add_parser("train", help=what, description=what)
    train.add_arguments(command)
    command.set_defaults(main=train.main)
    what = "a picture of where trained networks find their evidence, by every explanation method (extra [explain])"
    command = commands.add_parser("explain", help=what, description=what)
    panel.add_arguments(command)
    command.set_defaults(main=panel.main)
    what = "the shortcut test: does a network, anybody's, look at the background? (extras [lab,explain])"
    command = commands.add_parser("diagnose", help=what, description=what)
    diagnose.add_arguments(command)
    command.set_defaults(main=diagnose.main)
    what = "train networks in several ways over seeds, explain and score them, write a report (extras [lab,explain])"
    command = commands.add_parser("study", help=what, description=what)
    study.add_arguments(command)
    command.set_defaults(main=study.main)
    command = commands.add_parser("doctor", help="what was built, which backends are usable here, and why not")
    command.set_defaults(main=lambda _: doctor.main())
    what = "what `prepare` would change in a model, and what of it cannot be differentiated twice"
    command = commands.add_parser("inspect", help=what, description=what)
    add_inspect_arguments(command)
    command.set_defaults(main=inspect_main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        _interrupts.raise_from_now_on()
        return args.main(args)
    except KeyboardInterrupt as error:
        return report_interrupt(args.command, error)
