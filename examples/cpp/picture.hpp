// Pictures to the pixels that a vision graph takes, in the modes `pad` and `stretch`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#define STB_IMAGE_IMPLEMENTATION
#define STBI_FAILURE_USERMSG
#include <stb_image.h>

struct Picture {
  int width = 0, height = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

// A picture file as 8-bit RGB; its EXIF tag is not looked at.
inline Picture load_picture(const std::string& path) {
  int width = 0, height = 0, channels = 0;
  const std::unique_ptr<uint8_t, decltype(&stbi_image_free)> data(
      stbi_load(path.c_str(), &width, &height, &channels, 3), stbi_image_free);
  if (!data) throw std::runtime_error(path + ": " + stbi_failure_reason());
  const auto size = static_cast<std::size_t>(width) * static_cast<std::size_t>(height) * 3;
  return {width, height, {data.get(), data.get() + size}};
}

// The picture in the middle of a square as wide as its longest side.
inline Picture pad(const Picture& picture, const std::vector<int>& fill) {
  const int side = std::max(picture.width, picture.height);
  const int left = (side - picture.width) / 2, top = (side - picture.height) / 2;
  Picture square{side, side, std::vector<uint8_t>(static_cast<std::size_t>(side) * side * 3)};
  for (std::size_t k = 0; k < square.rgb.size(); ++k)
    square.rgb[k] = static_cast<uint8_t>(fill[k % 3]);
  for (int y = 0; y < picture.height; ++y)
    std::copy_n(&picture.rgb[static_cast<std::size_t>(y) * picture.width * 3], picture.width * 3,
                &square.rgb[(static_cast<std::size_t>(y + top) * side + left) * 3]);
  return square;
}

// Weights of the pixels that one pixel of a resized row is made of, as Pillow has them: a cubic
// (a = -0.5) that is as wide as the picture shrinks, in whole numbers of 2^-22.
struct Weights {
  int begin = 0;
  std::vector<int32_t> values;
};

constexpr int kBits = 22;

inline std::vector<Weights> make_weights(int from, int to) {
  const auto cubic = [](double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
  };
  const double scale = static_cast<double>(from) / to, wide = std::max(scale, 1.0);
  std::vector<Weights> all(static_cast<std::size_t>(to));
  for (int k = 0; k < to; ++k) {
    const double centre = (k + 0.5) * scale;
    const int begin = std::max(0, static_cast<int>(centre - 2 * wide + 0.5));
    const int end = std::min(from, static_cast<int>(centre + 2 * wide + 0.5));
    std::vector<double> exact;
    double sum = 0;
    for (int x = begin; x < end; ++x) {
      exact.push_back(cubic((x - centre + 0.5) / wide));
      sum += exact.back();
    }
    auto& weights = all[static_cast<std::size_t>(k)];
    weights.begin = begin;
    for (const double value : exact) {
      const double scaled = value / sum * (1 << kBits);
      weights.values.push_back(static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5)));
    }
  }
  return all;
}

// Bicubic, first along rows and then along columns, rounded to 8 bits after each.
inline Picture resize(const Picture& picture, int width, int height) {
  const auto round = [](int64_t sum) {
    return static_cast<uint8_t>(std::clamp<int64_t>(sum >> kBits, 0, 255));
  };
  const Picture* from = &picture;
  Picture across, down;
  if (width != from->width) {
    const auto weights = make_weights(from->width, width);
    across = {width, from->height,
              std::vector<uint8_t>(static_cast<std::size_t>(width) * from->height * 3)};
    for (int y = 0; y < from->height; ++y)
      for (int x = 0; x < width; ++x)
        for (int c = 0; c < 3; ++c) {
          const auto& each = weights[static_cast<std::size_t>(x)];
          int64_t sum = 1 << (kBits - 1);
          for (std::size_t k = 0; k < each.values.size(); ++k)
            sum += static_cast<int64_t>(each.values[k]) *
                   from->rgb[(static_cast<std::size_t>(y) * from->width + each.begin + k) * 3 + c];
          across.rgb[(static_cast<std::size_t>(y) * width + x) * 3 + c] = round(sum);
        }
    from = &across;
  }
  if (height != from->height) {
    const auto weights = make_weights(from->height, height);
    down = {from->width, height,
            std::vector<uint8_t>(static_cast<std::size_t>(from->width) * height * 3)};
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < from->width; ++x)
        for (int c = 0; c < 3; ++c) {
          const auto& each = weights[static_cast<std::size_t>(y)];
          int64_t sum = 1 << (kBits - 1);
          for (std::size_t k = 0; k < each.values.size(); ++k)
            sum += static_cast<int64_t>(each.values[k]) *
                   from->rgb[((each.begin + k) * from->width + x) * 3 + c];
          down.rgb[(static_cast<std::size_t>(y) * from->width + x) * 3 + c] = round(sum);
        }
    from = &down;
  }
  return *from;
}

// Normalized pixels [1, 3, side, side], as the bundle's `preprocess` says.
inline std::vector<float> make_pixels(const Picture& picture, const nlohmann::json& spec) {
  const std::string mode = spec.at("mode");
  if (mode != "pad" && mode != "stretch")
    throw std::runtime_error("this example knows the modes pad and stretch, not " + mode);
  const int side = spec.at("side");
  const bool padded = mode == "pad" && picture.width != picture.height;
  const Picture small = resize(padded ? pad(picture, spec.at("fill")) : picture, side, side);
  const std::vector<float> mean = spec.at("mean"), std = spec.at("std");
  const auto plane = static_cast<std::size_t>(side) * side;
  std::vector<float> pixels(3 * plane);
  for (std::size_t k = 0; k < plane; ++k)
    for (std::size_t c = 0; c < 3; ++c)
      pixels[c * plane + k] =
          (static_cast<float>(small.rgb[k * 3 + c]) * (1.0f / 255.0f) - mean[c]) / std[c];
  return pixels;
}
