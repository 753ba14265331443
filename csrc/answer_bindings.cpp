// Readers of answers in Python: a list of str in, a list of values out. What they read is defined by
// vcr1_fast/tasks/{answer,glue,choice}_format.py; only the first kMaxTextChars characters of a text count.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <unordered_map>

#include "answer_parser.h"
#include "bindings.h"
#include "parallel.h"
#include "tensor_view.h"

namespace vcr1 {
namespace {

constexpr int64_t kMinCharsPerThread = 1 << 20;  // 0.3 ms of looking for tags, 3 ms of reading boxes

// The characters of a Python str, which is immutable and held by its list while they are read.
struct Characters {
  const void* data;
  int kind;  // bytes a character
  size_t count;
  bool is_ascii;
};

// The byte that stands for a character beyond ASCII, see answer_text.h.
char class_of(Py_UCS4 c) {
  if (c == 0x2212) return static_cast<char>(kMinusSign);
  if (Py_UNICODE_ISSPACE(c)) return static_cast<char>(kOtherBlank);
  const int digit = Py_UNICODE_TODECIMAL(c);
  if (digit >= 0) return static_cast<char>(kOtherDigit0 + digit);
  return static_cast<char>(Py_UNICODE_ISALNUM(c) ? kOtherWord : kOther);
}

// The text itself where it is ASCII, a copy in `memory` else.
Text text_of(const Characters& characters, std::string& memory) {
  const size_t count = std::min(characters.count, kMaxTextChars);
  if (characters.is_ascii) return Text(static_cast<const char*>(characters.data), count);
  memory.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const Py_UCS4 c = PyUnicode_READ(characters.kind, characters.data, i);
    memory[i] = c < 0x80 ? static_cast<char>(c) : class_of(c);
  }
  return memory;
}

class Texts {
 public:
  explicit Texts(const py::list& texts) : held_(py::tuple(texts)) {
    characters_.reserve(held_.size());
    for (size_t n = 0; n < held_.size(); ++n) {
      PyObject* text = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(n));
      if (!PyUnicode_Check(text)) {
        throw py::type_error("texts: item " + std::to_string(n) + " got " + Py_TYPE(text)->tp_name + ", wanted str");
      }
      const auto count = static_cast<size_t>(PyUnicode_GET_LENGTH(text));
      characters_.push_back(
          {PyUnicode_DATA(text), static_cast<int>(PyUnicode_KIND(text)), count, PyUnicode_IS_ASCII(text) != 0});
      num_chars_ += static_cast<int64_t>(std::min(count, kMaxTextChars));
    }
  }
  size_t size() const { return characters_.size(); }

  // read(text, scratch), or with the index of the text as well, of every text, without the GIL, large batches on
  // several threads.
  template <class Read>
  auto read_all(const Read& read) const {
    const auto call = [&read](Text text, Scratch& scratch, size_t n) {
      if constexpr (std::is_invocable_v<Read, Text, Scratch&, size_t>) {
        return read(text, scratch, n);
      } else {
        return read(text, scratch);
      }
    };
    using Result = decltype(call(Text(), std::declval<Scratch&>(), 0));
    std::vector<Result> results(size());
    const py::gil_scoped_release release;
    parallel_ranges(static_cast<int64_t>(size()), num_chars_, kMinCharsPerThread, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (auto n = static_cast<size_t>(begin); n < static_cast<size_t>(end); ++n) {
        results[n] = call(text_of(characters_[n], scratch.clipped), scratch, n);
      }
    });
    return results;
  }

 private:
  py::tuple held_;
  std::vector<Characters> characters_;
  int64_t num_chars_ = 0;
};

