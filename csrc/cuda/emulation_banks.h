// How often a warp's accesses to shared memory meet in a bank, for tests/cuda/test_banks.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <vector>

namespace sib_fast::emulation {

constexpr int kWarp = 32;

// Reads, writes and asynchronous copies of packs in shared memory while it is on, and how often they meet in a bank: a
// warp's k-th access of a kind is one instruction, and the hardware serves 128 bytes of it at a time, each of the 32
// banks one word. For launches whose lanes all do the same; a lane that skips an access would be paired wrongly.
struct Banks {
  static constexpr int kKinds = 3;                // as Access
  static constexpr int64_t kFields = 2 * kKinds;  // of each kind: transfers of 128 bytes, times they take
  struct Access {
    int64_t word;  // of shared memory
    int words;
  };
  bool on = false;
  std::vector<std::array<std::vector<Access>, kKinds>> of_thread;  // of the block that runs
  std::vector<int64_t> launches;

  void begin_launch(size_t threads) {
    of_thread.assign(threads, {});
    launches.resize(launches.size() + kFields, 0);
  }
  void end_block() {
    int64_t* const counts = launches.data() + launches.size() - kFields;
    for (size_t warp = 0; warp < of_thread.size(); warp += kWarp) {
      const size_t lanes = std::min<size_t>(kWarp, of_thread.size() - warp);
      for (int kind = 0; kind < kKinds; ++kind) {
        size_t most = 0;
        for (size_t i = 0; i < lanes; ++i) most = std::max(most, of_thread[warp + i][kind].size());
        for (size_t k = 0; k < most; ++k) count(warp, lanes, kind, k, counts + 2 * kind);
      }
    }
    for (auto& kinds : of_thread)
      for (auto& accesses : kinds) accesses.clear();
  }

 private:
  void count(size_t warp, size_t lanes, int kind, size_t k, int64_t* counts) const {
    std::array<std::set<int64_t>, 32> words_of_bank;
    int gathered = 0;
    const auto transfer = [&] {
      if (gathered == 0) return;
      size_t times = 0;
      for (auto& words : words_of_bank) times = std::max(times, words.size()), words.clear();
      counts[0] += 1;
      counts[1] += static_cast<int64_t>(times);
      gathered = 0;
    };
    for (size_t i = 0; i < lanes; ++i) {
      const auto& mine = of_thread[warp + i][kind];
      if (k >= mine.size()) continue;
      for (int w = 0; w < mine[k].words; ++w) words_of_bank[(mine[k].word + w) % 32].insert(mine[k].word + w);
      gathered += mine[k].words;
      if (gathered == 32) transfer();
    }
    transfer();
  }
};
inline Banks banks;

}  // namespace sib_fast::emulation
