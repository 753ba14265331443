// What formulas need that are compiled twice, for the CPU and for CUDA, and must round alike in both.
#pragma once

#ifdef __CUDACC__
#define VCR1_HD __host__ __device__ __forceinline__
#else
#define VCR1_HD inline
#endif

namespace vcr1 {

// Written out instead of std::min and std::max: Python's min and max choose the same way for NaN and for -0.0.
VCR1_HD double lesser(double a, double b) { return b < a ? b : a; }
VCR1_HD double greater(double a, double b) { return b > a ? b : a; }

// A product that nvcc may not fuse with a following sum (a fused multiply-add rounds once where Python rounds twice).
VCR1_HD double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace vcr1
