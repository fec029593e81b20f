// What both test programs check with.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline int checks = 0;

inline void require(bool ok, const std::string& what) {
  ++checks;
  if (!ok) {
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    std::exit(1);
  }
}
