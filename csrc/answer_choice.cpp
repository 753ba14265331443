// The letter of a multiple-choice answer.
#include <algorithm>
#include <array>
#include <bitset>
#include <string>

#include "answer_numbers.h"
#include "answer_parser.h"

namespace vcr1 {

namespace {

// _EDGES of choice_format.py; its curly quotation marks are not ASCII and never get here.
Text strip_edges(Text text) {
  constexpr Text kEdges = " .,:;!?*_`'\"()[]{}";
  const size_t begin = text.find_first_not_of(kEdges);
  return begin == Text::npos ? Text() : text.substr(begin, text.find_last_not_of(kEdges) - begin + 1);
}

char upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - ('a' - 'A')) : c; }
bool is_letter(char c) { return lower(c) >= 'a' && lower(c) <= 'z'; }
bool is_word_at(Text text, size_t i) { return i < text.size() && is_word(text[i]); }

// Whether `lower_word` stands at i, in any case if `any_case`.
bool stands_at(Text text, size_t i, Text lower_word, bool any_case) {
  if (text.size() < i + lower_word.size()) return false;
  for (size_t k = 0; k < lower_word.size(); ++k) {
    if ((any_case ? lower(text[i + k]) : text[i + k]) != lower_word[k]) return false;
  }
  return true;
}

template <size_t N>
bool skip_one_of(Text text, size_t& i, const std::array<Text, N>& words) {
  for (const Text word : words) {
    if (!stands_at(text, i, word, true)) continue;
    i += word.size();
    return true;
  }
  return false;
}

// Behind "The answer is", "Answer:", "Correct option" and the like; 0 where the text starts otherwise. _LEAD_IN.
size_t lead_in_end(Text text) {
  static constexpr std::array<Text, 2> kArticles = {"the ", "my "};
  static constexpr std::array<Text, 4> kKinds = {"best ", "correct ", "final ", "right "};
  static constexpr std::array<Text, 3> kNouns = {"answer", "option", "choice"};
  size_t i = 0;
  skip_one_of(text, i, kArticles);
  skip_one_of(text, i, kKinds);
  if (!skip_one_of(text, i, kNouns) || is_word_at(text, i)) return 0;
  if (stands_at(text, i, " is", true)) i += 3;
  if (at(text, i) == ':') {
    i += 1;
  } else if (at(text, i) == ' ' && at(text, i + 1) == ':') {
    i += 2;
  }
  return at(text, i) == ' ' ? i + 1 : i;
}

// Behind a letter in front of more text, "(C) text" or "C - text"; 0 where there is none. _MARK.
size_t mark_end(Text text, char& letter) {
  constexpr Text kMarks = ")].:,";
  size_t i = at(text, 0) == '(' || at(text, 0) == '[' ? 1 : 0;
  if (!is_letter(at(text, i))) return 0;
  letter = upper(text[i++]);
  const size_t begin = i;
  while (i < text.size() && kMarks.find(text[i]) != Text::npos) ++i;
  if (i > begin) return at(text, i) == ' ' ? i + 1 : i;
  if (stands_at(text, i, " - ", false)) return i + 3;
  return at(text, i) == ' ' ? i + 1 : 0;
}

// "(C)", "[ c ]" at i; _MENTION's first half. `end`: behind it.
bool is_bracketed(Text text, size_t i, char& letter, size_t& end) {
  if ((text[i] != '(' && text[i] != '[') || (i > 0 && is_word(text[i - 1]))) return false;
  size_t k = i + (at(text, i + 1) == ' ' ? 2 : 1);
  if (!is_letter(at(text, k))) return false;
  letter = upper(text[k++]);
  if (at(text, k) == ' ') ++k;
  if (at(text, k) != ')' && at(text, k) != ']') return false;
  end = k + 1;
  return true;
}

