#include "answer_parser.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "answer_numbers.h"
#include "answer_times.h"

namespace vcr1 {

namespace {

constexpr size_t kNone = Text::npos;

std::string opening_tag(Text name) { return "<" + std::string(name) + ">"; }
std::string closing_tag(Text name) { return "</" + std::string(name) + ">"; }

bool occurs_once(Text text, Text part) {
  const size_t first = text.find(part);
  return first != kNone && text.find(part, first + part.size()) == kNone;
}

// "X to Y" of the recipe fixed. The pattern _PERIOD of the Python definition by hand: `position` is where to look.
class PeriodScanner {
 public:
  explicit PeriodScanner(Text text) : text_(text) {}

  // Moves to the next match from `position` on; false at the end of the text.
  bool next() {
    for (; position_ < text_.size(); ++position_) {
      const char c = text_[position_];
      if (!is_ascii_digit(c) && c != '.' && c != '+' && c != '-') continue;
      if (!is_inside(position_) && match(position_)) return true;
    }
    return false;
  }
  size_t begin = 0, end = 0;  // of the last match
  Time first, second;

 private:
  bool is_inside(size_t i) const {  // of something larger, such as "3-4", "1e3", "12/30" or "12,5"
    if (i == 0) return false;
    const char c = text_[i - 1];
    if (is_word(c) || c == '.' || c == ':' || c == '+' || c == '-') return true;
    return (c == ',' || c == '/') && i > 1 && is_ascii_digit(text_[i - 2]);
  }
  bool is_blank_at(size_t i) const { return at(text_, i) == ' ' || at(text_, i) == '\n'; }
  size_t joint_end(size_t i) const {  // "to" or "and"; i if neither is there
    if (lower(at(text_, i)) == 't' && lower(at(text_, i + 1)) == 'o') return i + 2;
    if (lower(at(text_, i)) == 'a' && lower(at(text_, i + 1)) == 'n' && lower(at(text_, i + 2)) == 'd') return i + 3;
    return i;
  }

  bool is_closed(size_t i) const {  // such a thing does not go on here
    const char c = at(text_, i);
    if (is_word(c) || c == ':') return false;
    return !((c == '.' || c == ',' || c == '/' || c == '-') && is_ascii_digit(at(text_, i + 1)));
  }

  bool match(size_t start) {
    Time from, to;
    size_t i = time_end(text_, start, from);
    if (i == start) return false;
    if (is_blank_at(i)) ++i;
    const size_t joint = joint_end(i);
    if (joint == i) return false;
    const size_t to_start = joint + (is_blank_at(joint) ? 1 : 0);
    i = time_end(text_, to_start, to);
    if (i == to_start || !is_closed(i)) return false;
    begin = start;
    position_ = end = i;
    first = from;
    second = to;
    return true;
  }

