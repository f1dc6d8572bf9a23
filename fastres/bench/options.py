"""What the user asked `fastres bench` for, checked before torch is imported."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
MODES = ("inference", "train")
QUICK_SECONDS = 6.0  # of timing per dtype and mode with --quick
MOST = 2**31 - 1  # of whole numbers: torch counts elements in 63 bits
PIXELS = 1 << 50  # of a batch: 64 channels of a quarter of them still are such a number
MIN_SIZE = 32  # a ResNet divides the side by 32
ROOM = 1 << 20  # bytes free on a disk that results are to be written to: they take some 100 KB


class UsageError(Exception):
    """Bad input from the user: one line on stderr, exit code 2."""


@dataclass(frozen=True)
class Case:
    """One table section: a dtype ("fp32", "bf16", "fp16") and a mode ("inference", "train")."""

    dtype: str
    mode: str

    @property
    def label(self) -> str:
        return f"{self.dtype} {self.mode}"


@dataclass(frozen=True)
class Options:
    """The options of one run. Paths are absolute, since workers run in another folder."""

    model: str
    batch: int = 8
    size: int = 224
    dtype: str = "both"
    mode: str = "both"
    images: str | None = None
    weights: str | None = None
    rounds: int = 12
    iters: int | None = None
    seconds: float | None = None
    threads: int | None = None
    quick: bool = False
    json: str = ""
    png: str | None = None
    compile: bool = True
    peers: bool = False
    device: str = "cpu"
    seed: int = 0

    def cases(self) -> list[Case]:
        """The (dtype, mode) pairs of this run, in the order of the table."""
        both = ("fp32", "bf16", "fp16") if self.device == "cuda" else ("fp32", "bf16")
        dtypes = both if self.dtype == "both" else (self.dtype,)
        modes = MODES if self.mode == "both" else (self.mode,)
        return [Case(dtype, mode) for mode in modes for dtype in dtypes]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_model_name(name: str) -> str:
    """`name` when torchvision has such a ResNet; UsageError with the nearest names when not."""
    if name in MODELS:
        return name
    if Path(name).suffix or os.sep in name:
        raise UsageError(
            f"'{name}' looks like a file; accepted are names: {', '.join(MODELS)}. For a model of "
            "your own call fastres.tune(model, sample) or fastres.verify from Python"
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), MODELS, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UsageError(f"unknown model '{name}'{hint} Accepted: {', '.join(MODELS)}")


def check_training_batch(batch: int, size: int) -> None:
    """Refuses a batch whose batch norms have one value a channel: torch does, in the last stage."""
    if batch == 1 and size <= MIN_SIZE:
        raise UsageError(
            f"argument --batch: one image of {size} px is 1x1 in the last stage, where batch norm "
            f"cannot train on a single value a channel; --batch 2 or --size {MIN_SIZE + 1} can"
        )


def check_pixels(batch: int, size: int) -> None:
    """Refuses what torch cannot even name."""
    if batch * size**2 > PIXELS:
        raise UsageError(
            f"argument --batch: {batch:,} images of {size:,} px: more pixels than torch can count"
        )


def check_memory(batch: int, size: int, forward: bool) -> None:
    """Refuses a batch that this machine cannot hold, before minutes are spent on its images.

    What is certainly there at once, fp32: the batch three times (crops, stacked, channels_last);
    where its `forward` runs on the CPU, the batch, the first conv's output (64 channels of a
    quarter of the pixels) and that output normalised."""
    from fastres.memory import available

    need = batch * size**2 * (4 * (3 + 2 * 64 // 4) if forward else 4 * 3 * 3)
    free = available()
    if free is not None and need > free:
        raise UsageError(
            f"argument --batch: {batch:,} images of {size} px need {need / 1e9:,.0f} GB of memory "
            f"or more, {free / 1e9:,.0f} GB are available; a smaller --batch or --size fits"
        )


def at_least(minimum: int, most: int = MOST) -> Any:
    """An argparse type: whole numbers from `minimum` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number of at least {minimum}"
            )
        if value > most:
            raise argparse.ArgumentTypeError(f"'{text}' is more than {most:,}")
        return value

    return parse


