// Step 3, attend: from the queries of every list to the keys of its block.

#include <algorithm>
#include <vector>

#include "threads.h"
#include "tile.h"

// Tiles that a thread takes at a time.
constexpr int TILES = 8;

// Fetch a vector that is soon read, or written.
template <bool WRITTEN>
static void prefetch(const float* vector, int64_t D) {
  for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(vector + d, WRITTEN);
}

extern "C" void moba_attend_past(const float* q, int64_t q_query, int64_t q_head,
                                 const float* k, int64_t k_key, int64_t k_head,
                                 const float* v, int64_t v_key, int64_t v_head,
                                 const int32_t* pairs, const int32_t* cu_pairs,
                                 const int64_t* start, int64_t heads_k,
                                 int64_t n_blocks, int64_t block_size, int64_t heads,
                                 int64_t slots, int64_t D, float scale, float* out,
                                 float* lse, int64_t threads) {
  const int64_t n_lists = heads_k * n_blocks, most = TILES * ROWS;
  std::vector<int64_t> first_item(n_lists + 1, 0);
  for (int64_t i = 0; i < n_lists; i++)
    first_item[i + 1] =
        first_item[i] + (cu_pairs[i + 1] - cu_pairs[i] + most - 1) / most;
  const auto query = [&](int64_t place) {
    const int64_t row = pairs[place] / slots;
    return q + row / heads * q_query + row % heads * q_head;
  };

  share(first_item[n_lists], threads, [&](int64_t i) {
    const auto after = std::upper_bound(first_item.begin(), first_item.end(), i);
    const int64_t list = after - first_item.begin() - 1;
    const int64_t begin = cu_pairs[list] + (i - first_item[list]) * most;
    const int64_t end = std::min<int64_t>(begin + most, cu_pairs[list + 1]);
    const int64_t head = list / n_blocks, block = list % n_blocks;
    const Matrix keys{k + head * k_head + start[block] * k_key, k_key};
    const Matrix values{v + head * v_head + start[block] * v_key, v_key};
    Tile& tile = tile_of_thread(D);
    for (int64_t at = begin; at < end; at += ROWS) {
      const int count = std::min<int64_t>(ROWS, end - at);
      const float* from[ROWS];
      float *to[ROWS], spare[MOST_D];
      for (int r = 0; r < ROWS; r++) {
        from[r] = query(at + std::min(r, count - 1));
        to[r] = r < count ? out + pairs[at + r] * D : spare;
      }
      tile.load(from, scale * LOG2E);
      // They are all over the memory.
      for (int r = 0; r < count; r++) prefetch<true>(to[r], D);
      for (int64_t next = at + ROWS; next < std::min(end, at + 2 * ROWS); next++)
        prefetch<false>(query(next), D);
      tile.clear();
      for (int64_t j = 0; j < block_size; j += KEYS)
        tile.add_keys<false>(keys, values, j, std::min<int64_t>(KEYS, block_size - j),
                             nullptr);
      tile.store(to);
      for (int r = 0; r < count; r++) lse[pairs[at + r]] = tile.lse(r);
    }
  });
}
