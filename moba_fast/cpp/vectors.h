// Numbers by the vector, one per query, and the products that need all the speed.

#pragma once

#include <cstdint>
#include <limits>

// Floats of a vector, vectors of a tile, and rows of sums of a product under way. Sums,
// WIDTH factors and one more fill the registers. A tile has one query per float.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDTH = 3, STEP = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDTH = 3, STEP = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, WIDTH = 3, STEP = 8;
#else
constexpr int LANES = 4, WIDTH = 3, STEP = 4;
#endif
constexpr int ROWS = LANES * WIDTH;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// Four floats, for turning rows into columns.
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

inline Floats all(float x) { return Floats{} + x; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// 2 to the power of x <= 0, to 2e-9 and the rounding of float32; 0 below 2^-126.
inline Floats power_of_2(Floats x) {
  // NaN is not below the limit and stays.
  x = x < -127.0f ? all(-127.0f) : x;
  // Adding it rounds to an integer, which then stands in the lowest bits.
  const Floats shift = all(12582912.0f);
  const Floats shifted = x + shift, r = x - (shifted - shift);
  Floats p = all(1.53458110e-4f);
  p = p * r + 1.33999309e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032864e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return p * (Floats)(((Ints)shifted << 23) + (127 << 23));
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif

// Turn four rows of four into four columns.
inline void transpose(Four* x) {
  const Four a = PICK(x[0], x[1], 0, 4, 1, 5), b = PICK(x[2], x[3], 0, 4, 1, 5);
  const Four c = PICK(x[0], x[1], 2, 6, 3, 7), d = PICK(x[2], x[3], 2, 6, 3, 7);
  x[0] = PICK(a, b, 0, 1, 4, 5);
  x[1] = PICK(a, b, 2, 3, 6, 7);
  x[2] = PICK(c, d, 0, 1, 4, 5);
  x[3] = PICK(c, d, 2, 3, 6, 7);
}

// Add to COUNT sums, for all i < n, left[c * across + i * along] * right[i], which are
// summed first: short sums round less. MASKED: a query meets only the first `readable`
// factors, for the others may be NaN.
template <bool MASKED, int COUNT>
inline void add_products(const float* left, int64_t across, int64_t along,
                         const Floats (*right)[WIDTH], int64_t n, const Ints* readable,
                         Floats (*sums)[WIDTH]) {
  Floats acc[COUNT][WIDTH];
  for (int c = 0; c < COUNT; c++)
    for (int w = 0; w < WIDTH; w++) acc[c][w] = Floats{};
  for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
    for (int c = 0; c < COUNT; c++)
#pragma GCC unroll 3
      for (int w = 0; w < WIDTH; w++) {
        const Floats sum = acc[c][w] + left[c * across + i * along] * right[i][w];
        if (MASKED)
          acc[c][w] = readable[w] > (int32_t)i ? sum : acc[c][w];
        else
          acc[c][w] = sum;
      }
  for (int c = 0; c < COUNT; c++)
    for (int w = 0; w < WIDTH; w++) sums[c][w] += acc[c][w];
}
