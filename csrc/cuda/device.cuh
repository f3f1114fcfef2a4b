// The device's own instructions: the one header with a second implementation, in emulator/, for hosts without a GPU.
#pragma once

#ifndef __CUDACC__
#include "emulator/device.h"
#else

#include <cstdint>

#define ALIGNVEC_DEVICE __device__ __forceinline__

namespace alignvec::cuda {

ALIGNVEC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ALIGNVEC_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
ALIGNVEC_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }

// The shared memory whose size a launch gives, 16-byte aligned.
ALIGNVEC_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

ALIGNVEC_DEVICE void block_barrier() { __syncthreads(); }
ALIGNVEC_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }
ALIGNVEC_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

// 16 bytes from global to shared memory, or 16 zeros where not `there`; both addresses are multiples of 16.
ALIGNVEC_DEVICE void copy_16(void* shared, const void* global, bool there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
ALIGNVEC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ALIGNVEC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory; row r of matrix i is where lane 8 i + r says. Lane (g, t) has
// the t-th four bytes of row g of each.
ALIGNVEC_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// sum += A B over 16 inputs: A [16, 16], B [16, 8] of bfloat16, sums float32 [16, 8], in fragments of lane (g, t).
ALIGNVEC_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Bytes of the pair (b, a), 0 to 7 from a's lowest; a selector's nibble of 8 more spreads that byte's sign.
ALIGNVEC_DEVICE uint32_t bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
ALIGNVEC_DEVICE uint32_t signs(uint32_t halves) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(spread) : "r"(halves));
  return spread;
}

// A function of three bits, for all bits at once: kTable is its value at 0xF0, 0xCC and 0xAA.
template <int kTable>
ALIGNVEC_DEVICE uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return result;
}

// a b + c in two bfloat16 halves; subnormal numbers count.
ALIGNVEC_DEVICE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

ALIGNVEC_DEVICE float to_float(uint16_t bfloat16) { return __uint_as_float(static_cast<uint32_t>(bfloat16) << 16); }
ALIGNVEC_DEVICE uint16_t to_bfloat16(float value) {
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
}
ALIGNVEC_DEVICE float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

// Programmatic dependent launch: until the grid before has written its results; the next grid may start.
ALIGNVEC_DEVICE void wait_for_earlier_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
ALIGNVEC_DEVICE void start_later_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace alignvec::cuda

#endif