def positive(unit: str) -> Any:
    """An argparse type: positive finite numbers of `unit`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"'{text}' is not a positive number of {unit}")
        return value

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastres bench`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"one of {', '.join(MODELS)}")
    parser.add_argument(
        "--report",
        action="store_true",
        help="in a checkout: render docs/benchmarks.md from bench/results/, without MODEL",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="in a checkout: compare two result files, without MODEL; exit code 1 when a case "
        "got worse; python -m bench.compare has options",
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--batch", type=at_least(1), default=8, metavar="N", help="images per step (default 8)"
    )
    what.add_argument(
        "--size",
        type=at_least(MIN_SIZE),
        default=224,
        metavar="PX",
        help="side of the square input (default 224)",
    )
    what.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "both"),
        default="both",
        help="fp32, autocast to bf16 or (GPU only) fp16; both = all that the device has (default)",
    )
    what.add_argument(
        "--mode",
        choices=("inference", "train", "both"),
        default="both",
        help="inference, training steps, or both (default)",
    )
    what.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU when torch sees one (default)",
    )
    what.add_argument(
        "--threads",
        type=at_least(1),
        metavar="N",
        help="CPU threads of every variant (default: torch's own choice)",
    )
    what.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    what.add_argument(
        "--peers",
        action="store_true",
        help="also time ONNX Runtime and OpenVINO inference, when installed",
    )
    what.add_argument(
        "--seed",
        type=at_least(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of weights, crops and labels (default 0)",
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument(
        "--images",
        metavar="DIR",
        help="folder of .jpg, .jpeg or .png files (default: the two photographs "
        "that come with scikit-learn)",
    )
    inputs.add_argument(
        "--weights",
        metavar="FILE",
        help="state_dict checkpoint for MODEL (default: random weights)",
    )
    time = parser.add_argument_group("how long")
    time.add_argument(
        "--rounds",
        type=at_least(1),
        metavar="N",
        help="rounds per dtype and mode; every variant runs once in each (default 12)",
    )
    time.add_argument(
        "--iters",
        type=at_least(1),
        metavar="N",
        help="steps that a variant runs in a round (default: what fills half a second)",
    )
    time.add_argument(
        "--seconds",
        type=positive("seconds"),
        metavar="S",
        help="stop the rounds of a dtype and mode after S seconds, 3 rounds at least "
        "(default: never; with --quick 6)",
    )
    time.add_argument(
        "--quick",
        action="store_true",
        help="about a minute on 2 cores: few rounds, no torch.compile",
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--json", metavar="FILE", help="results as JSON (default fastres-bench-MODEL.json)"
    )
    out.add_argument("--png", metavar="FILE", help="bar chart (default: the JSON's name with .png)")


def _output_path(text: str, option: str) -> str:
    """The absolute path, where a file was found to be writable: the run takes minutes."""
    path = Path(text).expanduser().absolute()
    try:
        if path.is_dir():
            raise UsageError(f"argument {option}: '{text}' is a folder; a file name is needed")
        if not path.parent.is_dir():
            raise UsageError(f"argument {option}: the folder of '{text}' does not exist")
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
        free = shutil.disk_usage(path.parent).free
        if free < ROOM and (path.is_file() or not existed):  # not a device
            raise UsageError(
                f"argument {option}: no room for '{text}': its disk has {free:,} bytes left, "
                f"{ROOM:,} are asked for"
            )
    except OSError as e:
        raise UsageError(f"argument {option}: cannot write '{text}': {e.strerror}") from e
    return str(path)


def options_from(args: argparse.Namespace) -> Options:
    """Checked Options from parsed arguments, `device` still as given. Raises UsageError."""
    if args.model is None:
        raise UsageError("the following arguments are required: MODEL")
    model = check_model_name(args.model)
    check_training_batch(args.batch, args.size)  # statistics settle, gradients are checked
    check_pixels(args.batch, args.size)
    images, weights = args.images, args.weights
    if images is not None:
        if not Path(images).is_dir():
            raise UsageError(f"argument --images: '{images}' is not a folder")
        images = str(Path(images).absolute())
    if weights is not None:
        if not Path(weights).is_file():
            raise UsageError(f"argument --weights: there is no file '{weights}'")
        weights = str(Path(weights).absolute())
    if args.dtype == "fp16" and args.device == "cpu":
        raise UsageError("argument --dtype: fp16 needs a GPU; the CPU has fp32 and bf16")
    json_path = _output_path(args.json or f"fastres-bench-{model}.json", "--json")
    png = args.png or str(Path(json_path).with_suffix(".png"))
    return Options(
        model=model,
        batch=args.batch,
        size=args.size,
        dtype=args.dtype,
        mode=args.mode,
        images=images,
        weights=weights,
        rounds=args.rounds or 12,
        iters=args.iters,
        seconds=args.seconds or (QUICK_SECONDS if args.quick and args.rounds is None else None),
        threads=args.threads,
        quick=args.quick,
        json=json_path,
        png=_output_path(png, "--png"),
        compile=args.compile,
        peers=args.peers,
        device=args.device,
        seed=args.seed,
    )
