// Step 2, arrange: a counting sort of the pairs by key/value head and block.

#include "threads.h"

extern "C" void moba_build_lists(const int32_t* selected, int64_t n_queries,
                                 int64_t heads, int64_t heads_k, int64_t n_blocks,
                                 int64_t slots, int32_t* pairs, int32_t* cu_pairs,
                                 int64_t threads) {
  const int64_t ratio = heads / heads_k, n_lists = heads_k * n_blocks;
  // Call visit(block, pair) for all pairs of a key/value head, in the order of lists.
  const auto walk = [&](int64_t head_k, auto visit) {
    for (int64_t head = head_k * ratio; head < (head_k + 1) * ratio; head++)
      for (int64_t query = 0; query < n_queries; query++) {
        const int64_t row = query * heads + head;
        for (int64_t s = 0; s < slots; s++) {
          const int32_t block = selected[row * (slots + 1) + s];
          if (block >= 0) visit(block, row * slots + s);
        }
      }
  };

  std::vector<int32_t> places(n_lists + 1, 0);
  share(heads_k, threads, [&](int64_t head_k) {
    int32_t* counts = places.data() + head_k * n_blocks + 1;
    walk(head_k, [&](int32_t block, int64_t) { counts[block]++; });
  });
  for (int64_t i = 0; i < n_lists; i++) places[i + 1] += places[i];
  for (int64_t i = 0; i <= n_lists; i++) cu_pairs[i] = places[i];
  share(heads_k, threads, [&](int64_t head_k) {
    int32_t* next = places.data() + head_k * n_blocks;
    walk(head_k, [&](int32_t block, int64_t pair) { pairs[next[block]++] = pair; });
  });
}
