"""ctest: the module loads, and has what was built. Run with its folder on PYTHONPATH."""

import sys

import _C

assert _C.isa() in _C.isas(), (_C.isa(), _C.isas())
assert hasattr(_C, "cuda") == (sys.argv[1] == "cuda"), sys.argv
if sys.argv[1] == "cuda":
    assert "ptx80" in _C.cuda.archs().split()
    assert _C.cuda.workspace_floats(2, 1, True, 256, 64, 56 * 56) > 0
print(_C.build_info)
