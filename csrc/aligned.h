// Arrays whose address suits every vector width.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace singerembed {

inline constexpr std::align_val_t kVectorAlignment{64};

struct AlignedDelete {
  void operator()(void* p) const noexcept { ::operator delete[](p, kVectorAlignment); }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;
using AlignedFloats = AlignedArray<float>;

// Uninitialised. Throws std::bad_alloc.
template <class T>
AlignedArray<T> allocate_aligned(std::size_t n) {
  return AlignedArray<T>(static_cast<T*>(::operator new[](n * sizeof(T), kVectorAlignment)));
}
inline AlignedFloats allocate_floats(std::size_t n) { return allocate_aligned<float>(n); }

}  // namespace singerembed
