// The text of an answer, one byte a character: ASCII as it is, and for every other character a byte that says all that
// the readers ask about it. So positions and lengths are Python's, and one code serves English, Arabic and hostile
// text.
#pragma once

#include <string_view>

namespace vcr1 {

using Text = std::string_view;

// Bytes for characters outside of ASCII. The classes are Python's: str.isspace, \w and str.isdecimal of that character.
constexpr unsigned char kOtherBlank = 0x80;
constexpr unsigned char kMinusSign = 0x81;    // U+2212
constexpr unsigned char kOtherWord = 0x82;    // a letter or digit of another script
constexpr unsigned char kOther = 0x83;        // all else
constexpr unsigned char kOtherDigit0 = 0x90;  // 0x90 + d: a decimal digit d of another script

inline bool is_blank(char c) {
  const auto b = static_cast<unsigned char>(c);
  return b == ' ' || (b >= 9 && b <= 13) || (b >= 28 && b <= 31) || b == kOtherBlank;
}
inline bool is_ascii_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_other_digit(char c) {
  const auto b = static_cast<unsigned char>(c);
  return b >= kOtherDigit0 && b <= kOtherDigit0 + 9;
}
inline bool is_decimal(char c) { return is_ascii_digit(c) || is_other_digit(c); }
inline char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c; }
// \w
inline bool is_word(char c) {
  const auto b = static_cast<unsigned char>(c);
  const char l = lower(c);
  return (l >= 'a' && l <= 'z') || is_decimal(c) || c == '_' || b == kOtherWord;
}

// str.rstrip() and str.strip()
inline Text rstrip(Text text) {
  while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
  return text;
}
inline Text strip(Text text) {
  text = rstrip(text);
  while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
  return text;
}
inline bool starts_with(Text text, Text prefix) { return text.substr(0, prefix.size()) == prefix; }
inline bool ends_with(Text text, Text suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

}  // namespace vcr1
