// The table of an op's kernels: one for each element type and instruction set.
#pragma once

#include "cpu/element_bits.h"

// In an op's header: what SIB_FAST_PICK (cpu/capability.h) picks from.
#define SIB_FAST_DECLARE_TABLES(Table, stem) \
  template <class E>                         \
  const Table<E>& stem##_baseline();         \
  template <class E>                         \
  const Table<E>& stem##_avx2();             \
  template <class E>                         \
  const Table<E>& stem##_avx512();

// In *_kernels.cpp, behind cpu/simd.h: this instruction set's, from kTable<E>.
#define SIB_FAST_DEFINE_TABLE(Table, stem, E)    \
  template <>                                    \
  const Table<E>& SIB_FAST_TABLE(stem##_)<E>() { \
    return kTable<E>;                            \
  }
#define SIB_FAST_DEFINE_TABLES(Table, stem)        \
  SIB_FAST_DEFINE_TABLE(Table, stem, double)       \
  SIB_FAST_DEFINE_TABLE(Table, stem, float)        \
  SIB_FAST_DEFINE_TABLE(Table, stem, BFloat16Bits) \
  SIB_FAST_DEFINE_TABLE(Table, stem, Float16Bits)
