// Share work among threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

// The OpenMP library that PyTorch has loaded, if it has: its threads wait for work
// without sleeping, and would take the cores from any others.
#if defined(__linux__)
extern "C" __attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data,
                                                    unsigned threads, unsigned flags);
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

// Call run() in so many threads at once.
template <class Run>
void together(int64_t threads, const Run& run) {
  if (threads > 1 && GOMP_parallel) {
    const auto call = [](void* data) { (*static_cast<const Run*>(data))(); };
    GOMP_parallel(call, const_cast<Run*>(&run), threads, 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < threads; t++) others.emplace_back(run);
  } catch (const std::exception&) {
    // There are no more threads: those that are there do the work.
  }
  run();
  for (auto& other : others) other.join();
}

// Call work(i) for every i < items, in any order; which thread takes which i has no
// influence on results, for no two write to one place.
template <class Work>
void share(int64_t items, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  together(threads < items ? threads : items, [&] {
    for (int64_t i; (i = next++) < items;) work(i);
  });
}
