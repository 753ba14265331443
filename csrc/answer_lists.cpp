// Lists inside of answers: boxes, and the intervals of a glue block.
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <string>

#include "answer_numbers.h"
#include "answer_parser.h"
#include "answer_times.h"

namespace vcr1 {

namespace {

// One Python-style list of boxes: numbers, strings, True, False, None and nested lists, within fixed bounds.
class BoxListReader {
 public:
  BoxListReader(Text text, std::vector<double>& values) : text_(rstrip(text)), values_(values) {}

  bool read() {
    advance();
    if (kind_ != '[' || !read_list(1)) return false;
    advance();
    return kind_ == kEnd;
  }

 private:
  static constexpr char kEnd = 'e', kBad = 'b', kNumber = 'n', kString = 's', kNothing = '0', kTruth = 't';

  // To the next token. kind_: a mark [ ] or comma as itself, or one of the letters above; value_ of a number or truth.
  void advance() {
    if (position_ == text_.size()) {
      kind_ = kEnd;
      return;
    }
    kind_ = kBad;
    size_t i = position_;
    while (is_list_blank(at(text_, i))) ++i;
    const char c = at(text_, i);
    if (c == '[' || c == ']' || c == ',') {
      kind_ = c;
      position_ = i + 1;
    } else if (c == '\'' || c == '"') {
      take_string(i, c);
    } else if (c == 'T' || c == 'F' || c == 'N') {
      take_name(i);
    } else if (is_ascii_digit(c) || c == '.' || c == '+' || c == '-') {
      take_number(i);
    }
  }
  static bool is_list_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\f'; }

  void take_string(size_t i, char quote) {
    for (++i; i < text_.size() && text_[i] != '\n'; ++i) {
      if (text_[i] == quote) {
        kind_ = kString;
        position_ = i + 1;
        return;
      }
      if (text_[i] == '\\' && ++i < text_.size() && text_[i] == '\n') return;
    }
  }
  void take_name(size_t i) {
    static constexpr std::array<Text, 3> kNames = {"True", "False", "None"};
    for (const Text name : kNames) {
      const size_t end = i + name.size();
      if (text_.substr(i, name.size()) != name || is_word(at(text_, end))) continue;
      kind_ = name == "None" ? kNothing : kTruth;
      value_ = name == "True" ? 1.0 : 0.0;
      position_ = end;
    }
  }
  void take_number(size_t begin) {
    const size_t digits = begin + (text_[begin] == '+' || text_[begin] == '-' ? 1 : 0);
    size_t whole_end = 0;
    size_t i = number_end(text_, begin, whole_end);
    if (i == begin) return;
    if (lower(at(text_, i)) == 'e') {
      size_t k = i + 1;
      if (at(text_, k) == '+' || at(text_, k) == '-') ++k;
      if (is_ascii_digit(at(text_, k))) {
        while (is_ascii_digit(at(text_, k))) ++k;
        i = k;
      }
    }
    if (is_word(at(text_, i)) || at(text_, i) == '.') return;
    // 012 is not a number in Python or JSON; 00 is
    if (i == whole_end && text_[digits] == '0') {
      const size_t other = text_.find_first_not_of('0', digits);
      if (other < i) return;
    }
    kind_ = kNumber;
    value_ = parse_signed(text_.substr(begin, i - begin));
    position_ = i;
  }

  // The list whose [ is the current token; stops on its ]. Depth 1 holds boxes, depth 2 the 4 values of one.
  bool read_list(int32_t depth) {
    int64_t num_here = 0;
    advance();
    while (kind_ != ']') {
      if (!read_value(depth)) return false;
      ++num_here;
      if (++num_items_ > kMaxListItems || (depth == 2 && num_here > 4)) return false;
      advance();
      if (kind_ == ',') {
        advance();
      } else if (kind_ != ']') {
        return false;
      }
    }
    return depth != 2 || num_here == 4;
  }
  bool read_value(int32_t depth) {
    double value = std::numeric_limits<double>::quiet_NaN();
    if (kind_ == '[') {
      if (depth >= kMaxListDepth || !read_list(depth + 1)) return false;
    } else {
      if (depth == 1) return false;  // no box, whatever follows
      if (kind_ == kNumber || kind_ == kTruth) {
        value = value_;
      } else if (kind_ != kString && kind_ != kNothing) {
        return false;
      }
    }
    if (depth == 2) values_.push_back(value);
    return true;
  }

