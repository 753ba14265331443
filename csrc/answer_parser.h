// Reads answers as the functions of vcr1_fast/tasks/{answer,glue,choice}_format.py do, which define what is correct:
// the same results bit for bit on every text. Time linear in the text, memory bounded by it, recursion by
// kMaxListDepth.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "answer_text.h"

namespace vcr1 {

constexpr size_t kMaxTextChars = 65536;
constexpr int32_t kMaxListDepth = 8;
constexpr int64_t kMaxListItems = 4096;
constexpr size_t kMaxIntervals = 64;
constexpr size_t kMaxIntegerDigits = 4300;
constexpr size_t kMaxOptions = 26;

using Period = std::pair<double, double>;  // start, end in seconds
using Boxes = std::vector<double>;         // 4 values a box, NaN for one that is not a number
using Blocks = std::vector<std::string>;   // names of tags, in the order wanted
enum class Rule : int32_t { kFixed, kPaper };
enum class Pick : int32_t { kFirst, kLast };

// Memory that readers use over again; one a thread.
struct Scratch {
  std::string clipped;  // what the caller may keep a text in
  std::string joined;
  std::string number;
};

// What stands in the first or last block of a tag, given by its name.
std::optional<Text> tag_block(Text text, Text tag, Pick pick);
bool has_format(Text text, const Blocks& blocks, Rule rule);

std::optional<Period> read_period(Text text, Rule rule, Scratch& scratch);
std::optional<Boxes> read_boxes(Text text);
std::optional<std::vector<Period>> read_glue(Text text, Rule rule, Scratch& scratch);
// The letter that a text of ASCII names, '\0' if there is none. Options are at most 26, each as plain_option gives it.
using Options = std::vector<std::string>;
std::string plain_option(Text option);
char read_choice(Text text, const Options& options, Scratch& scratch);
// The letter of the original's rule, '\0' if there is none.
char read_paper_choice(Text text, Scratch& scratch);

}  // namespace vcr1
