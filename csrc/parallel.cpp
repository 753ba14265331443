#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace vcr1 {

namespace {

std::atomic<int32_t> limit{0};  // 0: not asked for yet

}  // namespace

int32_t thread_limit() {
  const int32_t set = limit.load(std::memory_order_relaxed);
  if (set > 0) return set;
  return std::clamp<int32_t>(static_cast<int32_t>(std::thread::hardware_concurrency()), 1, 8);
}

void set_thread_limit(int32_t count) { limit.store(std::clamp(count, 1, kMaxThreads), std::memory_order_relaxed); }

void parallel_ranges(int64_t num_items, int64_t work, int64_t min_work,
                     const std::function<void(int64_t, int64_t)>& part) {
  const int64_t count = std::min<int64_t>({thread_limit(), work / min_work, num_items});
  if (count <= 1) {
    part(0, num_items);
    return;
  }
  std::vector<std::exception_ptr> errors(static_cast<size_t>(count));
  const auto run = [&](int64_t index) noexcept {
    try {
      part(num_items * index / count, num_items * (index + 1) / count);
    } catch (...) {
      errors[static_cast<size_t>(index)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count));
  for (int64_t index = 1; index < count; ++index) {
    try {
      threads.emplace_back(run, index);
    } catch (const std::system_error&) {  // no thread to be had
      run(index);
    }
  }
  run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace vcr1
