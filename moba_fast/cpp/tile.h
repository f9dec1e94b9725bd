// A tile of queries with the attention that it has gathered so far.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

// Keys of a tile, and terms of a score that are summed at a time.
constexpr int MOST_D = 256, KEYS = 64, TERMS = 64;

// Vectors of one key/value head, `stride` floats from one to the next.
struct Matrix {
  const float* data;
  int64_t stride;

  const float* row(int64_t i) const { return data + i * stride; }
};

// Everything stands with the queries side by side, so that a vector has one number of
// many queries and nothing is ever added up across a vector.
struct Tile {
  int64_t D;
  Floats query[MOST_D][WIDTH], out[MOST_D][WIDTH], weights[KEYS][WIDTH];
  float vectors[KEYS * MOST_D];
  // Of the scores so far, in units of a power of 2, and of the weights.
  Floats largest[WIDTH], total[WIDTH];

  // Take a query, with the factor on its scores.
  void load(int row, const float* from, float factor) {
    for (int64_t d = 0; d < D; d++) lane(query[d], row) = from[d] * factor;
  }

  // Forget what was gathered.
  void clear() {
    for (int64_t d = 0; d < D; d++)
      for (int w = 0; w < WIDTH; w++) out[d][w] = Floats{};
    for (int w = 0; w < WIDTH; w++) {
      largest[w] = all(-INFINITE);
      total[w] = Floats{};
    }
  }

  // Set weights to the products of the queries with some vectors, at most KEYS.
  void score(Matrix keys, int64_t first, int64_t count) {
    const float* key = adjacent(keys, first, count);
    for (int64_t j = 0; j < count; j++)
      for (int w = 0; w < WIDTH; w++) weights[j][w] = Floats{};
    for (int64_t d = 0; d < D; d += TERMS) {
      const int64_t n = std::min<int64_t>(TERMS, D - d);
      int64_t j = 0;
      for (; j + STEP <= count; j += STEP)
        add_products<false, STEP>(key + j * D + d, D, 1, query + d, n, nullptr,
                                  weights + j);
      for (; j < count; j++)
        add_products<false, 1>(key + j * D + d, D, 1, query + d, n, nullptr,
                               weights + j);
    }
  }

  // Gather from keys first to first + count - 1, at most KEYS. MASKED: a query reads
  // only the first `readable` of them.
  template <bool MASKED>
  void add_keys(Matrix keys, Matrix values, int64_t first, int64_t count,
                const Ints* readable) {
    score(keys, first, count);
    Floats most[WIDTH], sum[WIDTH], shrink[WIDTH];
    for (int w = 0; w < WIDTH; w++) most[w] = largest[w];
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 3
      for (int w = 0; w < WIDTH; w++) {
        Floats& x = weights[j][w];
        if (MASKED) x = readable[w] > (int32_t)j ? x : all(-INFINITE);
        most[w] = larger(x, most[w]);
      }
    for (int w = 0; w < WIDTH; w++) {
      shrink[w] = power_of_2(largest[w] - most[w]);
      sum[w] = total[w] * shrink[w];
      largest[w] = most[w];
    }
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 3
      for (int w = 0; w < WIDTH; w++) {
        weights[j][w] = power_of_2(weights[j][w] - most[w]);
        sum[w] += weights[j][w];
      }
    for (int w = 0; w < WIDTH; w++) total[w] = sum[w];
    for (int64_t d = 0; d < D; d++)
      for (int w = 0; w < WIDTH; w++) out[d][w] *= shrink[w];
    const float* from = adjacent(values, first, count);
    int64_t d = 0;
    for (; d + STEP <= D; d += STEP)
      add_products<MASKED, STEP>(from + d, 1, D, weights, count, readable, out + d);
    for (; d < D; d++)
      add_products<MASKED, 1>(from + d, 1, D, weights, count, readable, out + d);
  }

  // Write the output of a query, and return its log-sum-exp.
  float store(int row, float* to) {
    const float sum = lane(total, row), factor = 1.0f / sum;
    for (int64_t d = 0; d < D; d++) to[d] = lane(out[d], row) * factor;
    return (lane(largest, row) + std::log2(sum)) * LN2;
  }

  static float& lane(Floats* vectors, int row) { return ((float*)vectors)[row]; }

 private:
  // Return vectors one after the other: those of many heads would share few sets of the
  // first cache.
  const float* adjacent(Matrix from, int64_t first, int64_t count) {
    if (from.stride == D) return from.row(first);
    for (int64_t j = 0; j < count; j++)
      std::memcpy(vectors + j * D, from.row(first + j), D * sizeof(float));
    return vectors;
  }
};
