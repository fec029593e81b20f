// Arrays of floats whose address suits every vector width.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace singerembed {

inline constexpr std::align_val_t kVectorAlignment{64};

struct AlignedDelete {
  void operator()(float* p) const noexcept { ::operator delete[](p, kVectorAlignment); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

// Uninitialised. Throws std::bad_alloc.
inline AlignedFloats allocate_floats(std::size_t n) {
  return AlignedFloats(static_cast<float*>(::operator new[](n * sizeof(float), kVectorAlignment)));
}

}  // namespace singerembed