  Text text_;
  std::vector<double>& values_;
  size_t position_ = 0;
  int64_t num_items_ = 0;
  char kind_ = kBad;
  double value_ = 0.0;
};

// A pair "(1.5 s, 2)" or "[1.5, 2]" of the recipe fixed and one blank behind it; `end` is where it ends. NaN: its units
// do not fit each other.
bool match_pair(Text text, size_t begin, Period& pair, size_t& end) {
  const char opening = at(text, begin);
  if (opening != '(' && opening != '[') return false;
  size_t i = begin + 1;
  const auto skip_blank = [&] { i += at(text, i) == ' ' ? 1 : 0; };
  const auto take_time = [&](Time& time) {
    skip_blank();
    const size_t stop = time_end(text, i, time);
    const bool is_found = stop != i;
    i = stop;
    skip_blank();
    return is_found;
  };
  Time first, second;
  if (!take_time(first) || at(text, i) != ',') return false;
  ++i;
  if (!take_time(second) || at(text, i) != (opening == '(' ? ')' : ']')) return false;
  ++i;
  skip_blank();
  end = i;
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  pair = to_interval(first, second).value_or(Period{kNaN, kNaN});
  return true;
}

std::optional<std::vector<Period>> read_fixed_glue(Text text, Scratch& scratch) {
  text = join_blanks(text, scratch.joined);
  Period pair;
  size_t position = 0, end = 0;
  if (at(text, 0) == '[' && text.back() == ']' && !match_pair(text, 0, pair, end)) {
    text.remove_suffix(1);
    position = at(text, 1) == ' ' ? 2 : 1;
  }
  std::vector<Period> intervals;
  while (position < text.size()) {
    if (intervals.size() == kMaxIntervals || !match_pair(text, position, pair, end)) return std::nullopt;
    if (!std::isfinite(pair.first) || !std::isfinite(pair.second) || pair.first > pair.second) return std::nullopt;
    intervals.push_back(pair);
    position = end;
    if (position < text.size() && text[position] != ',') return std::nullopt;
    position += at(text, position + 1) == ' ' ? 2 : 1;
  }
  if (intervals.empty()) return std::nullopt;
  return intervals;
}

// A number of the original's glue. Python evaluates one without a point to an exact integer of any size.
struct PaperNumber {
  Text digits;
  double value;
  bool is_whole;
};

// The digits of an integer without leading zeros, of the whole-numbered double `value` if it is not an integer.
Text exact_digits(const PaperNumber& number, std::array<char, 400>& memory) {
  if (number.is_whole) return number.digits;
  const auto result =
      std::to_chars(memory.data(), memory.data() + memory.size(), number.value, std::chars_format::fixed, 0);
  return Text(memory.data(), static_cast<size_t>(result.ptr - memory.data()));
}

// Rounding keeps the order of two numbers unless it makes them equal; then they are compared digit by digit.
bool is_greater(const PaperNumber& a, const PaperNumber& b) {
  if (a.value != b.value) return a.value > b.value;
  if (!a.is_whole && !b.is_whole) return false;
  if (a.value < 9007199254740992.0) return false;  // 2^53: below, an integer is its double
  if (std::isinf(a.value) && a.is_whole != b.is_whole) return b.is_whole;
  std::array<char, 400> a_memory, b_memory;
  const Text x = exact_digits(a, a_memory), y = exact_digits(b, b_memory);
  return x.size() != y.size() ? x.size() > y.size() : x > y;
}

// [0-9]+([.][0-9]+)? at i; false where there is none, or Python does not evaluate it.
bool take_paper_number(Text text, size_t& i, PaperNumber& number) {
  const size_t begin = i;
  while (is_ascii_digit(at(text, i))) ++i;
  if (i == begin) return false;
  number.is_whole = !(at(text, i) == '.' && is_ascii_digit(at(text, i + 1)));
  if (!number.is_whole) {
    ++i;
    while (is_ascii_digit(at(text, i))) ++i;
  }
  number.digits = text.substr(begin, i - begin);
  number.value = parse_unsigned(number.digits);
  if (!number.is_whole) return true;
  if (number.digits.find_first_not_of('0') == Text::npos) {
    number.digits = "0";
    return true;
  }
  return number.digits.front() != '0' && number.digits.size() <= kMaxIntegerDigits;
}

void skip_paper_blanks(Text text, size_t& i) {
  while (at(text, i) == ' ' || at(text, i) == '\t' || at(text, i) == '\n' || at(text, i) == '\r' ||
         at(text, i) == '\f') {
    ++i;
  }
}

std::optional<std::vector<Period>> read_paper_glue(Text text) {
  if (ends_with(text, "\n")) text.remove_suffix(1);
  std::vector<Period> intervals;
  if (text == "[]") return intervals;
  if (!starts_with(text, "[") || !ends_with(text, "]")) return std::nullopt;
  text.remove_suffix(1);
  size_t i = 1;
  while (true) {
    PaperNumber start{}, stop{};
    if (at(text, i) != '(' || !take_paper_number(text, ++i, start) || at(text, i) != ',') return std::nullopt;
    skip_paper_blanks(text, ++i);
    if (!take_paper_number(text, i, stop) || at(text, i) != ')' || is_greater(start, stop)) return std::nullopt;
    intervals.emplace_back(start.value, stop.value);
    ++i;
    const Text rest = text.substr(i);
    if (rest.empty() || rest == ",") return intervals;
    if (rest.front() != ',') return std::nullopt;
    skip_paper_blanks(text, ++i);
  }
}

}  // namespace

std::optional<Boxes> read_boxes(Text text) {
  Boxes values;
  if (!BoxListReader(text, values).read()) return std::nullopt;
  return values;
}

std::optional<std::vector<Period>> read_glue(Text text, Rule rule, Scratch& scratch) {
  return rule == Rule::kPaper ? read_paper_glue(text) : read_fixed_glue(text, scratch);
}

}  // namespace vcr1
