"""The `fastres` command. Subcommands import what is heavy, so --help and errors are instant."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from fastres.bench.options import (
    MIN_SIZE,
    MODELS,
    UsageError,
    add_arguments,
    at_least,
    check_model_name,
    check_pixels,
    check_training_batch,
    options_from,
    positive,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

USAGE = 2
INTERRUPTED = 130
TERMINATED = 143
CLOSED = 141  # as a shell says of a process that SIGPIPE ended


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
    report.add_argument(
        "--batch", type=at_least(1), metavar="N", help="convert, run N images, and say what was "
        "chosen for them and why (the options below are of these images)",
    )  # fmt: skip
    _add_sample_arguments(report)
    report.set_defaults(run=_report)

    roofline = commands.add_parser(
        "roofline",
        help="say how many bytes and FLOPs a model moves, and the images a second that allows",
        description="Counts bytes and FLOPs of every kernel of a step of MODEL, for each rung of "
        "fusion: a eager; b what convert does; c1, c2, d with convolutions of our own; folded for "
        "inference. The ceiling is batch / sum over kernels of max(bytes / bandwidth, FLOPs / "
        "rate). Nothing is run: docs/roofline.md.",
    )
    _add_roofline_arguments(roofline)
    roofline.set_defaults(run=_roofline)

    tune = commands.add_parser(
        "tune",
        help="measure which kernels are fastest for a model on this machine, and remember them",
        description="Measures, for every distinct block of MODEL, the original forward and each "
        "rung of fusion that runs here, after checking its numbers; saves the choices for later "
        "runs of fastres on this machine (FASTRES_CACHE). Ctrl-C and SIGTERM keep what was "
        "measured. "
        "Exit code: 0 done, 1 failed, 2 bad input.",
    )
    _add_tune_arguments(tune)
    tune.set_defaults(run=_tune)

    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what works, and why the rest does not",
        description="Versions, devices, the native module, compilers and backends, each with the "
        "reason when it is off. Exit code: 0 usable, 1 the native module is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_roofline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    parser.add_argument(
        "--batch", type=at_least(1), default=256, metavar="N", help="images a step (default 256)"
    )
    parser.add_argument(
        "--size",
        type=at_least(MIN_SIZE),
        default=224,
        metavar="PX",
        help="side of the square input (default 224)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of activations (default bf16); parameters are fp32",
    )
    parser.add_argument(
        "--inference", action="store_true", help="one forward in eval mode, not a training step"
    )
    parser.add_argument("--rung", metavar="RUNG", help="this rung only (default: all of them)")
    parser.add_argument(
        "--bandwidth",
        type=positive("GB/s"),
        default=4300.0,
        metavar="GB/S",
        help="memory bandwidth for the ceiling (default 4300, an H200)",
    )
    parser.add_argument(
        "--rate",
        type=positive("TFLOP/s"),
        default=790.0,
        metavar="TFLOP/S",
        help="arithmetic rate for the ceiling (default 790, an H200 in bf16)",
    )
    parser.add_argument("--layers", action="store_true", help="also every kernel of each rung")
    parser.add_argument("--json", action="store_true", help="as JSON; bytes are of the batch")


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=at_least(MIN_SIZE),
        default=224,
        metavar="PX",
        help="side of the square input (default 224)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="autocast's (default fp32: off)",
    )
    parser.add_argument(
        "--mode", choices=("both", "training", "inference"), default="both", help="(default both)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="(default cuda where there is one)"
    )


def _add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    parser.add_argument(
        "--batch", type=at_least(1), default=8, metavar="N", help="images (default 8)"
    )
    _add_sample_arguments(parser)
    parser.add_argument(
        "--seconds", type=positive("s"), default=60.0, metavar="S", help="to time (default 60)"
    )
    parser.add_argument(
        "--per-conv",
        action="store_true",
        help="also choose each pass of each conv inside the fastest rung with fused convs",
    )
    parser.add_argument(
        "--limit",
        type=positive("s"),
        metavar="S",
        help="begin nothing new after S seconds, checks and compilation included (default: none)",
    )
    parser.add_argument(
        "--candidate-seconds",
        type=positive("s"),
        default=300.0,
        metavar="S",
        help="for the check of one candidate, on CUDA, before it is rejected (default 300)",
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="only blocks not measured on this machine yet: goes on after --limit or Ctrl-C",
    )


def _device(args: argparse.Namespace) -> torch.device:
    import torch

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: there is no CUDA device")
    return device


def _sample(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, torch.autocast]:
    """Random images in channels_last, and the autocast to run them under."""
    import torch

    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    context = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    return x.contiguous(memory_format=torch.channels_last), context


def _tune(args: argparse.Namespace, argv: list[str]) -> int:
    check_model_name(args.model)
    check_pixels(args.batch, args.size)
    if args.mode != "inference":
        check_training_batch(args.batch, args.size)
    import torch

    import fastres
    from fastres import plan, tuning
    from fastres.bench.models import build_model
    from fastres.bench.progress import Progress

    device = _device(args)
    file = plan.cache_file(plan.current(device).who)
    reason = plan.why_not_writable(file)
    if reason is not None:
        raise UsageError(f"the plan cannot be saved ({reason}); set FASTRES_CACHE to a folder")
    model = build_model(args.model).to(device).to(memory_format=torch.channels_last)
    fastres.convert(model)
    x, context = _sample(args, device)
    modes = tuning.MODES if args.mode == "both" else (args.mode,)
    done: list[str] = []
    # As an exception, SIGTERM ends the process in which a candidate is checked.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED))
    try:
        with context, Progress(0) as progress:
            found = fastres.tune(
                model, x, modes=modes, seconds=args.seconds, progress=progress,
                per_conv=args.per_conv, limit=args.limit,
                candidate_seconds=args.candidate_seconds, missing=args.missing,
                each=lambda path, key, entry: done.append(path),
            )  # fmt: skip
    except BaseException:
        unsaved = plan.current(device).unsaved
        kept = f"{len(done)} blocks are saved in {file}" if done else "nothing was measured yet"
        kept = f"not saved: {unsaved}" if unsaved else f"{kept}; --missing goes on with the others"
        print(f"fastres: {kept}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.missing and not found.entries and not found.left:
        print("nothing is missing: every block was measured before")
    print(found)
    unsaved = plan.current(device).unsaved
    if unsaved is not None:
        print(f"fastres: error: not saved: {unsaved}", file=sys.stderr)
        return 1
    print(f"saved in {file}")
    return 0


def _checkout_bench(args: argparse.Namespace, argv: list[str]) -> int:
    """bench.report or bench.compare, which a checkout has and an installed package has not."""
    import importlib
    from pathlib import Path

    option = "--report" if args.report else "--compare"
    root = Path(__file__).resolve().parents[1]
    if len(argv) != (2 if args.report else 4):  # with "bench"
        raise UsageError(f"argument {option}: goes alone")
    if not (root / "bench" / "report.py").is_file():
        raise UsageError(f"argument {option}: needs a checkout of fastres; {root} has no bench/")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if args.report:
        return importlib.import_module("bench.report").main([])
    return importlib.import_module("bench.compare").main(args.compare)


def _bench(args: argparse.Namespace, argv: list[str]) -> int:
    if args.report or args.compare:
        return _checkout_bench(args, argv)
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
    check_pixels(args.batch or 1, args.size)
    if args.batch is not None and args.mode != "inference":
        check_training_batch(args.batch, args.size)
    import fastres
    from fastres.bench.models import build_model

    model = build_model(args.model)
    if args.batch is not None:
        import torch

        device = _device(args)
        model = fastres.convert(model.to(device).to(memory_format=torch.channels_last))
        x, context = _sample(args, device)
        with context:
            if args.mode != "inference":
                model.train()(x)
            if args.mode != "training":
                with torch.no_grad():
                    model.eval()(x)
    found = fastres.report(model)
    print(found.to_json() if args.json else str(found))
    return 0


def _roofline(args: argparse.Namespace, argv: list[str]) -> int:
    check_model_name(args.model)
    check_pixels(args.batch, args.size)
    from fastres import roofline

    training = not args.inference
    if args.rung is not None:
        try:
            roofline.check_rung(args.rung, training)
        except ValueError as error:
            raise UsageError(f"argument --rung: {str(error).removeprefix('roofline: ')}") from error
    from rich.console import Console

    from fastres.bench.models import build_model

    shape = (args.batch, 3, args.size, args.size)
    rungs = None if args.rung is None else [args.rung]
    net = build_model(args.model)
    found = roofline.ladder(net, shape, args.dtype, training, rungs, args.model)
    bandwidth, rate = args.bandwidth * 1e9, args.rate * 1e12
    if args.json:
        print(json.dumps(roofline.ladder_dict(found, bandwidth, rate, args.layers), indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 140)
    if args.layers:
        for rung in found:
            console.print(rung.table())
    console.print(roofline.comparison(found, bandwidth, rate))
    print(f"ceiling at {args.bandwidth:,g} GB/s and {args.rate:,g} TFLOP/s; docs/roofline.md")
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
        code = args.run(args, words)
        sys.stdout.flush()  # here, where a closed pipe can be answered
        return code
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the exit's own flush
        return CLOSED
    except UsageError as error:
        print(f"fastres: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("fastres: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        from fastres.memory import exhausted

        if not exhausted(error):
            raise
        text = (str(error).strip() or "no memory is left").splitlines()[0]
        print(f"fastres: error: {text}; a smaller --batch or --size needs less", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
