// Emulation of the GPU kernels on the host: blocks, and the threads of a stage in a chosen order, run sequentially,
// with race detection in shared memory.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "mel_device.h"
#include "mel_kernels.h"
#include "mel_normalise.h"
#include "voice_kernel.h"

namespace singerembed {
namespace {

constexpr int kBanks = 32;
constexpr int kNobody = -1, kSeveral = -2;

struct Access {
  int word, words;
};

class Watch {
 public:
  Watch(int bytes, int threads) : memory_(bytes), words_(bytes / 4), accesses_(threads) {}

  void begin_stage(const char* name) {
    stage_ = name;
    for (Word& word : words_) word.reader = word.writer = kNobody;
    for (auto& of_thread : accesses_) of_thread.clear();
  }

  // After a barrier of the whole block; one of a warp orders only its own accesses.
  void end_stage() {
    for (Word& word : words_) word.warp = kNobody;
  }

  template <class T>
  T load(int thread, int index) {
    constexpr int n = sizeof(T) / 4;
    for (int i = index * n; i < index * n + n; ++i) {
      Word& word = words_.at(i);
      if (!word.known) fail("reads what nobody wrote", thread, i);
      if (word.writer != kNobody && word.writer != thread) fail("reads what another thread writes", thread, i);
      if (word.warp != kNobody && word.warp != thread / kWarp) fail("reads what another warp has written", thread, i);
      word.reader = word.reader == kNobody || word.reader == thread ? thread : kSeveral;
    }
    accesses_[thread].push_back({index * n, n});
    T value;
    std::memcpy(&value, memory_.data() + index * sizeof(T), sizeof(T));
    return value;
  }

  template <class T>
  void store(int thread, int index, T value) {
    constexpr int n = sizeof(T) / 4;
    for (int i = index * n; i < index * n + n; ++i) {
      Word& word = words_.at(i);
      if (word.writer != kNobody && word.writer != thread) fail("writes what another thread writes", thread, i);
      if (word.reader != kNobody && word.reader != thread) fail("writes what another thread reads", thread, i);
      if (word.warp != kNobody && word.warp != thread / kWarp) fail("writes what another warp has written", thread, i);
      word.writer = thread;
      word.warp = thread / kWarp;
      word.known = true;
    }
    accesses_[thread].push_back({index * n, n});
    std::memcpy(memory_.data() + index * sizeof(T), &value, sizeof(T));
  }

  // Counts the wavefronts of the last stage; the i-th accesses of a warp's lanes are simultaneous.
  void count_wavefronts(EmulatedMel::Traffic& traffic) const {
    for (std::size_t warp = 0; warp < accesses_.size(); warp += kWarp) {
      for (std::size_t i = 0, more = 1; more != 0; ++i) {
        more = 0;
        for (std::size_t first = warp; first < warp + kWarp;) {
          const int words = i < accesses_[first].size() ? accesses_[first][i].words : 1;
          const std::size_t lanes = kWarp / static_cast<std::size_t>(words);  // wider accesses are split
          const std::size_t last = std::min(first + lanes, warp + kWarp);
          more += count_part(first, last, i, traffic);
          first = last;
        }
      }
    }
  }

 private:
  struct Word {
    int writer = kNobody, reader = kNobody;  // in this stage
    int warp = kNobody;                      // that has written it since the last barrier of the block
    bool known = false;
  };

  std::size_t count_part(std::size_t first, std::size_t last, std::size_t i, EmulatedMel::Traffic& traffic) const {
    std::array<std::vector<int>, kBanks> in_bank;
    std::size_t active = 0;
    for (std::size_t thread = first; thread < last; ++thread) {
      if (i >= accesses_[thread].size()) continue;
      ++active;
      const Access access = accesses_[thread][i];
      for (int word = access.word; word < access.word + access.words; ++word) {
        auto& bank = in_bank[static_cast<std::size_t>(word % kBanks)];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    }
    std::size_t passes = 0;
    for (const auto& bank : in_bank) passes = std::max(passes, bank.size());
    traffic.wavefronts += passes;
    traffic.ideal += active != 0;
    return active;
  }

  [[noreturn]] void fail(const char* what, int thread, int word) const {
    throw std::logic_error(std::string("stage ") + stage_ + ": thread " + std::to_string(thread) + " " + what +
                           ", word " + std::to_string(word) + " of shared memory");
  }

  std::vector<unsigned char> memory_;
  std::vector<Word> words_;
  std::vector<std::vector<Access>> accesses_;  // of each thread, in this stage
  const char* stage_ = "";
};

struct WatchedShared {
  Watch& watch;
  int thread;

  template <class T>
  T load(int index) const {
    return watch.load<T>(thread, index);
  }

  template <class T>
  void store(int index, T value) const {
    watch.store(thread, index, value);
  }
};

// Registers of each thread, which outlive a stage. Floats that nobody has written are NaN.
template <class T>
class HostRegisters {
 public:
  explicit HostRegisters(std::size_t threads) : of_threads_(threads) {
    static_assert(std::is_trivially_copyable_v<T>);
    for (T& of_thread : of_threads_) std::memset(static_cast<void*>(&of_thread), 0xff, sizeof(T));
  }
  T& operator[](int thread) { return of_threads_[static_cast<std::size_t>(thread)]; }

