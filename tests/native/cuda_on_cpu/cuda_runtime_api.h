// CUDA source as C++: what csrc/*.cu uses of CUDA, with one std::thread for each thread of a block.
// The blocks of a grid run one after the other, so that `static` can stand for __shared__; a race between two blocks
// stays unseen. test_device_code.py rewrites `kernel<<<...>>>(...)` as run_grid and __syncthreads() as barrier_at.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Index {
  unsigned int x = 0;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

inline std::optional<std::barrier<>> block_barrier;
inline int skipped_barrier = 0;  // as if this one were not in the source

// The n-th __syncthreads() of the source, counted from 1.
inline void barrier_at(int n) {
  if (n != skipped_barrier) block_barrier->arrive_and_wait();
}

template <class Kernel>
void run_grid(unsigned int num_blocks, unsigned int num_threads, const Kernel& kernel) {
  std::barrier all(num_threads);
  std::vector<std::thread> threads;
  for (unsigned int thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back([&, thread] {
      threadIdx.x = thread;
      blockDim.x = num_threads;
      gridDim.x = num_blocks;
      for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
        if (thread == 0) block_barrier.emplace(num_threads);
        all.arrive_and_wait();
        kernel();
        block_barrier->arrive_and_drop();  // nobody waits for a thread that has returned
        all.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}
