// Step 1, assign: keep the best blocks of every query while their scores pass by.

#include <algorithm>
#include <cmath>

#include "threads.h"
#include "tile.h"

constexpr int MOST_KEPT = 64;

// The best blocks of every query of a tile, in descending order of their scores.
struct Best {
  int64_t kept;
  Floats score[MOST_KEPT][WIDTH];
  Ints block[MOST_KEPT][WIDTH], unclear[WIDTH];

  void clear() {
    for (int64_t i = 0; i < kept; i++)
      for (int w = 0; w < WIDTH; w++) {
        score[i][w] = all(-INFINITE);
        block[i][w] = Ints{} - 1;
      }
    for (int w = 0; w < WIDTH; w++) unclear[w] = Ints{};
  }

  // Take in the score of a block. Of equal scores that of the lower block stays ahead.
  void add(int w, Floats x, Ints id, Ints readable) {
    // It is 0 but for NaN and infinities.
    unclear[w] |= readable & ~(x - x == 0.0f);
    x = readable ? x : all(-INFINITE);
    for (int64_t i = 0; i < kept; i++) {
      const Floats score_here = score[i][w];
      const Ints block_here = block[i][w], better = x > score_here;
      score[i][w] = better ? x : score_here;
      block[i][w] = better ? id : block_here;
      x = better ? score_here : x;
      id = better ? block_here : id;
    }
  }

  float score_of(int64_t i, int row) { return Tile::lane(score[i], row); }
  int32_t block_of(int64_t i, int row) { return ((int32_t*)block[i])[row]; }
};

// Write the best `slots` past blocks of a query, ascending, then -1 for those missing.
// Returns whether scores do not tell them from the next one.
static bool write(Best& best, int row, int64_t slots, float q_norm, const float* k_norm,
                  float rounding, int32_t* selected) {
  for (int64_t i = 0; i < slots; i++) selected[i] = best.block_of(i, row);
  // As an unsigned number -1 is the largest.
  std::sort((uint32_t*)selected, (uint32_t*)selected + slots);
  const int32_t cut = best.block_of(slots - 1, row), next = best.block_of(slots, row);
  if (next < 0) return false;
  const float norms = q_norm * std::max(k_norm[cut], k_norm[next]);
  return best.score_of(slots - 1, row) - best.score_of(slots, row) <= rounding * norms;
}

extern "C" void moba_select_blocks(const float* q, int64_t q_query, int64_t q_head,
                                   const float* means, const float* norms,
                                   const int64_t* first, const int64_t* current,
                                   int64_t n_queries, int64_t heads, int64_t heads_k,
                                   int64_t n_blocks, int64_t D, int64_t slots,
                                   float rounding, int32_t* selected, bool* unclear,
                                   int64_t threads) {
  const int64_t tiles = (n_queries + ROWS - 1) / ROWS, ratio = heads / heads_k;

  share(tiles * heads, threads, [&](int64_t i) {
    const int64_t at = i / heads * ROWS, head = i % heads, head_k = head / ratio;
    const int count = std::min<int64_t>(ROWS, n_queries - at);
    Tile& tile = tile_of_thread(D);
    Best best;
    best.kept = slots + 1;
    best.clear();
    Ints from[WIDTH], to[WIDTH];
    const float* rows[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const int64_t query = at + std::min(r, count - 1);
      rows[r] = q + query * q_query + head * q_head;
      ((int32_t*)from)[r] = first[query];
      ((int32_t*)to)[r] = current[query];
    }
    tile.load(rows, 1.0f);
    Floats squares[WIDTH] = {};
    for (int64_t d = 0; d < D; d++)
      for (int w = 0; w < WIDTH; w++) squares[w] += tile.query[d][w] * tile.query[d][w];
    // Queries come in the order of their sequences, so the ends bound the tile.
    const Matrix keys{means + head_k * D, heads_k * D};
    const int64_t end = current[at + count - 1];
    for (int64_t b = first[at]; b < end; b += KEYS) {
      const int64_t n = std::min<int64_t>(KEYS, end - b);
      tile.score(keys, b, n);
      for (int w = 0; w < WIDTH; w++)
        for (int64_t j = 0; j < n; j++) {
          const Ints id = Ints{} + (int32_t)(b + j);
          best.add(w, tile.weights[j][w], id, (id >= from[w]) & (id < to[w]));
        }
    }
    for (int r = 0; r < count; r++) {
      const int64_t query = at + r, row = query * heads + head;
      int32_t* chosen = selected + row * (slots + 1);
      chosen[slots] = current[query];
      const float q_norm = std::sqrt(Tile::lane(squares, r));
      const bool close =
          write(best, r, slots, q_norm, norms + head_k * n_blocks, rounding, chosen);
      unclear[row] = close || ((int32_t*)best.unclear)[r];
    }
  });
}
