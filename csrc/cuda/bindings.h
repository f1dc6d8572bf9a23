#pragma once

#include <pybind11/pybind11.h>

#include "ops.h"

namespace fastres {
namespace cuda {

// A list of tiles as Python has it: (name, rows, columns, cluster, why) of each.
pybind11::list tile_list(const std::vector<TileChoice>& tiles);

// Adds the launchers to `m`: fastres._C.cuda, or the tests' module on the host shim.
void bind(pybind11::module_& m);
// Of them the pointwise convolutions; bind() calls it.
void bind_pointwise(pybind11::module_& m);

}  // namespace cuda
}  // namespace fastres