 private:
  std::vector<T> of_threads_;
};

using TrafficByStage = std::map<std::string, EmulatedMel::Traffic>;

class HostExec {  // executes one block
 public:
  HostExec(std::vector<int> order, int shared_bytes, TrafficByStage* traffic = nullptr)
      : order_(std::move(order)), watch_(shared_bytes, static_cast<int>(order_.size())), traffic_(traffic) {}

  template <class F>
  void stage(const char* name, F f) const {
    warp_stage(name, f);
    watch_.end_stage();
  }

  template <class F>
  void warp_stage(const char* name, F f) const {
    watch_.begin_stage(name);
    for_threads([&](int thread) { f(thread, WatchedShared{watch_, thread}); });
    if (traffic_ != nullptr) {
      EmulatedMel::Traffic& traffic = (*traffic_)[name];
      traffic.stage = name;
      watch_.count_wavefronts(traffic);
    }
  }

  template <class T>
  HostRegisters<T> registers() const {
    return HostRegisters<T>(order_.size());
  }

  template <class Source, class Value, class Take>
  void shuffle(Source source, Value value, Take take) const {
    std::vector<float> values(order_.size());
    for_threads([&](int thread) { values[static_cast<std::size_t>(thread)] = value(thread); });
    for_threads([&](int thread) {
      const int lane = source(thread);
      if (lane < 0 || lane >= kWarp) throw std::logic_error("a shuffle takes from lane " + std::to_string(lane));
      take(thread, values[static_cast<std::size_t>(thread / kWarp * kWarp + lane)]);
    });
  }

  template <class Begin, class End, class Body>
  void for_warp(Begin begin, End end, Body body) const {
    const int warps = static_cast<int>(order_.size()) / kWarp;
    for (int warp = 0; warp < warps; ++warp) {
      active_warp_ = warp;
      for (int i = begin(warp); i < end(warp); ++i) body(i);
    }
    active_warp_ = kAllWarps;
  }

 private:
  static constexpr int kAllWarps = -1;

  template <class F>
  void for_threads(F f) const {
    for (const int thread : order_) {
      if (active_warp_ == kAllWarps || active_warp_ == thread / kWarp) f(thread);
    }
  }

  std::vector<int> order_;
  mutable Watch watch_;
  mutable int active_warp_ = kAllWarps;
  TrafficByStage* traffic_;
};

std::vector<int> thread_order(int threads, std::uint32_t order) {
  std::vector<int> numbers(static_cast<std::size_t>(threads));
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order));
  return numbers;
}

}  // namespace

struct EmulatedMel::State {
  std::vector<Quad> transform;
  SlicedBasis basis;
  std::uint32_t order;
  TrafficByStage traffic;
};

EmulatedMel::EmulatedMel(const MelOptions& options, std::uint32_t order)
    : DeviceMel(options), state_(new State{make_transform_table(), slice_basis(make_tables(options)), order, {}}) {}

EmulatedMel::~EmulatedMel() = default;

std::vector<EmulatedMel::Traffic> EmulatedMel::traffic() const {
  std::vector<Traffic> stages;
  for (const auto& [name, traffic] : state_->traffic) {
    if (traffic.ideal != 0) stages.push_back(traffic);
  }
  return stages;
}

void EmulatedMel::launch(const LevelJob& job, bool is_int16, int crops, std::uint64_t) {
  const auto order = thread_order(kLevelThreads, state_->order);
  for (int crop = 0; crop < crops; ++crop) {
    const HostExec exec(order, kLevelSharedBytes);
    if (is_int16) {
      level_block<std::int16_t>(job, crop, exec);
    } else {
      level_block<float>(job, crop, exec);
    }
  }
}

void EmulatedMel::launch(MelJob job, int blocks, int crops, std::uint64_t) {
  const auto order = thread_order(kMelThreads, state_->order);
  const SlicedBasis& basis = state_->basis;
  job.tables = {state_->transform.data(), basis.slices.data(), basis.first_slices.data(), basis.first_bins.data(),
                basis.weights.data()};
  for (int crop = 0; crop < crops; ++crop) {
    for (int block = 0; block < blocks; ++block) {
      mel_block(job, block, blocks, crop, HostExec(order, kMelSharedBytes, &state_->traffic));
    }
  }
}

void EmulatedMel::launch(const NormaliseJob& job, DeviceOutput type, int crops, std::uint64_t) {
  const auto order = thread_order(kNormaliseThreads, state_->order);
  for (int crop = 0; crop < crops; ++crop) {
    for (int part = 0; part * kTileFrames < job.n_frames; ++part) {
      for (int group = 0; group * kTileBands < job.n_mels; ++group) {
        const HostExec exec(order, kNormaliseSharedBytes);
        if (type == DeviceOutput::kHalf) {
          normalise_block<std::uint16_t>(job, part, group, crop, exec);
        } else {
          normalise_block<float>(job, part, group, crop, exec);
        }
      }
    }
  }
}

void emulate_mix_voice(const VoiceJob& job, std::uint32_t order) {
  check_voice(job);
  for (int block = 0; block < job.segments(); ++block) {
    voice_block(job, block, HostExec(thread_order(kVoiceThreads, order), kVoiceSharedBytes));
  }
}

void emulate_missing_barrier() {
  HostExec(thread_order(kWarp, 0), kWarp * 4).stage("exchange", [](int thread, auto shared) {
    shared.store(thread, 0.0f);
    if (thread > 0) shared.template load<float>(thread - 1);
  });
}

}  // namespace singerembed
