// Steps 3 and 4 in one: attend to the own block, and combine with the past ones.

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"
#include "tile.h"

// Add to an output, by weights from the log-sum-exps, those of the chosen past blocks.
// Returns the log-sum-exp of all.
static float merge(float* out, float own, const int32_t* selected, int64_t slots,
                   const float* parts, const float* lse, int64_t D) {
  float largest = own;
  for (int64_t s = 0; s < slots; s++)
    if (selected[s] >= 0) largest = std::max(largest, lse[s]);
  const float weight = std::exp(own - largest);
  float total = weight;
  for (int64_t d = 0; d < D; d++) out[d] *= weight;
  for (int64_t s = 0; s < slots; s++) {
    if (selected[s] < 0) continue;
    const float weight = std::exp(lse[s] - largest);
    total += weight;
    for (int64_t d = 0; d < D; d++) out[d] += weight * parts[s * D + d];
  }
  const float factor = 1.0f / total;
  for (int64_t d = 0; d < D; d++) out[d] *= factor;
  return largest + std::log(total);
}

// Cut the queries where a block begins, and into tiles; the last cut is their number.
static std::vector<int64_t> cut(const int64_t* of_query, int64_t n_queries) {
  std::vector<int64_t> cuts;
  for (int64_t i = 0; i < n_queries; i++)
    if (i == 0 || of_query[i] != of_query[i - 1] || i - cuts.back() == ROWS)
      cuts.push_back(i);
  cuts.push_back(n_queries);
  return cuts;
}

extern "C" void moba_attend_current(
    const float* q, int64_t q_query, int64_t q_head, const float* k, int64_t k_key,
    int64_t k_head, const float* v, int64_t v_key, int64_t v_head,
    const int32_t* selected, const int64_t* of_query, const int64_t* position,
    const int64_t* start, int64_t n_queries, int64_t heads, int64_t heads_k,
    int64_t slots, int64_t D, float scale, const float* out_past, const float* lse_past,
    float* out, int64_t out_query, int64_t out_head, float* lse, int64_t lse_query,
    int64_t lse_head, int64_t threads) {
  const std::vector<int64_t> cuts = cut(of_query, n_queries);
  const int64_t tiles = cuts.size() - 1, ratio = heads / heads_k;

  share(tiles * heads, threads, [&](int64_t i) {
    const int64_t at = cuts[i % tiles], head = i / tiles, head_k = head / ratio;
    const int count = cuts[i % tiles + 1] - at;
    const int64_t first = start[of_query[at]];
    Tile& tile = tile_of_thread(D);
    const float* from[ROWS];
    float *to[ROWS], spare[MOST_D];
    for (int r = 0; r < ROWS; r++) {
      const int64_t query = at + std::min(r, count - 1);
      from[r] = q + query * q_query + head * q_head;
      to[r] = r < count ? out + query * out_query + head * out_head : spare;
    }
    tile.load(from, scale * LOG2E);
    tile.clear();
    const Matrix keys{k + head_k * k_head + first * k_key, k_key};
    const Matrix values{v + head_k * v_head + first * v_key, v_key};
    const int64_t own = position[at] - first, end = own + count;
    for (int64_t j = 0; j < end; j += KEYS) {
      const int64_t n = std::min<int64_t>(KEYS, end - j);
      Ints readable[WIDTH];
      for (int r = 0; r < ROWS; r++) ((int32_t*)readable)[r] = own + r + 1 - j;
      if (j + n <= own + 1)
        tile.add_keys<false>(keys, values, j, n, nullptr);
      else
        tile.add_keys<true>(keys, values, j, n, readable);
    }
    tile.store(to);
    for (int r = 0; r < count; r++) {
      const int64_t query = at + r, row = query * heads + head;
      lse[query * lse_query + head * lse_head] =
          merge(to[r], tile.lse(r), selected + row * (slots + 1), slots,
                out_past + row * slots * D, lse_past + row * slots, D);
    }
  });
}
