#include "answer_numbers.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <limits>

namespace vcr1 {

namespace {

// For a number that has left the range of a double: to infinity, not to 0?
bool is_huge(Text digits) {
  const size_t e = digits.find_first_of("eE");
  const Text mantissa = digits.substr(0, e);
  int64_t exponent = 0;
  if (e != Text::npos) {
    const bool is_negative = digits[e + 1] == '-';
    for (size_t i = e + 1 + (is_negative || digits[e + 1] == '+' ? 1 : 0); i < digits.size(); ++i) {
      if (exponent < 1000000) exponent = exponent * 10 + (digits[i] - '0');  // a text has at most 65,536 digits
    }
    if (is_negative) exponent = -exponent;
  }
  const size_t first = mantissa.find_first_not_of("0.");
  if (first == Text::npos) return false;
  const size_t point = std::min(mantissa.find('.'), mantissa.size());
  return static_cast<int64_t>(point) - static_cast<int64_t>(first) + exponent > 0;
}

}  // namespace

size_t number_end(Text text, size_t i, size_t& whole_end) {
  const size_t begin = i;
  if (at(text, i) == '+' || at(text, i) == '-') ++i;
  const size_t digits = i;
  while (is_ascii_digit(at(text, i))) ++i;
  whole_end = i;
  if (i == digits && !(at(text, i) == '.' && is_ascii_digit(at(text, i + 1)))) return begin;
  if (at(text, i) == '.') {
    ++i;
    while (is_ascii_digit(at(text, i))) ++i;
  }
  if (whole_end == digits) whole_end = i;
  return i;
}

double parse_unsigned(Text digits) {
  double value = 0.0;
  const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (result.ec != std::errc::result_out_of_range) return value;
  return is_huge(digits) ? std::numeric_limits<double>::infinity() : 0.0;
}

double parse_signed(Text number) {
  const bool has_sign = number.front() == '+' || number.front() == '-';
  const double value = parse_unsigned(has_sign ? number.substr(1) : number);
  return number.front() == '-' ? -value : value;
}

Text join_blanks(Text text, std::string& scratch, bool keeps_lines) {
  scratch.clear();
  char blank = '\0';  // of the run before the character
  for (const char c : text) {
    if (is_blank(c)) {
      if (blank != '\n') blank = keeps_lines && c == '\n' ? '\n' : ' ';
      continue;
    }
    if (blank != '\0' && !scratch.empty()) scratch.push_back(blank);
    blank = '\0';
    scratch.push_back(static_cast<unsigned char>(c) == kMinusSign ? '-' : c);
  }
  return scratch;
}

}  // namespace vcr1
