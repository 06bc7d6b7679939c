// The tokenizer of a bundle: tokenizer.json of the kind that LLaMA's models have.
//
// That is byte-pair encoding with bytes for what is in no token, a normalizer that puts a mark
// for spaces, and pre-tokenizers that split. Others are refused: link the tokenizers library's C
// interface for those.
#pragma once

#include <cstdint>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Tokenizer {
 public:
  explicit Tokenizer(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    const auto data = nlohmann::json::parse(file);
    const auto& model = data.at("model");
    if (model.at("type") != "BPE") refuse("model", model.at("type"));
    for (const auto& [text, id] : model.at("vocab").items()) add(text, id);
    std::size_t rank = 0;
    for (const auto& merge : model.at("merges")) merges_[read_merge(merge)] = rank++;
    falls_back_ = model.value("byte_fallback", false);
    if (model.at("unk_token").is_string()) unknown_ = ids_.at(model.at("unk_token"));
    for (const auto& token : data.at("added_tokens")) {
      add(token.at("content"), token.at("id"));
      if (token.at("special").get<bool>()) special_.insert(token.at("content"));
    }
    read_normalizer(data.at("normalizer"));
    read_pre_tokenizer(data.at("pre_tokenizer"));
    read_start(data.at("post_processor"));
  }

  int64_t id(const std::string& token) const { return ids_.at(token); }

  // Whether a text holds what the tokenizer takes for more than text.
  bool holds_special(const std::string& text) const {
    for (const auto& token : special_)
      if (text.find(token) != std::string::npos) return true;
    return false;
  }

  // Token IDs of a text, with the tokens that stand before every text.
  std::vector<int64_t> encode(const std::string& text) const {
    std::vector<int64_t> found = start_;
    std::size_t at = 0, begin = 0;
    while (at < text.size()) {
      std::string longest;
      for (const auto& token : special_)
        if (token.size() > longest.size() && text.compare(at, token.size(), token) == 0)
          longest = token;
      if (longest.empty()) {
        ++at;
        continue;
      }
      encode_plain(text.substr(begin, at - begin), found);
      found.push_back(ids_.at(longest));
      at = begin = at + longest.size();
    }
    encode_plain(text.substr(begin), found);
    return found;
  }

  // The text of token IDs, without special ones.
  std::string decode(const std::vector<int64_t>& ids) const {
    std::string text;
    for (const int64_t id : ids) {
      const std::string& token = tokens_.at(id);
      if (token.size() == 6 && token.rfind("<0x", 0) == 0)
        text += static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16));
      else if (!special_.count(token))
        text += token;
    }
    text = replace(text, kSpace, " ");
    const auto first = text.find_first_not_of(" \n\t"), last = text.find_last_not_of(" \n\t");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
  }

 private:
  static constexpr const char* kSpace = "\xe2\x96\x81";

  struct Split {
    std::regex pattern;
    bool joins_next;
  };

  [[noreturn]] static void refuse(const std::string& part, const std::string& kind) {
    throw std::runtime_error("tokenizer.json: this example does not know the " + part + " " + kind);
  }

  static std::string replace(std::string text, const std::string& from, const std::string& to) {
    for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
      text.replace(at, from.size(), to);
    return text;
  }

  static std::pair<std::string, std::string> read_merge(const nlohmann::json& merge) {
    if (merge.is_array()) return {merge.at(0), merge.at(1)};
    const auto text = merge.get<std::string>();  // of older files
    return {text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)};
  }

  void add(const std::string& text, int64_t id) {
    ids_[text] = id;
    tokens_[id] = text;
  }

  void read_normalizer(const nlohmann::json& given) {
    if (given.is_null()) return;
    const std::string kind = given.at("type");
    if (kind == "Sequence") {
      for (const auto& each : given.at("normalizers")) read_normalizer(each);
    } else if (kind == "Prepend") {
      normalizers_.emplace_back("", given.at("prepend"));
    } else if (kind == "Replace" && given.at("pattern").contains("String")) {
      normalizers_.emplace_back(given.at("pattern").at("String"), given.at("content"));
    } else {
      refuse("normalizer", kind);
    }
  }

  void read_pre_tokenizer(const nlohmann::json& given) {
    if (given.is_null()) return;
    const std::string kind = given.at("type");
    if (kind == "Sequence") {
      for (const auto& each : given.at("pretokenizers")) read_pre_tokenizer(each);
      return;
    }
    if (kind != "Split" || given.at("invert").get<bool>()) refuse("pre-tokenizer", kind);
    const std::string behavior = given.at("behavior");
    if (behavior != "Isolated" && behavior != "MergedWithNext") refuse("behavior", behavior);
    const std::string pattern = given.at("pattern").value("Regex", "");
    if (pattern.empty()) refuse("pattern", given.at("pattern").dump());
    splits_.push_back({std::regex(pattern), behavior == "MergedWithNext"});
  }

  void read_start(const nlohmann::json& given) {
    if (given.is_null()) return;
    if (given.at("type") != "TemplateProcessing") refuse("post-processor", given.at("type"));
    for (const auto& part : given.at("single"))
      if (part.contains("SpecialToken")) start_.push_back(ids_.at(part["SpecialToken"]["id"]));
  }

  static std::vector<std::string> split(const std::string& text, const Split& how) {
    std::vector<std::string> parts;
    std::size_t begin = 0;
    for (std::sregex_iterator it(text.begin(), text.end(), how.pattern), end; it != end; ++it) {
      const auto at = static_cast<std::size_t>(it->position());
      const auto behind = at + static_cast<std::size_t>(it->length());
      if (at > begin) parts.push_back(text.substr(begin, at - begin));
      begin = at;
      if (how.joins_next) continue;
      parts.push_back(text.substr(at, behind - at));
      begin = behind;
    }
    if (begin < text.size()) parts.push_back(text.substr(begin));
    return parts;
  }

  void encode_plain(std::string text, std::vector<int64_t>& found) const {
    if (text.empty()) return;
    for (const auto& [from, to] : normalizers_) text = from.empty() ? to + text : replace(text, from, to);
    std::vector<std::string> parts{text};
    for (const auto& each : splits_) {
      std::vector<std::string> finer;
      for (const auto& part : parts)
        for (auto& piece : split(part, each)) finer.push_back(std::move(piece));
      parts = std::move(finer);
    }
    for (const auto& part : parts) merge(part, found);
  }

  // Byte-pair encoding of one part: of all neighbours, the pair that was merged first is next.
  void merge(const std::string& part, std::vector<int64_t>& found) const {
    std::vector<std::string> pieces;
    for (std::size_t at = 0; at < part.size();) {
      std::size_t length = 1;  // of a character in UTF-8
      while (at + length < part.size() && (part[at + length] & 0xC0) == 0x80) ++length;
      pieces.push_back(part.substr(at, length));
      at += length;
    }
    while (pieces.size() > 1) {
      std::size_t best = std::numeric_limits<std::size_t>::max(), at = 0;
      for (std::size_t k = 0; k + 1 < pieces.size(); ++k) {
        const auto merge = merges_.find({pieces[k], pieces[k + 1]});
        if (merge != merges_.end() && merge->second < best) best = merge->second, at = k;
      }
      if (best == std::numeric_limits<std::size_t>::max()) break;
      pieces[at] += pieces[at + 1];
      pieces.erase(pieces.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    for (const auto& piece : pieces) put(piece, found);
  }

  void put(const std::string& piece, std::vector<int64_t>& found) const {
    const auto id = ids_.find(piece);
    if (id != ids_.end()) {
      found.push_back(id->second);
      return;
    }
    if (!falls_back_) {
      found.push_back(unknown_);
      return;
    }
    static const char* digits = "0123456789ABCDEF";
    for (const unsigned char byte : piece) {
      const std::string name = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
      const auto known = ids_.find(name);
      found.push_back(known == ids_.end() ? unknown_ : known->second);
    }
  }

  std::map<std::string, int64_t> ids_;
  std::map<int64_t, std::string> tokens_;
  std::map<std::pair<std::string, std::string>, std::size_t> merges_;
  std::set<std::string> special_;
  std::vector<std::pair<std::string, std::string>> normalizers_;  // from (empty: before all), to
  std::vector<Split> splits_;
  std::vector<int64_t> start_;
  int64_t unknown_ = 0;
  bool falls_back_ = false;
};