// Which block of which tag is read, and by whose rule.
struct Where {
  Where(const std::string& tag_name, const std::string& pick_name, const std::string& rule_name)
      : tag(tag_name), pick(Pick::kLast), rule(rule_of(rule_name)) {
    const bool is_name = std::all_of(tag.begin(), tag.end(), [](char c) { return c > 0 && is_word(c); });
    if (tag.empty() || !is_name) fail("tag", "value", "'" + tag + "'", "ASCII letters");
    if (pick_name == "first") {
      pick = Pick::kFirst;
    } else if (pick_name != "last") {
      fail("pick", "value", "'" + pick_name + "'", "'first' or 'last'");
    }
  }
  static Rule rule_of(const std::string& rule) {
    if (rule != "fixed" && rule != "paper") fail("rule", "value", "'" + rule + "'", "'fixed' or 'paper'");
    return rule == "paper" ? Rule::kPaper : Rule::kFixed;
  }
  std::optional<Text> block(Text text) const { return tag_block(text, tag, pick); }

  std::string tag;
  Pick pick;
  Rule rule;
};

using MaybePeriod = std::optional<Period>;
using MaybePeriods = std::optional<std::vector<Period>>;

auto period_reader(const Where& where) {
  return [&where](Text text, Scratch& scratch) -> MaybePeriod {
    const auto block = where.block(text);
    return block ? read_period(*block, where.rule, scratch) : std::nullopt;
  };
}

auto glue_reader(const Where& where) {
  return [&where](Text text, Scratch& scratch) -> MaybePeriods {
    const auto block = where.block(text);
    return block ? read_glue(*block, where.rule, scratch) : std::nullopt;
  };
}

// The original takes newlines out before it looks for the block.
auto box_reader(const Where& where) {
  return [&where](Text text, Scratch& scratch) -> std::optional<Boxes> {
    if (where.rule == Rule::kPaper && text.find('\n') != Text::npos) {
      scratch.joined.clear();
      for (size_t begin = 0, end = 0; end != Text::npos; begin = end + 1) {
        end = text.find('\n', begin);
        scratch.joined.append(text.substr(begin, end - begin));
      }
      text = scratch.joined;
    }
    const auto block = where.block(text);
    return block ? read_boxes(*block) : std::nullopt;
  };
}

template <class Items, class Convert>
py::list list_of(const Items& items, const Convert& convert) {
  py::list list(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), py::object(convert(items[i])).release().ptr());
  }
  return list;
}

py::object pair_of(const Period& period) { return py::make_tuple(period.first, period.second); }

py::list read_periods(const py::list& texts, const std::string& tag, const std::string& pick, const std::string& rule) {
  const Where where(tag, pick, rule);
  return list_of(Texts(texts).read_all(period_reader(where)),
                 [](const MaybePeriod& period) -> py::object { return period ? pair_of(*period) : py::none(); });
}

py::list read_glues(const py::list& texts, const std::string& tag, const std::string& pick, const std::string& rule) {
  const Where where(tag, pick, rule);
  return list_of(Texts(texts).read_all(glue_reader(where)), [](const MaybePeriods& glue) -> py::object {
    return glue ? py::object(list_of(*glue, pair_of)) : py::none();
  });
}

py::object boxes_of(const std::optional<Boxes>& boxes) {
  if (!boxes) return py::none();
  py::list rows(boxes->size() / 4);
  for (size_t i = 0; i < rows.size(); ++i) {
    py::list row(4);
    for (size_t k = 0; k < 4; ++k) {
      const double value = (*boxes)[4 * i + k];
      row[k] = std::isnan(value) ? py::object(py::none()) : py::object(py::float_(value));
    }
    rows[i] = row;
  }
  return rows;
}

py::list read_box_lists(const py::list& texts, const std::string& tag, const std::string& pick,
                        const std::string& rule) {
  const Where where(tag, pick, rule);
  return list_of(Texts(texts).read_all(box_reader(where)), boxes_of);
}

py::list have_format(const py::list& texts, const Blocks& blocks, const std::string& rule) {
  const Rule which = Where::rule_of(rule);
  if (blocks.empty()) fail("blocks", "count", "0", "1 or more");
  return list_of(Texts(texts).read_all([&](Text text, Scratch&) -> char { return has_format(text, blocks, which); }),
                 [](char is_formatted) { return py::bool_(is_formatted != 0); });
}

py::object letter_of(char letter) {
  return letter >= 'A' && letter <= 'Z' ? py::object(py::str(&letter, 1)) : py::object(py::none());
}

