// Which of the kernels compiled for several instruction sets to use on this processor.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace singerembed {

template <class Kernels>
std::vector<const Kernels*> supported_kernels(std::initializer_list<const Kernels*> narrowest_first) {
  std::vector<const Kernels*> kernels;
  for (const Kernels* candidate : narrowest_first) {
    if (candidate->supported()) kernels.push_back(candidate);
  }
  return kernels;
}

// The kernels of instruction set `isa`, or the last if it is empty. Throws std::invalid_argument if there are none.
template <class Kernels>
const Kernels* find_kernels(const std::vector<const Kernels*>& supported, const std::string& isa) {
  if (isa.empty()) return supported.back();
  std::string known;
  for (const Kernels* kernels : supported) {
    if (isa == kernels->name) return kernels;
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("isa \"" + isa + "\" is not available here; there are: " + known);
}

}  // namespace singerembed
