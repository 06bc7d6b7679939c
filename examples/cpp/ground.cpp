// Grounds a phrase in a picture with a bundle of gap-export, through onnxruntime's C++ interface.
//
//     ground BUNDLE PICTURE PHRASE [RATIO]
//
// One line is printed for each box: left, top, right and bottom edge in pixels of the picture, as
// `gap-runtime ground` prints them. docs/bundle-format.md says what is done here and why. Left out
// for shortness: models that cut pictures into tiles or take them at their own size, pruners that
// read the phrase, several position axes, drafts, and the hashes of the files.
#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "picture.hpp"
#include "tokenizer.hpp"

using nlohmann::json;

namespace {

// A number that is stored in `dtype`, from its place in memory.
float read_number(const char* at, const std::string& dtype) {
  if (dtype == "float32") {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  if (dtype == "float16") return Ort::Float16_t::FromBits(bits).ToFloat();
  if (dtype == "bfloat16") return Ort::BFloat16_t::FromBits(bits).ToFloat();
  throw std::runtime_error("embeddings of " + dtype + " are not known here");
}

// The token embedding table, read row by row from its weight file.
class Embedding {
 public:
  Embedding(const std::string& folder, const json& spec)
      : file_(folder + "/" + spec.at("file").get<std::string>(), std::ios::binary),
        offset_(spec.at("offset")),
        dtype_(spec.at("dtype")),
        rows_(spec.at("shape").at(0)),
        width_(spec.at("shape").at(1)) {
    if (!file_) throw std::runtime_error(spec.at("file").get<std::string>() + ": cannot be read");
  }

  int64_t width() const { return width_; }

  void put(int64_t token, float* row) {
    if (token < 0 || token >= rows_) throw std::runtime_error("a token without an embedding");
    const int64_t size = dtype_ == "float32" ? 4 : 2;
    std::vector<char> bytes(static_cast<std::size_t>(width_ * size));
    file_.seekg(offset_ + token * width_ * size);
    if (!file_.read(bytes.data(), width_ * size)) throw std::runtime_error("weights end too early");
    for (int64_t k = 0; k < width_; ++k) row[k] = read_number(&bytes[static_cast<std::size_t>(k * size)], dtype_);
  }

 private:
  std::ifstream file_;
  int64_t offset_;
  std::string dtype_;
  int64_t rows_, width_;
};

ONNXTensorElementDataType element_type(const std::string& dtype) {
  if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (dtype == "bfloat16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  throw std::runtime_error("a cache of " + dtype + " is not known here");
}

template <typename T>
Ort::Value wrap(std::vector<T>& values, const std::vector<int64_t>& shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

// The decoder and its cache, which is written where it is read.
class Decoder {
 public:
  Decoder(Ort::Env& env, const Ort::SessionOptions& options, const std::string& path,
          const json& cache, int64_t capacity, int64_t vocabulary)
      : session_(env, path.c_str(), options), vocabulary_(vocabulary) {
    const int64_t heads = cache.at("heads"), width = cache.at("head_dim");
    const std::string dtype = cache.at("dtype");
    shape_ = {1, heads, capacity, width};
    type_ = element_type(dtype);
    const auto bytes = static_cast<std::size_t>(heads * capacity * width * (dtype == "float32" ? 4 : 2));
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t k = 0; k < session_.GetInputCount(); ++k) {
      names_.emplace_back(session_.GetInputNameAllocated(k, allocator).get());
      // Slots that the mask hides are multiplied by 0: no NaN may stand in them.
      if (names_.back().rfind("cache_", 0) == 0) cache_.emplace_back(bytes, '\0');
    }
  }

  // Logits [V] of the last of some rows, which are written to the cache from a slot on.
  std::vector<float> run(std::vector<float> embeddings, std::vector<int64_t> positions,
                         int64_t slot) {
    const auto rows = static_cast<int64_t>(positions.size());
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<int64_t> write_slot{slot}, wanted{rows - 1};
    std::vector<float> logits(static_cast<std::size_t>(vocabulary_));
    std::vector<std::string> next{"logits"};
    std::vector<Ort::Value> inputs, outputs;
    outputs.push_back(wrap(logits, {1, vocabulary_}));
    std::size_t layer = 0;
    for (const auto& name : names_) {
      if (name == "embeddings") {
        inputs.push_back(wrap(embeddings, {1, rows, static_cast<int64_t>(embeddings.size()) / rows}));
      } else if (name == "position_ids") {
        inputs.push_back(wrap(positions, {1, rows}));
      } else if (name == "write_slot") {
        inputs.push_back(wrap(write_slot, {1}));
      } else if (name == "logits_rows") {
        inputs.push_back(wrap(wanted, {1}));
      } else {
        auto& held = cache_.at(layer++);
        for (auto* side : {&inputs, &outputs})
          side->push_back(Ort::Value::CreateTensor(memory, held.data(), held.size(), shape_.data(),
                                                   shape_.size(), type_));
        next.push_back("next_" + name);
      }
    }
    std::vector<const char*> in, out;
    for (const auto& name : names_) in.push_back(name.c_str());
    for (const auto& name : next) out.push_back(name.c_str());
    session_.Run(Ort::RunOptions{nullptr}, in.data(), inputs.data(), inputs.size(), out.data(),
                 outputs.data(), outputs.size());
    return logits;
  }

 private:
  Ort::Session session_;
  int64_t vocabulary_;
  std::vector<std::string> names_;
  std::vector<std::vector<char>> cache_;
  std::vector<int64_t> shape_;
  ONNXTensorElementDataType type_;
};

struct Seen {
  std::vector<float> tokens;       // [K + E, D]
  std::vector<int64_t> positions;  // of every slot of the longest prompt
};

Seen look(Ort::Env& env, const Ort::SessionOptions& options, const std::string& path,
          std::vector<float> pixels, int64_t side) {
  Ort::Session session(env, path.c_str(), options);
  if (session.GetInputCount() != 1)
    throw std::runtime_error("the pruner reads the phrase, which this example does not do");
  const char* in[] = {"pixels"};
  const char* out[] = {"visual_tokens", "position_ids"};
  auto input = wrap(pixels, {1, 3, side, side});
  auto found = session.Run(Ort::RunOptions{nullptr}, in, &input, 1, out, 2);
  const auto tokens = found[0].GetTensorTypeAndShapeInfo(), ids = found[1].GetTensorTypeAndShapeInfo();
  if (ids.GetShape().at(0) != 1) throw std::runtime_error("several position axes are not known here");
  const auto* values = found[0].GetTensorData<float>();
  const auto* places = found[1].GetTensorData<int64_t>();
  return {{values, values + tokens.GetElementCount()}, {places, places + ids.GetElementCount()}};
}

// A phrase with single spaces between its words.
std::string collapse(const std::string& phrase) {
  std::istringstream words(phrase);
  std::string all, word;
  while (words >> word) all += (all.empty() ? "" : " ") + word;
  return all;
}

// Boxes of an answer, in pixels of the picture; what is no usable box is said on stderr.
void print_boxes(const std::string& answer, const json& spec, const Picture& picture) {
  const std::regex attempt(spec.at("attempt").get<std::string>());
  const std::regex pattern(spec.at("pattern").get<std::string>());
  const double scale = spec.at("scale");
  double width = picture.width, height = picture.height, left = 0, top = 0;
  if (spec.at("frame") == "padded-square") {
    const int side = std::max(picture.width, picture.height);
    left = -((side - picture.width) / 2);
    top = -((side - picture.height) / 2);
    width = height = side;
  } else if (spec.at("frame") != "original") {
    throw std::runtime_error("boxes in the frame " + spec.at("frame").get<std::string>() +
                             " are not known here");
  }
  for (std::sregex_iterator it(answer.begin(), answer.end(), attempt), end; it != end; ++it) {
    std::smatch corners;
    const std::string text = it->str();
    if (!std::regex_match(text, corners, pattern)) {
      std::cerr << "malformed box " << text << "\n";
      continue;
    }
    double box[4];
    for (std::size_t k = 0; k < 4; ++k) {
      const double value = std::stod(corners[k + 1]) / scale;
      const double at = k % 2 ? top + value * height : left + value * width;
      box[k] = std::clamp(at, 0.0, static_cast<double>(k % 2 ? picture.height : picture.width));
    }
    if (box[2] > box[0] && box[3] > box[1])
      std::printf("%.1f %.1f %.1f %.1f\n", box[0], box[1], box[2], box[3]);
    else
      std::cerr << "no area within the picture: " << text << "\n";
  }
}

void ground(const std::string& folder, const std::string& image, const std::string& given,
            const std::string& wanted) {
  std::ifstream file(folder + "/manifest.json");
  if (!file) throw std::runtime_error(folder + ": no manifest.json in it");
  const json manifest = json::parse(file);
  if (manifest.at("schema") != 5) throw std::runtime_error("this example reads schema 5");
  const auto& prompt = manifest.at("prompt");
  if (prompt.at("tokenizer").is_null() || prompt.at("image_token").is_null())
    throw std::runtime_error("a bundle without a tokenizer or an image token is not known here");

  json entry = manifest.at("ratios").at(0);
  for (const auto& each : manifest.at("ratios"))
    if (!wanted.empty() && std::abs(each.at("ratio").get<double>() - std::stod(wanted)) < 1e-6)
      entry = each;
  if (!wanted.empty() && std::abs(entry.at("ratio").get<double>() - std::stod(wanted)) >= 1e-6)
    throw std::runtime_error("the bundle has no ratio " + wanted);
  std::string vision, decoder_file;
  for (const auto& stage : manifest.at("stages")) {
    if (stage.at("role") == "decoder") decoder_file = stage.at("file");
    if (stage.at("role") == "vision" && stage.at("kept") == entry.at("kept"))
      vision = stage.at("file");
  }

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "ground");
  Ort::SessionOptions options;
  const Picture picture = load_picture(image);
  const Seen seen = look(env, options, folder + "/" + vision,
                         make_pixels(picture, manifest.at("preprocess")),
                         manifest.at("preprocess").at("side"));

  // The prompt's tokens, split at the picture.
  const Tokenizer tokenizer(folder + "/" + prompt.at("tokenizer").get<std::string>());
  const std::string phrase = collapse(given);
  if (phrase.empty()) throw std::runtime_error("the phrase is empty");
  if (tokenizer.holds_special(phrase)) throw std::runtime_error("the phrase holds a special token");
  std::string text = prompt.at("template");
  text.replace(text.find("{phrase}"), 8, phrase);
  const auto ids = tokenizer.encode(text);
  const auto picture_at = static_cast<std::size_t>(
      std::find(ids.begin(), ids.end(), tokenizer.id(prompt.at("image_token"))) - ids.begin());
  if (picture_at >= ids.size()) throw std::runtime_error("the prompt has no place for the picture");
  const auto& layout = manifest.at("layout");
  if (picture_at != layout.at("prefix").get<std::size_t>() ||
      ids.size() - picture_at - 1 > layout.at("suffix").get<std::size_t>())
    throw std::runtime_error("the phrase does not fit the bundle's prompt");

  // Rows of the prompt: text before, visual tokens, text behind.
  Embedding embedding(folder, manifest.at("embedding"));
  const auto width = static_cast<std::size_t>(embedding.width());
  std::vector<float> rows;
  const auto put_text = [&](std::size_t begin, std::size_t end) {
    for (std::size_t k = begin; k < end; ++k) {
      rows.resize(rows.size() + width);
      embedding.put(ids[k], &rows[rows.size() - width]);
    }
  };
  put_text(0, picture_at);
  rows.insert(rows.end(), seen.tokens.begin(), seen.tokens.end());
  put_text(picture_at + 1, ids.size());
  const auto length = static_cast<int64_t>(rows.size() / width);
  const std::vector<int64_t> positions(seen.positions.begin(), seen.positions.begin() + length);

  // The answer, token by token. Slots are compact; positions go on from the prompt's last one.
  Decoder decoder(env, options, folder + "/" + decoder_file, manifest.at("cache"),
                  layout.at("capacity"), manifest.at("embedding").at("shape").at(0));
  const std::vector<int64_t> stops = prompt.at("stop_ids");
  std::vector<int64_t> answer;
  auto logits = decoder.run(rows, positions, 0);
  while (true) {
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    if (std::find(stops.begin(), stops.end(), best) != stops.end()) break;
    answer.push_back(best);
    const auto count = static_cast<int64_t>(answer.size());
    if (count == layout.at("answer").get<int64_t>()) break;
    std::vector<float> row(width);
    embedding.put(best, row.data());
    logits = decoder.run(row, {positions.back() + count}, length + count - 1);
  }
  const std::string said = tokenizer.decode(answer);
  std::cerr << said << "  kept " << entry.at("kept") << " of " << entry.at("patches") << "\n";
  print_boxes(said, manifest.at("box"), picture);
}

}  // namespace

int main(int count, char** words) {
  if (count < 4 || count > 5) {
    std::cerr << "usage: ground BUNDLE PICTURE PHRASE [RATIO]\n";
    return 2;
  }
  try {
    ground(words[1], words[2], words[3], count == 5 ? words[4] : "");
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
