// Numbers inside of answers, as the patterns of vcr1_fast/tasks/answer_format.py find them and float() reads them.
#pragma once

#include <string>

#include "answer_text.h"

namespace vcr1 {

// The character at i; '\0', which starts nothing, behind the end.
inline char at(Text text, size_t i) { return i < text.size() ? text[i] : '\0'; }

// Where the number [+-]?([0-9]+([.][0-9]*)?|[.][0-9]+) that starts at i ends, i if there is none. `whole_end`: where
// its part before the point ends; the end where there is no such part.
size_t number_end(Text text, size_t i, size_t& whole_end);

// Both are correctly rounded, infinity beyond the range of a double. `digits`: [0-9]*[.]?[0-9]*([eE][+-]?[0-9]+)? with
// a digit in it; `number`: the same, or with a sign before it.
double parse_unsigned(Text digits);
double parse_signed(Text number);

// The text with one blank for each run of blanks, none at the ends, and "-" for each minus sign; lives in `scratch`.
// `keeps_lines`: a newline for a run that holds one.
Text join_blanks(Text text, std::string& scratch, bool keeps_lines = false);

}  // namespace vcr1
