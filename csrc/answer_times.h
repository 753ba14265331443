// A time inside of an answer, as the patterns of vcr1_fast/tasks/answer_times.py read it: seconds, mm:ss, hh:mm:ss or
// minutes. Texts here went through join_blanks.
#pragma once

#include <optional>
#include <utility>

#include "answer_text.h"

namespace vcr1 {

enum class TimeUnit { kNone, kSeconds, kMinutes };

struct Time {
  double seconds = 0.0;
  bool is_clock = false;
  TimeUnit unit = TimeUnit::kNone;  // as it is written
};

// Where the time that starts at i ends, i if there is none.
size_t time_end(Text text, size_t i, Time& time);

// Whether a unit that is none of a time's stands in front of the first time, at `begin`, or behind the last one.
bool has_other_unit(Text text, size_t begin, size_t end, const Time& last);

// Seconds; a unit behind the second time is that of both. None where the unit of the second one is not said.
std::optional<std::pair<double, double>> to_interval(const Time& start, const Time& end);

}  // namespace vcr1