// A capital on its own at i, no article A and no pronoun I; _MENTION's second half.
bool is_capital_alone(Text text, size_t i) {
  static constexpr std::array<Text, 8> kAfterLetter = {"and", "or", "is", "because", "since", "as", "but", "not"};
  const auto joins = [&](size_t k) { return is_word_at(text, k) || at(text, k) == '\'' || at(text, k) == '-'; };
  if (text[i] < 'A' || text[i] > 'Z' || (i > 0 && joins(i - 1)) || joins(i + 1)) return false;
  if (at(text, i + 1) != ' ' || !is_word_at(text, i + 2)) return true;
  if (text[i] == 'I') return false;
  return text[i] != 'A' || std::any_of(kAfterLetter.begin(), kAfterLetter.end(), [&](Text word) {
           return stands_at(text, i + 2, word, false) && !is_word_at(text, i + 2 + word.size());
         });
}

// The one letter that stands for an option somewhere in the text; '\0' for none or several.
char mentioned_letter(Text text) {
  std::bitset<26> mentioned;
  char last = '\0';
  for (size_t i = 0; i < text.size();) {
    char letter = text[i];
    size_t end = i + 1;
    if (is_bracketed(text, i, letter, end) || is_capital_alone(text, i)) {
      mentioned.set(static_cast<size_t>(letter - 'A'));
      last = letter;
    }
    i = end;
  }
  return mentioned.count() == 1 ? last : '\0';
}

// The letters of the options whose text this is, first and number.
struct Named {
  size_t count = 0;
  char first = '\0';
  std::bitset<26> letters;
};
Named named_by(Text text, const Options& options, std::string& scratch) {
  Named named;
  scratch = strip_edges(text);
  for (char& c : scratch) c = lower(c);
  if (scratch.empty()) return named;
  for (size_t k = 0; k < options.size(); ++k) {
    if (options[k] != scratch) continue;
    if (named.count++ == 0) named.first = static_cast<char>('A' + k);
    named.letters.set(k);
  }
  return named;
}

}  // namespace

std::string plain_option(Text option) {
  std::string joined;
  std::string plain(strip_edges(join_blanks(option, joined)));
  for (char& c : plain) c = lower(c);
  return plain;
}

char read_choice(Text text, const Options& options, Scratch& scratch) {
  text = join_blanks(text, scratch.joined);
  const auto is_option = [&](char letter) {
    return letter >= 'A' && letter <= 'Z' && static_cast<size_t>(letter - 'A') < options.size();
  };
  const Text body = text.substr(lead_in_end(text));
  const Text alone = strip_edges(body);
  if (alone.size() == 1 && is_option(upper(alone[0]))) return upper(alone[0]);
  Named named = named_by(text, options, scratch.number);
  if (named.count == 0) named = named_by(body, options, scratch.number);
  if (named.count > 0) return named.count == 1 ? named.first : '\0';
  char letter = '\0';
  const size_t end = mark_end(body, letter);
  if (end > 0) {
    named = named_by(body.substr(end), options, scratch.number);
    if (named.count > 0) return named.letters.test(static_cast<size_t>(letter - 'A')) ? letter : '\0';
  }
  letter = mentioned_letter(body);
  return is_option(letter) ? letter : '\0';
}

char read_paper_choice(Text text, Scratch& scratch) {
  // the same phrases in the same order as PAPER_PREFIXES of choice_format.py
  static constexpr std::array<Text, 7> kPrefixes = {
      "The best answer is",    "The correct answer is",    "The answer is", "The answer", "The best option is",
      "The correct option is", "Best answer:Best option:",
  };
  scratch.number = strip(text);
  for (const Text prefix : kPrefixes) {
    size_t found = scratch.number.find(prefix);
    if (found == Text::npos) continue;
    std::string& kept = scratch.joined;
    kept.clear();
    size_t position = 0;
    for (; found != Text::npos; found = scratch.number.find(prefix, position)) {
      kept.append(scratch.number, position, found - position);
      position = found + prefix.size();
    }
    kept.append(scratch.number, position, std::string::npos);
    scratch.number.swap(kept);
  }
  const size_t letter = scratch.number.find_first_of("ABCDEFG");
  return letter == Text::npos ? '\0' : scratch.number[letter];
}

}  // namespace vcr1
