// Runs a network with effops operators from C++, without Python: loads the kernel library, a package of AOTInductor and
// photographs that export.py has written, and prints what is on them.
//
//     aotinductor_example FOLDER LIBRARY...     e.g. build/aotinductor effops/libeffops_kernels.so
//
// Exits with 1 where the logits differ from Python's by more than rounding.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kTop = 5;
constexpr int kRuns = 20;

// What torch.save has written.
at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toTensor();
}

std::vector<std::string> read_lines(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

// The operators register themselves as the library is loaded.
void load_operators(const char* library) {
  if (dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

void print_top(const at::Tensor& logits, const std::vector<std::string>& labels) {
  const auto [values, classes] = logits.softmax(1).topk(kTop, 1);
  for (std::int64_t image = 0; image < logits.size(0); ++image) {
    std::printf("image %ld:", static_cast<long>(image));
    for (int place = 0; place < kTop; ++place) {
      std::printf("%s %s %.1f %%", place ? "," : "", labels.at(classes[image][place].item<std::int64_t>()).c_str(),
                  100 * values[image][place].item<double>());
    }
    std::printf("\n");
  }
}

// Of a forward, in milliseconds.
double median_ms(torch::inductor::AOTIModelPackageLoader& model, const at::Tensor& images) {
  std::vector<double> times;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    model.run({images})[0].cpu();  // the copy waits for a GPU
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

int run(const std::string& folder, const std::vector<const char*>& libraries) {
  for (const char* library : libraries) load_operators(library);
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const bool on_gpu = model.get_metadata().at("AOTI_DEVICE_KEY") == "cuda";
  const at::Tensor images = read_tensor(folder + "/images.pt").to(on_gpu ? at::kCUDA : at::kCPU);
  const at::Tensor expected = read_tensor(folder + "/logits.pt");

  const at::Tensor logits = model.run({images})[0].cpu();
  print_top(logits, read_lines(folder + "/labels.txt"));
  const double difference = (logits - expected).abs().max().item<double>();
  const double bound = 1e-4 * expected.abs().max().item<double>();
  std::printf("largest difference of the logits from Python's: %.2g (at most %.2g)\n", difference, bound);
  for (const std::int64_t batch : {std::int64_t{1}, images.size(0)}) {
    std::printf("batch %ld: %.2f ms (median of %d)\n", static_cast<long>(batch),
                median_ms(model, images.narrow(0, 0, batch)), kRuns);
  }
  return difference <= bound ? 0 : 1;  // also for NaN
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s FOLDER LIBRARY...\n", argv[0]);
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    return run(argv[1], {argv + 2, argv + argc});
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
