// Python bindings: check arrays, name keywords, release the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "encoder.h"
#include "mel.h"
#include "mel_device.h"
#ifdef SINGEREMBED_CUDA
#include "cuda_raii.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using singerembed::CropState;
using singerembed::DeviceMel;
using singerembed::DeviceOutput;
using singerembed::EmulatedMel;
using singerembed::Encoder;
using singerembed::EncoderOptions;
using singerembed::MelOptions;
using singerembed::MelOutput;
using singerembed::MelPlan;
using singerembed::VoiceJob;

namespace {

#ifdef SINGEREMBED_CUDA
using singerembed::CapturedGraph;
#endif

template <class Sample>
using Crops = nb::ndarray<const Sample, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // [crops, crop_samples]
using Spectrograms = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // [n, n_mels, n_frames]
using Spectrogram = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Interleaved = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // [frames, channels]

template <class T>
nb::ndarray<nb::numpy, T> to_numpy(std::unique_ptr<T[]> values, std::initializer_list<std::size_t> shape) {
  nb::capsule owner(values.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(values.release(), shape, owner);
}

// Uninitialised, because the kernel writes all elements.
template <class T>
std::unique_ptr<T[]> allocate(std::size_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

void check_samples(const MelOptions& options, std::size_t samples) {
  if (samples == static_cast<std::size_t>(options.crop_samples)) return;
  throw nb::value_error(("crops have " + std::to_string(samples) + " samples each; this plan takes " +
                         std::to_string(options.crop_samples))
                            .c_str());
}

template <class Sample>
nb::tuple run(const MelPlan& plan, Crops<Sample> pcm, bool power) {
  const MelOptions& options = plan.options();
  const std::size_t crops = pcm.shape(0);
  check_samples(options, pcm.shape(1));
  auto mel = allocate<float>(crops * options.mel_size());
  auto peak = allocate<float>(crops);
  auto rms = allocate<float>(crops);
  auto state = allocate<std::uint8_t>(crops);
  std::size_t loud = 0;
  {
    nb::gil_scoped_release release;  // nothing in this scope touches a Python object
    const MelOutput output = power ? MelOutput::kPower : MelOutput::kLog;
    for (std::size_t i = 0; i < crops; ++i) {
      const auto level =
          plan.run(pcm.data() + i * pcm.shape(1), output, mel.get() + loud * options.mel_size());
      peak[i] = level.peak;
      rms[i] = level.rms;
      state[i] = static_cast<std::uint8_t>(level.state);
      loud += level.state == CropState::kLoud;
    }
  }
  const auto n_mels = static_cast<std::size_t>(options.n_mels);
  const auto n_frames = static_cast<std::size_t>(options.n_frames());
  return nb::make_tuple(to_numpy(std::move(mel), {loud, n_mels, n_frames}), to_numpy(std::move(peak), {crops}),
                        to_numpy(std::move(rms), {crops}), to_numpy(std::move(state), {crops}));
}

// Log-mel and embedding of one crop after the other, so that its spectrogram stays in the cache.
template <class Sample>
nb::tuple embed(const Encoder& encoder, const MelPlan& plan, Crops<Sample> pcm) {
  const MelOptions& options = plan.options();
  if (options.n_mels != encoder.options().n_mels || options.n_frames() != encoder.options().n_frames) {
    throw nb::value_error("the plan's spectrograms are not of the encoder's size");
  }
  check_samples(options, pcm.shape(1));
  const std::size_t crops = pcm.shape(0), dim = encoder.options().embedding_dim;
  auto embedding = allocate<float>(crops * dim);
  auto peak = allocate<float>(crops);
  auto rms = allocate<float>(crops);
  auto state = allocate<std::uint8_t>(crops);
  std::size_t loud = 0;
  {
    nb::gil_scoped_release release;
    const auto log_mel = [&](std::size_t i, float* mel) {
      const auto level = plan.run(pcm.data() + i * pcm.shape(1), MelOutput::kLog, mel);
      peak[i] = level.peak;
      rms[i] = level.rms;
      state[i] = static_cast<std::uint8_t>(level.state);
      return level.state == CropState::kLoud;
    };
    loud = encoder.embed(crops, log_mel, embedding.get());
  }
  return nb::make_tuple(to_numpy(std::move(embedding), {loud, dim}), to_numpy(std::move(peak), {crops}),
                        to_numpy(std::move(rms), {crops}), to_numpy(std::move(state), {crops}));
}

void check_size(const Encoder& encoder, std::size_t n_mels, std::size_t n_frames) {
  const EncoderOptions& options = encoder.options();
  const auto wanted_mels = static_cast<std::size_t>(options.n_mels);
  const auto wanted_frames = static_cast<std::size_t>(options.n_frames);
  if (n_mels == wanted_mels && n_frames == wanted_frames) return;
  throw nb::value_error(("this encoder takes spectrograms of " + std::to_string(options.n_mels) + " x " +
                         std::to_string(options.n_frames))
                            .c_str());
}

nb::ndarray<nb::numpy, float> encode(const Encoder& encoder, Spectrograms log_mel) {
  check_size(encoder, log_mel.shape(1), log_mel.shape(2));
  const std::size_t n = log_mel.shape(0), size = log_mel.shape(1) * log_mel.shape(2);
  const std::size_t dim = encoder.options().embedding_dim;
  auto embedding = allocate<float>(n * dim);
  {
    nb::gil_scoped_release release;
    const auto copy = [&](std::size_t i, float* mel) {
      std::copy_n(log_mel.data() + i * size, size, mel);
      return true;
    };
    encoder.embed(n, copy, embedding.get());
  }
  return to_numpy(std::move(embedding), {n, dim});
}

// For each bottleneck its output [channels, height, width] and the seconds that it took.
nb::list trace(const Encoder& encoder, Spectrogram log_mel) {
  check_size(encoder, log_mel.shape(0), log_mel.shape(1));
  using Clock = std::chrono::steady_clock;
  nb::list stages;
  auto embedding = allocate<float>(encoder.options().embedding_dim);
  auto start = Clock::now();
  encoder.trace(
      log_mel.data(),
      [&](const singerembed::BottleneckShape& shape, const float* map) {
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        const std::size_t channels = shape.out, pixels = shape.out_pixels();
        auto plain = allocate<float>(channels * pixels);
        for (std::size_t c = 0; c < channels; ++c) {
          const float* block = map + c / singerembed::kBlock * pixels * singerembed::kBlock + c % singerembed::kBlock;
          for (std::size_t p = 0; p < pixels; ++p) plain[c * pixels + p] = block[p * singerembed::kBlock];
        }
        stages.append(nb::make_tuple(
            to_numpy(std::move(plain), {channels, static_cast<std::size_t>(shape.out_height),
                                        static_cast<std::size_t>(shape.out_width)}),
            seconds));
        start = Clock::now();
      },
      embedding.get());
  return stages;
}

nb::tuple mix_down(Interleaved pcm, std::size_t segment) {
  const std::size_t frames = pcm.shape(0), channels = pcm.shape(1);
  if (channels < 1) throw nb::value_error("there are no channels to mix");
  if (segment < 1) throw nb::value_error("a segment has at least one frame");
  std::size_t cancelled = 0;
  auto mono = allocate<float>(frames);
  {
    nb::gil_scoped_release release;
    cancelled = singerembed::mix_down(pcm.data(), frames, static_cast<int>(channels), segment, mono.get());
  }
  return nb::make_tuple(to_numpy(std::move(mono), {frames}), cancelled);
}

// Binds `launch`, which takes a VoiceJob and `last`, with the job's fields as keywords.
template <class Launch>
void def_mix_voice(nb::module_& m, const char* name, const char* last, Launch launch) {
  m.def(
      name,
      [launch](std::uint64_t voice, int channels, int stride, int first, int samples, int crop_samples, int segment,
               std::uint64_t mono, std::uint64_t energies, std::uint64_t how) {
        const auto pointer = [](std::uint64_t address) { return reinterpret_cast<float*>(address); };
        launch(VoiceJob{pointer(voice), channels, stride, first, samples, crop_samples, segment, pointer(mono),
                        pointer(energies)},
               how);
      },
      nb::kw_only(), "voice"_a, "channels"_a, "stride"_a, "first"_a, "samples"_a, "crop_samples"_a, "segment"_a,
      "mono"_a, "energies"_a, nb::arg(last), nb::call_guard<nb::gil_scoped_release>());
}

nb::ndarray<nb::numpy, float> mel_basis(const MelPlan& plan) {
  const auto& tables = plan.tables();
  const std::size_t n_mels = tables.bands.size();
  std::unique_ptr<float[]> basis(new float[n_mels * singerembed::kBins]());
  for (std::size_t m = 0; m < n_mels; ++m) {
    const auto& band = tables.bands[m];
    std::copy_n(&tables.weights[band.first_weight], band.n_bins, &basis[m * singerembed::kBins + band.first_bin]);
  }
  return to_numpy(std::move(basis), {n_mels, static_cast<std::size_t>(singerembed::kBins)});
}

}  // namespace

NB_MODULE(_csrc, m) {
  // A thread that is left behind in a system call (jobs/threads.py) keeps what it uses until the process ends.
  nb::set_leak_warnings(false);
  m.attr("FFT_SIZE") = singerembed::kFftSize;
  m.attr("HOP_SAMPLES") = singerembed::kHopSamples;
  m.attr("LOUD") = static_cast<int>(CropState::kLoud);
  m.attr("SILENT") = static_cast<int>(CropState::kSilent);
  m.attr("INVALID") = static_cast<int>(CropState::kInvalid);

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const char* name : singerembed::available_isas()) names.emplace_back(name);
    return names;
  });
  m.def("available_int8_isas", [] {
    std::vector<std::string> names;
    for (const char* name : singerembed::available_int8_isas()) names.emplace_back(name);
    return names;
  });
  m.def("mix_down", &mix_down, "pcm"_a.noconvert(), "segment"_a);

  nb::class_<MelOptions>(m, "MelOptions")
      .def(
          "__init__",
          [](MelOptions* self, int crop_samples, int n_mels, double mel_sample_rate, double mel_fmin, double mel_fmax,
             float log_offset, float log_divisor, float silence_peak) {
            new (self) MelOptions{crop_samples, n_mels, mel_sample_rate, mel_fmin, mel_fmax, log_offset,
                                  log_divisor, silence_peak};
          },
          nb::kw_only(), "crop_samples"_a, "n_mels"_a, "mel_sample_rate"_a, "mel_fmin"_a, "mel_fmax"_a,
          "log_offset"_a, "log_divisor"_a, "silence_peak"_a);

  nb::class_<MelPlan>(m, "MelPlan")
      .def(
          "__init__",
          [](MelPlan* self, const MelOptions& options, const std::string& isa) {
            new (self) MelPlan(options, isa.c_str());
          },
          "options"_a, nb::kw_only(), "isa"_a = "")
      .def_prop_ro("isa", &MelPlan::isa)
      .def_prop_ro("mel_basis", &mel_basis, nb::rv_policy::automatic)
      .def("run", &run<std::int16_t>, "pcm"_a.noconvert(), nb::kw_only(), "power"_a = false)
      .def("run", &run<float>, "pcm"_a.noconvert(), nb::kw_only(), "power"_a = false);

  nb::class_<Encoder>(m, "Encoder")
      .def(
          "__init__",
          [](Encoder* self, Weights weights, int n_mels, int n_frames, int embedding_dim, bool int8,
             const std::string& isa) {
            new (self) Encoder({n_mels, n_frames, embedding_dim, int8}, weights.data(), weights.shape(0), isa.c_str());
          },
          "weights"_a.noconvert(), nb::kw_only(), "n_mels"_a, "n_frames"_a, "embedding_dim"_a,
          "int8"_a = false, "isa"_a = "")
      .def_prop_ro("isa", &Encoder::isa)
      .def("embed", &embed<std::int16_t>, "plan"_a, "pcm"_a.noconvert())
      .def("embed", &embed<float>, "plan"_a, "pcm"_a.noconvert())
      .def("encode", &encode, "log_mel"_a.noconvert())
      .def("trace", &trace, "log_mel"_a.noconvert());

  nb::class_<DeviceMel>(m, "DeviceMel")
      .def("scratch_bytes", &DeviceMel::scratch_bytes, "crops"_a)
      .def("level", &DeviceMel::level, "pcm"_a, nb::kw_only(), "is_int16"_a, "crops"_a, "levels"_a, "stream"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "mel",
          [](DeviceMel& self, std::uint64_t list, int crops, std::uint64_t scratch, std::uint64_t out,
             std::uint64_t stream, bool half, bool power) {
            self.mel(list, crops, scratch, out, half ? DeviceOutput::kHalf : DeviceOutput::kFloat,
                     power ? MelOutput::kPower : MelOutput::kLog, stream);
          },
          "list"_a, nb::kw_only(), "crops"_a, "scratch"_a, "out"_a, "stream"_a, "half"_a, "power"_a = false,
          nb::call_guard<nb::gil_scoped_release>());

  nb::class_<EmulatedMel, DeviceMel>(m, "EmulatedMel")
      .def(nb::init<const MelOptions&, std::uint32_t>(), "options"_a, nb::kw_only(), "order"_a = 0)
      .def("traffic", [](const EmulatedMel& self) {
        nb::dict stages;
        for (const auto& traffic : self.traffic()) {
          stages[traffic.stage.c_str()] = nb::make_tuple(traffic.wavefronts, traffic.ideal);
        }
        return stages;
      });

  def_mix_voice(m, "emulate_mix_voice", "order", [](const VoiceJob& job, std::uint64_t order) {
    singerembed::emulate_mix_voice(job, static_cast<std::uint32_t>(order));
  });
  m.def("emulate_missing_barrier", &singerembed::emulate_missing_barrier);

#ifdef SINGEREMBED_CUDA
  m.attr("HAS_CUDA") = true;
  def_mix_voice(m, "mix_voice", "stream", singerembed::mix_voice);
  m.def("make_cuda_mel", &singerembed::make_cuda_mel, "options"_a, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<CapturedGraph>(m, "CapturedGraph")
      .def(
          "__init__",
          [](CapturedGraph* self, std::uintptr_t stream) {
            new (self) CapturedGraph(reinterpret_cast<cudaStream_t>(stream));
          },
          "stream"_a)
      .def("finish", &CapturedGraph::finish)
      .def("abandon", &CapturedGraph::abandon)
      .def(
          "launch",
          [](const CapturedGraph& self, std::uintptr_t stream) {
            self.launch(reinterpret_cast<cudaStream_t>(stream));
          },
          "stream"_a, nb::call_guard<nb::gil_scoped_release>());
#else
  m.attr("HAS_CUDA") = false;
#endif
}
