"""The `fastres` command. Subcommands import what is heavy, so --help and errors are instant."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastres.bench.options import MODELS, UsageError, add_arguments, check_model_name, options_from

USAGE = 2
INTERRUPTED = 130
TERMINATED = 143


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, from subcommands too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; `run` in the namespace is the function to call."""
    parser = _Parser(
        prog="fastres", description="ResNets that train and serve faster, same numbers."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    bench = commands.add_parser(
        "bench",
        help="check a converted ResNet, then time it against eager and torch.compile",
        description="Converts MODEL, checks outputs, gradients and running statistics against "
        "float64 on photographs, then times inference and training steps: eager (channels_last), "
        "torch.compile and fastres, interleaved. Prints a table, writes JSON and a PNG. "
        "Exit code: 0 done, 1 the check or fastres failed, 2 bad input.",
    )
    add_arguments(bench)
    bench.set_defaults(run=_bench)

    report = commands.add_parser(
        "report",
        help="say, module by module, what fastres fuses in a torchvision ResNet",
        description="Says, module by module, what fastres fuses in MODEL, by which backend, and "
        "the reason for what it does not.",
    )
    report.add_argument("model", metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    report.add_argument("--json", action="store_true", help="as JSON")
    report.set_defaults(run=_report)

    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what works, and why the rest does not",
        description="Versions, devices, the native module, compilers and backends, each with the "
        "reason when it is off. Exit code: 0 usable, 1 the native module is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _bench(args: argparse.Namespace, argv: list[str]) -> int:
    options = options_from(args)
    from fastres.bench.main import run

    # As an exception, SIGTERM lets the run end its workers and remove its temporary files.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        return run(options, argv)
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(args: argparse.Namespace, argv: list[str]) -> int:
    check_model_name(args.model)
    import fastres
    from fastres.bench.models import build_model

    found = fastres.report(build_model(args.model))
    print(found.to_json() if args.json else str(found))
    return 0


def _doctor(args: argparse.Namespace, argv: list[str]) -> int:
    from fastres.doctor import examine, text

    found = examine()
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 0 if found["usable"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. --help exits by itself, with 0."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    try:
        args = parser.parse_args(words)
        if args.version:
            from fastres.bench.environment import fastres_version

            print(f"fastres {fastres_version()}")
            return 0
        if args.command is None:
            parser.print_help()
            return 0
        return args.run(args, words)
    except UsageError as error:
        print(f"fastres: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("fastres: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
