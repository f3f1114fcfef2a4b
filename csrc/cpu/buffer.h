// Scratch memory that begins at a cache line: a register's loads from it do not straddle two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace alignvec {

constexpr std::size_t CACHE_LINE = 64;

template <typename T>
struct CacheAligned {
  using value_type = T;

  CacheAligned() = default;
  template <typename U>
  CacheAligned(const CacheAligned<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(CACHE_LINE)));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t(CACHE_LINE)); }

  friend bool operator==(const CacheAligned&, const CacheAligned&) { return true; }
  friend bool operator!=(const CacheAligned&, const CacheAligned&) { return false; }
};

template <typename T>
using Buffer = std::vector<T, CacheAligned<T>>;

}  // namespace alignvec
