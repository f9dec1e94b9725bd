// Share work among threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Call work(i) for every i < items, in any order; which thread takes which i has no
// influence on results, for no two write to one place.
template <class Work>
void share(int64_t items, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i; (i = next++) < items;) work(i);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads && t < items; t++) others.emplace_back(run);
  } catch (const std::system_error&) {
    // There are no more threads: those that are there do the work.
  }
  run();
  for (auto& other : others) other.join();
}
