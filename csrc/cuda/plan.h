// Which launches a call makes: one for each format that its layers' coded vectors have, of at most kMaxEntries layers.
//
// A layer of several formats is a chain of launches that add to float32 sums in global memory, in one order: kernels
// then know one format, and mixing costs its own users alone.
#pragma once

#include <algorithm>
#include <bitset>
#include <vector>

#include "kernels.h"
#include "mix.h"

namespace alignvec::cuda {

struct Device {
  int multiprocessors;
  int shared;        // bytes of a multiprocessor
  int block_shared;  // bytes that one block may have
};

struct Plan {
  Format format;
  int tiles, vectors, blocks, threads, shared_bytes;  // tiles of 8 tokens; vectors in a stream at most
  Launch launch;
};

inline Format format_of(const Vector& v) {
  if (v.kind == Kind::kDense) return Format::kPlain;
  if (v.kind == Kind::kLossless)
    return v.bits == 2 ? Format::kLossless2 : v.bits == 4 ? Format::kLossless4 : Format::kLossless8;
  const bool one_plane = v.group_log2 == v.width_log2;
  if (v.bits == 4) return one_plane ? Format::kInt4Group1 : Format::kInt4Group2;
  if (v.bits == 8) return one_plane ? Format::kInt8Group1 : Format::kInt8Group2;
  if (v.groups == 1) return Format::kSign;
  return one_plane ? Format::kSignGroup1 : Format::kSignGroup2;
}

inline std::bitset<kFormats> formats_of(const Entry& layer) {
  std::bitset<kFormats> found;
  for (int i = 0; i < layer.coded + layer.dense; ++i)
    if (layer.vectors[i].kind != Kind::kDense) found.set(static_cast<int>(format_of(layer.vectors[i])));
  if (found.none()) found.set(static_cast<int>(Format::kPlain));
  return found;
}

// Whether some layer takes several launches, and the call a `partial`.
inline bool chains(const std::vector<Entry>& layers) {
  return std::any_of(layers.begin(), layers.end(), [](const Entry& layer) { return formats_of(layer).count() > 1; });
}

// The part of a layer that a launch of `format` does; its first one does the base and the dense vectors too.
inline Entry part_of(const Entry& layer, Format format) {
  const auto found = formats_of(layer);
  const int number = static_cast<int>(format);
  Entry part = layer;
  part.coded = part.dense = 0;
  part.add_partial = (found << (kFormats - number)).any();
  part.keep_partial = (found >> (number + 1)).any();
  part.base = !part.add_partial;
  for (int i = 0; i < layer.coded + layer.dense; ++i)
    if (layer.vectors[i].kind != Kind::kDense && format_of(layer.vectors[i]) == format)
      part.vectors[part.coded++] = layer.vectors[i];
  const auto shape = [](const Vector& v) { return v.width_log2 * 64 + v.group_log2; };
  std::stable_sort(part.vectors, part.vectors + part.coded,
                   [&](const Vector& a, const Vector& b) { return shape(a) < shape(b); });
  for (int i = 0; part.base && i < layer.coded + layer.dense; ++i)
    if (layer.vectors[i].kind == Kind::kDense) part.vectors[part.coded + part.dense++] = layer.vectors[i];
  return part;
}

// Two stages leave room for the most blocks on a multiprocessor, which has been the fastest; more take what memory is
// left. fixed: bytes of a block beside its stages; 1 KiB more is the system's.
inline int stages_for(int blocks, int stage_bytes, int fixed, const Device& device) {
  const int each = (blocks + device.multiprocessors - 1) / device.multiprocessors;
  const auto resident = [&](int stages) {
    const int bytes = fixed + stages * stage_bytes;
    return bytes > device.block_shared ? 0 : std::min(each, device.shared / (bytes + 1024));
  };
  int stages = 2;
  while (stages < kStages && resident(stages + 1) == resident(2)) ++stages;
  return stages;
}

// call: the arguments that the layers share. layers: all vectors of each in coded and dense, in any order; first_column
// set. stages: 0, or how many instead of the plan's choice.
inline std::vector<Plan> plan(const Launch& call, const std::vector<Entry>& layers, const Device& device, int stages) {
  std::vector<Plan> plans;
  const int tiles = call.tokens > 8 ? 2 : 1, rows = 16 * tiles;
  for (int number = 0; number < kFormats; ++number) {
    const auto format = static_cast<Format>(number);
    std::vector<const Entry*> having;
    for (const Entry& layer : layers)
      if (formats_of(layer)[number]) having.push_back(&layer);
    for (size_t first = 0; first < having.size(); first += kMaxEntries) {
      Plan p{format, tiles, kStreamVectors, 0, 32 * kWarps * tiles, 0, call};
      p.launch.entries = static_cast<int>(std::min<size_t>(kMaxEntries, having.size() - first));
      int coded = 0;
      for (int i = 0; i < p.launch.entries; ++i) {
        Entry& entry = p.launch.entry[i] = part_of(*having[first + i], format);
        entry.first_block = p.blocks;
        p.blocks += (entry.out_features + rows - 1) / rows;
        coded = std::max<int>(coded, entry.coded);
      }
      if (coded > kStreamVectors) p.vectors = stream_vectors(format, call.tokens);
      const int words = std::min(coded, p.vectors) * rows * word_pitch(bits_of(format));
      const int fixed = (sizeof(Mix) + 15) / 16 * 16;
      p.launch.stage_bytes = (rows + call.tokens) * kPitch + words;
      p.launch.stages = stages ? stages : stages_for(p.blocks, p.launch.stage_bytes, fixed, device);
      p.shared_bytes = fixed + p.launch.stages * p.launch.stage_bytes;
      plans.push_back(p);
    }
  }
  return plans;
}

}  // namespace alignvec::cuda
