// A function that host code and kernels share.
#pragma once

#if defined(__CUDACC__)
#define SIB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SIB_HOST_DEVICE inline
#endif
