#include "answer_times.h"

#include <algorithm>
#include <array>

#include "answer_numbers.h"

namespace vcr1 {

namespace {

constexpr std::array<Text, 5> kSeconds = {"s", "sec", "secs", "second", "seconds"};
constexpr std::array<Text, 5> kMinutes = {"m", "min", "mins", "minute", "minutes"};
// _PROSE of the Python definition.
constexpr std::array<Text, 51> kProse = {
    "a", "about", "after", "an", "and", "approximately", "as", "at", "because", "before", "but", "by",
    "during", "for", "from", "he", "her", "his", "i", "if", "in", "inside", "into", "is", "it", "its", "no",
    "not", "of", "on", "or", "she", "since", "so", "that", "the", "their", "then", "there", "they", "this",
    "to", "until", "we", "when", "where", "which", "while", "with", "within", "you"};
constexpr std::array<Text, 7> kOtherUnits = {"frame", "frames", "percent", "hour", "hours", "hr", "hrs"};

bool equals(Text text, Text lower_word) {
  return text.size() == lower_word.size() &&
         std::equal(text.begin(), text.end(), lower_word.begin(), [](char c, char wanted) { return lower(c) == wanted; });
}

template <size_t N>
bool is_one_of(Text word, const std::array<Text, N>& words) {
  return std::any_of(words.begin(), words.end(), [word](Text wanted) { return equals(word, wanted); });
}

// The word at i, its decimal digits as well or only what comes before the first of them.
Text word_at(Text text, size_t i, bool with_digits) {
  size_t end = i;
  while (end < text.size() && is_word(text[end]) && (with_digits || !is_decimal(text[end]))) ++end;
  return i < text.size() ? text.substr(i, end - i) : Text();
}

bool is_line_blank(char c) { return c == ' ' || c == '\n'; }
size_t skip_blank(Text text, size_t i) { return is_line_blank(at(text, i)) ? i + 1 : i; }
bool starts_and(Text text, size_t i) { return equals(text.substr(std::min(i, text.size()), 3), "and"); }

size_t seconds_unit_end(Text text, size_t i) {
  i = skip_blank(text, i);
  const Text word = word_at(text, i, true);
  return is_one_of(word, kSeconds) ? i + word.size() : Text::npos;
}

// Behind "30 s", ", 30 s" or " and 30 s" after minutes; npos where there is none, or of 60 s or more.
size_t rest_end(Text text, size_t i, double& seconds) {
  if (at(text, i) == ',') ++i;
  i = skip_blank(text, i);
  if (starts_and(text, i) && is_line_blank(at(text, i + 3))) i += 4;
  const size_t begin = i;
  while (is_ascii_digit(at(text, i))) ++i;
  const size_t num_digits = i - begin;
  if (num_digits == 0 || num_digits > 2 || (num_digits == 2 && text[begin] > '5')) return Text::npos;
  if (at(text, i) == '.') {
    ++i;
    while (is_ascii_digit(at(text, i))) ++i;
  }
  const size_t end = seconds_unit_end(text, i);
  if (end != Text::npos) seconds = parse_unsigned(text.substr(begin, i - begin));
  return end;
}

// Behind minutes that stand alone at i, one blank before them counted in; npos where there are none.
size_t minutes_alone_end(Text text, size_t i) {
  i = skip_blank(text, i);
  const Text word = word_at(text, i, true);
  if (!is_one_of(word, kMinutes)) return Text::npos;
  i += word.size();
  return is_ascii_digit(at(text, skip_blank(text, i))) ? Text::npos : i;
}

// Behind mm:ss or hh:mm:ss at i, i if there is none.
size_t clock_end(Text text, size_t i, double& seconds) {
  const size_t begin = i;
  while (is_ascii_digit(at(text, i))) ++i;
  if (i == begin) return begin;
  seconds = parse_unsigned(text.substr(begin, i - begin));
  int num_parts = 1;
  while (num_parts < 3 && at(text, i) == ':' && at(text, i + 1) >= '0' && at(text, i + 1) <= '5' &&
         is_ascii_digit(at(text, i + 2))) {
    size_t end = i + 3;
    const bool has_fraction = at(text, end) == '.' && is_ascii_digit(at(text, end + 1));
    if (has_fraction) {
      ++end;
      while (is_ascii_digit(at(text, end))) ++end;
    }
    seconds = seconds * 60.0 + parse_unsigned(text.substr(i + 1, end - i - 1));
    i = end;
    ++num_parts;
    if (has_fraction) break;
  }
  return num_parts == 1 || is_ascii_digit(at(text, i)) || at(text, i) == ':' ? begin : i;
}

// One that ends at `end`, a comma and a blank behind it.
bool is_unit_in_front(Text text, size_t end) {
  if (end > 0 && is_line_blank(text[end - 1])) --end;
  if (end > 0 && text[end - 1] == ',') --end;
  size_t begin = end;
  while (begin > 0 && is_word(text[begin - 1])) --begin;
  const Text word = text.substr(begin, end - begin);
  return is_one_of(word, kOtherUnits) || is_one_of(word, kMinutes) || equals(word, "h");
}

bool is_unit_behind(Text text, size_t i) {
  const char c = at(text, i);
  if (c == ')' || c == ']' || c == '}') ++i;
  if (at(text, skip_blank(text, i)) == '%') return true;
  if (at(text, i) != ' ') return false;
  const Text word = word_at(text, i + 1, true);
  // "s" alone would have been read as the number's unit, unless a bracket is between them
  return !word.empty() && !is_one_of(word, kProse) && (word.size() == 1 || !is_one_of(word, kSeconds));
}

}  // namespace

size_t time_end(Text text, size_t i, Time& time) {
  time = Time();
  size_t end = clock_end(text, i, time.seconds), whole_end = 0;
  time.is_clock = end != i;
  if (!time.is_clock) {
    end = number_end(text, i, whole_end);
    if (end == i) return i;
    time.seconds = parse_signed(text.substr(i, end - i));
  }
  size_t unit = seconds_unit_end(text, end);
  if (unit != Text::npos) {
    time.unit = TimeUnit::kSeconds;
    return unit;
  }
  double rest = 0.0;
  if (!time.is_clock) {
    const size_t minutes = skip_blank(text, end);
    const Text word = word_at(text, minutes, false);
    if (is_one_of(word, kMinutes)) unit = rest_end(text, minutes + word.size(), rest);
  }
  if (unit == Text::npos) unit = minutes_alone_end(text, end);
  if (unit == Text::npos) return end;
  time.unit = TimeUnit::kMinutes;
  if (!time.is_clock) time.seconds = time.seconds * 60.0 + rest;
  return unit;
}

bool has_other_unit(Text text, size_t begin, size_t end, const Time& last) {
  if (is_unit_in_front(text, begin)) return true;
  const bool behind_and = begin >= 4 && is_line_blank(text[begin - 1]) && starts_and(text, begin - 4);
  if (behind_and && is_unit_in_front(text, begin - 4)) return true;
  return last.unit == TimeUnit::kNone && is_unit_behind(text, end);
}

std::optional<std::pair<double, double>> to_interval(const Time& start, const Time& end) {
  if (start.unit == TimeUnit::kMinutes && end.unit == TimeUnit::kNone && !end.is_clock) return std::nullopt;
  const bool in_minutes = end.unit == TimeUnit::kMinutes && start.unit == TimeUnit::kNone && !start.is_clock;
  return std::pair(in_minutes ? start.seconds * 60.0 : start.seconds, end.seconds);
}

}  // namespace vcr1