py::list read_paper_choices(const py::list& texts, const std::string& tag, const std::string& pick) {
  const Where where(tag, pick, "paper");
  const auto letters = Texts(texts).read_all([&](Text text, Scratch& scratch) -> char {
    const auto block = where.block(text);
    return block ? read_paper_choice(*block, scratch) : '\0';
  });
  return list_of(letters, letter_of);
}

// Texts compare by letter case and blanks, which only ASCII has in this form; the rest is left to Python.
bool is_ascii(Text text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

struct OptionList {
  Options plain;
  bool is_ascii = true;
};

OptionList options_of(const py::handle& sequence) {
  OptionList list;
  const py::tuple options(py::reinterpret_borrow<py::object>(sequence));
  for (size_t k = 0; k < std::min(options.size(), kMaxOptions); ++k) {
    PyObject* option = PyTuple_GET_ITEM(options.ptr(), static_cast<Py_ssize_t>(k));
    if (!PyUnicode_Check(option)) {
      throw py::type_error(std::string("options: item got ") + Py_TYPE(option)->tp_name + ", wanted str");
    }
    list.is_ascii = list.is_ascii && PyUnicode_IS_ASCII(option) != 0;
    if (!list.is_ascii) break;
    const auto count = static_cast<size_t>(PyUnicode_GET_LENGTH(option));
    list.plain.push_back(plain_option(Text(static_cast<const char*>(PyUnicode_DATA(option)), count)));
  }
  return list;
}

constexpr char kLeftToPython = '?';

py::tuple read_choices(const py::list& texts, const py::list& options, const std::string& tag,
                       const std::string& pick) {
  const Where where(tag, pick, "fixed");
  const size_t count = texts.size();
  if (options.size() != count) fail("options", "count", std::to_string(options.size()), std::to_string(count));
  std::unordered_map<PyObject*, size_t> seen;  // the answers of a group share their options
  std::vector<OptionList> lists;
  std::vector<size_t> list_at(count);
  for (size_t n = 0; n < count; ++n) {
    PyObject* const sequence = PyList_GET_ITEM(options.ptr(), static_cast<Py_ssize_t>(n));
    const auto [entry, is_new] = seen.try_emplace(sequence, lists.size());
    if (is_new) lists.push_back(options_of(sequence));
    list_at[n] = entry->second;
  }
  const auto letters = Texts(texts).read_all([&](Text text, Scratch& scratch, size_t n) -> char {
    const auto block = where.block(text);
    if (!block) return '\0';
    const OptionList& list = lists[list_at[n]];
    return list.is_ascii && is_ascii(*block) ? read_choice(*block, list.plain, scratch) : kLeftToPython;
  });
  py::list left;
  for (size_t n = 0; n < count; ++n) {
    if (letters[n] == kLeftToPython) left.append(n);
  }
  return py::make_tuple(list_of(letters, letter_of), left);
}

constexpr const char* kListDoc =
    "One value a text, None where the block is missing or cannot be read. pick: 'first' or 'last' block of the tag.";

}  // namespace

void bind_answers(py::module_& m) {
  const auto def = [&m](const char* name, auto function, const char* doc) {
    m.def(name, function, py::arg("texts"), py::arg("tag"), py::arg("pick"), py::arg("rule"), doc);
  };
  def("read_periods", &read_periods, kListDoc);
  def("read_glues", &read_glues, kListDoc);
  def("read_box_lists", &read_box_lists, kListDoc);
  m.def("read_paper_choices", &read_paper_choices, py::arg("texts"), py::arg("tag"), py::arg("pick"), kListDoc);
  m.def("read_choices", &read_choices, py::arg("texts"), py::arg("options"), py::arg("tag"), py::arg("pick"),
        "Letters as read_choice names them (None: no letter), and the indices of the texts left to Python, which hold\n"
        "characters beyond ASCII in their block or options. options: one sequence of str a text, the first 26 count.");
  m.def("have_format", &have_format, py::arg("texts"), py::arg("blocks"), py::arg("rule"),
        "Whether each text consists of the named blocks in this order, 'think' among them, as the rule tests it.");
}

}  // namespace vcr1
