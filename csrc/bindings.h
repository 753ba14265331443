// The parts of vcr1_fast._native, one file each; module.cpp puts them together.
#pragma once

#include <pybind11/pybind11.h>

namespace vcr1 {

void bind_overlap(pybind11::module_& m);
void bind_reward_groups(pybind11::module_& m);
void bind_answers(pybind11::module_& m);

}  // namespace vcr1
