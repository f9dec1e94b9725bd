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

  // Take the queries, with the factor on their scores.
  void load(const float* const (&rows)[ROWS], float factor) {
    for (int r = 0; r < ROWS; r += 4) {
      int64_t d = 0;
      for (; d + 4 <= D; d += 4) {
        Four x[4];
        for (int i = 0; i < 4; i++) std::memcpy(x + i, rows[r + i] + d, sizeof(Four));
        transpose(x);
        for (int i = 0; i < 4; i++) four(query[d + i], r) = x[i] * factor;
      }
      for (; d < D; d++)
        for (int i = 0; i < 4; i++) lane(query[d], r + i) = rows[r + i][d] * factor;
    }
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
    Floats before[WIDTH], most[WIDTH], sum[WIDTH], shrink[WIDTH];
    for (int w = 0; w < WIDTH; w++) before[w] = most[w] = largest[w];
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 3
      for (int w = 0; w < WIDTH; w++) {
        Floats& x = weights[j][w];
        if (MASKED) x = readable[w] > (int32_t)j ? x : all(-INFINITE);
        most[w] = larger(x, most[w]);
      }
    for (int w = 0; w < WIDTH; w++) {
      largest[w] = most[w];
      // Where all scores so far are -inf, their weights are 0.
      most[w] = most[w] == -INFINITE ? Floats{} : most[w];
      shrink[w] = power_of_2(before[w] - most[w]);
      sum[w] = total[w] * shrink[w];
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

  // Write the outputs, those of rows that only fill the tile to a spare place.
  void store(float* const (&rows)[ROWS]) {
    for (int r = 0; r < ROWS; r += 4) {
      const Four sum = four(total, r), factor = sum == 0.0f ? sum : 1.0f / sum;
      int64_t d = 0;
      for (; d + 4 <= D; d += 4) {
        Four x[4];
        for (int i = 0; i < 4; i++) x[i] = four(out[d + i], r) * factor;
        transpose(x);
        for (int i = 0; i < 4; i++) std::memcpy(rows[r + i] + d, x + i, sizeof(Four));
      }
      for (; d < D; d++)
        for (int i = 0; i < 4; i++) rows[r + i][d] = lane(out[d], r + i) * factor[i];
    }
  }

  // Return the log-sum-exp of a query.
  float lse(int row) {
    return (lane(largest, row) + std::log2(lane(total, row))) * LN2;
  }

  static float& lane(Floats* vectors, int row) { return ((float*)vectors)[row]; }
  static Four& four(Floats* vectors, int row) { return (Four&)lane(vectors, row); }

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

// A tile is too large for the stack that some give their threads.
inline Tile& tile_of_thread(int64_t D) {
  static thread_local Tile tile;
  tile.D = D;
  return tile;
}
