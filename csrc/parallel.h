// Splits a batch over threads that live for one call. Each item is computed by one thread alone, so the result does not
// depend on their number. No pool: a thread costs about 20 microseconds to start, and a smaller batch gets none.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>

namespace vcr1 {

constexpr int32_t kMaxThreads = 64;

// The most threads one call may use; at first the cores this process may run on, 8 at most (8 ranks share a machine).
int32_t thread_limit();
void set_thread_limit(int32_t count);

// Calls part(begin, end) on consecutive ranges that cover 0 .. num_items, on as many threads as there are `min_work` in
// `work`; returns when all are done. Rethrows the first exception. If a thread cannot be started its range runs here.
void parallel_ranges(int64_t num_items, int64_t work, int64_t min_work,
                     const std::function<void(int64_t, int64_t)>& part);

}  // namespace vcr1
