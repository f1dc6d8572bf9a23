"""ctest: the tests of the repository on a native module just built.

    python csrc/test_ops.py [--installed] MODULE PYTEST-ARGUMENT...

Exits 77, ctest's "skipped", where Python has no torch or pytest; with --installed, for tests that
start processes of their own, where fastres is not installed either (`pip install -e .`)."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77


def main(installed: bool, module: str, arguments: list[str]) -> int:
    missing = [m for m in ("torch", "pytest", "numpy") if importlib.util.find_spec(m) is None]
    if missing:
        print(f"{sys.executable} has no {', '.join(missing)}")
        return SKIPPED
    import pytest

    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("fastres._C", module)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules["fastres._C"] = native  # found by `from . import _C` before any file
    spec.loader.exec_module(native)
    import fastres

    if importlib.util.find_spec("fastres.kernels") is None:
        if installed:
            print("fastres is not installed")
            return SKIPPED
        fastres.__path__.append(str(ROOT))  # where kernels/ is
    return pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *arguments])


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--installed"]
    sys.exit(main("--installed" in sys.argv, words[0], words[1:]))