  Text text_;
  size_t position_ = 0;
};

double parse_decimal(Text number, std::string& scratch) {
  scratch.assign(number);
  for (char& c : scratch) {
    if (is_other_digit(c)) c = static_cast<char>(static_cast<unsigned char>(c) - kOtherDigit0 + '0');
  }
  return parse_unsigned(scratch);
}

// Where the longest \d+\.?\d* that ends at `end` starts, at `floor` or later; `end` if there is none.
size_t decimal_start(Text text, size_t end, size_t floor) {
  size_t start = end;
  while (start > floor && is_decimal(text[start - 1])) --start;
  if (start > floor && text[start - 1] == '.') {
    size_t whole = start - 1;
    while (whole > floor && is_decimal(text[whole - 1])) --whole;
    if (whole < start - 1) return whole;
  }
  return start;
}

// Where the longest \d+\.?\d* that starts at `start` ends; `start` if there is none.
size_t decimal_end(Text text, size_t start) {
  size_t end = start;
  while (end < text.size() && is_decimal(text[end])) ++end;
  if (end > start && end < text.size() && text[end] == '.') {
    ++end;
    while (end < text.size() && is_decimal(text[end])) ++end;
  }
  return end;
}

bool has_strict_format(Text text, const Blocks& blocks) {
  text = strip(text);
  for (const Text name : {Text("think"), Text("answer")}) {  // counted even where they are not wanted
    if (std::find(blocks.begin(), blocks.end(), name) != blocks.end()) continue;
    if (text.find(opening_tag(name)) != kNone || text.find(closing_tag(name)) != kNone) return false;
  }
  size_t position = 0;
  for (const Text name : blocks) {
    const std::string opening = opening_tag(name), closing = closing_tag(name);
    if (!occurs_once(text, opening) || !occurs_once(text, closing)) return false;
    const size_t start = text.find(opening), end = text.find(closing);
    if (start < position || end < start + opening.size()) return false;
    if (!strip(text.substr(position, start - position)).empty()) return false;
    position = end + closing.size();
  }
  return position == text.size();
}

bool has_paper_format(Text text, const Blocks& blocks) {
  text = strip(text);
  if (blocks.empty() || !starts_with(text, opening_tag(blocks.front()))) return false;
  size_t position = opening_tag(blocks.front()).size();
  for (size_t i = 0; i + 1 < blocks.size(); ++i) {
    const std::string closing = closing_tag(blocks[i]), opening = opening_tag(blocks[i + 1]);
    bool is_border = false;
    while (!is_border) {
      position = text.find(closing, position);
      if (position == kNone) return false;
      position += closing.size();
      while (position < text.size() && is_blank(text[position])) ++position;
      is_border = starts_with(text.substr(position), opening);
    }
    position += opening.size();
  }
  const std::string closing = closing_tag(blocks.back());
  return ends_with(text, closing) && text.size() - closing.size() >= position;
}

std::optional<Period> read_fixed_period(Text text, Scratch& scratch) {
  const Text joined = join_blanks(text, scratch.joined, /*keeps_lines=*/true);
  PeriodScanner scanner(joined);
  bool is_found = false;
  while (scanner.next()) is_found = true;
  if (!is_found || has_other_unit(joined, scanner.begin, scanner.end, scanner.second)) return std::nullopt;
  const auto period = to_interval(scanner.first, scanner.second);
  if (!period || !std::isfinite(period->first) || !std::isfinite(period->second)) return std::nullopt;
  return period;
}

std::optional<Period> read_paper_period(Text text, Scratch& scratch) {
  Text first, second;
  size_t free_from = 0, position = 0;
  while ((position = text.find(' ', position)) != kNone) {
    size_t i = position + 1;
    if (lower(at(text, i)) == 't' && lower(at(text, i + 1)) == 'o') {
      i += 2;
    } else if (lower(at(text, i)) == 'a' && lower(at(text, i + 1)) == 'n' && lower(at(text, i + 2)) == 'd') {
      i += 3;
    }
    if (i == position + 1 || at(text, i) != ' ') {
      ++position;
      continue;
    }
    ++i;  // behind the separator
    const size_t start = decimal_start(text, position, free_from), end = decimal_end(text, i);
    if (start < position && end > i) {
      first = text.substr(start, position - start);
      second = text.substr(i, end - i);
      free_from = end;
    }
    position = i;
  }
  if (first.empty()) return std::nullopt;
  const double start_s = parse_decimal(first, scratch.number);
  return Period{start_s, parse_decimal(second, scratch.number)};
}

}  // namespace

std::optional<Text> tag_block(Text text, Text tag, Pick pick) {
  const std::string opening = opening_tag(tag), closing = closing_tag(tag);
  std::optional<Text> found;
  size_t position = 0;
  while ((position = text.find(opening, position)) != kNone) {
    const size_t start = position + opening.size();
    const size_t end = text.find(closing, start);
    if (end == kNone) break;
    found = text.substr(start, end - start);
    if (pick == Pick::kFirst) break;
    position = end + closing.size();
  }
  return found;
}

bool has_format(Text text, const Blocks& blocks, Rule rule) {
  return rule == Rule::kPaper ? has_paper_format(text, blocks) : has_strict_format(text, blocks);
}

std::optional<Period> read_period(Text text, Rule rule, Scratch& scratch) {
  return rule == Rule::kPaper ? read_paper_period(text, scratch) : read_fixed_period(text, scratch);
}

}  // namespace vcr1
