// Scores a bundle's golden rows without Python: reads BUNDLE/model.pt2 and BUNDLE/golden.safetensors, prints one logit
// a line, and ends with 1 where one is further from what Python wrote than the bundle's bound allows.
//
//     g++ -std=c++20 -O1 score.cpp -o score $(python cflags.py)
//     ./score BUNDLE

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>

namespace {

// A safetensors file: eight bytes with the header's length, a header in JSON, the numbers. Names of golden rows hold no
// character that JSON would escape, so that a regular expression reads the header.
std::map<std::string, at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (content.size() < 8) throw std::runtime_error(path + " is missing or damaged");
  std::uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  const std::string header = content.substr(8, length);
  const std::map<std::string, at::ScalarType> types = {
      {"F32", at::kFloat}, {"F64", at::kDouble}, {"I64", at::kLong}};
  const std::regex entry(
      R"re("(\w+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\})re");
  std::map<std::string, at::Tensor> tensors;
  for (std::sregex_iterator found(header.begin(), header.end(), entry), end; found != end; ++found) {
    std::vector<std::int64_t> shape;
    const std::string sizes = (*found)[3];
    const std::regex number(R"(\d+)");
    for (std::sregex_iterator one(sizes.begin(), sizes.end(), number), last; one != last; ++one)
      shape.push_back(std::stoll(one->str()));
    at::Tensor tensor = at::empty(shape, types.at((*found)[2]));
    std::memcpy(tensor.data_ptr(), content.data() + 8 + length + std::stoull((*found)[4]), tensor.nbytes());
    tensors[(*found)[1]] = tensor;
  }
  return tensors;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: score BUNDLE\n");
    return 2;
  }
  try {
    const std::string bundle = arguments[1];
    auto rows = read_tensors(bundle + "/golden.safetensors");
    torch::inductor::AOTIModelPackageLoader model(bundle + "/model.pt2");
    // the places of golden rows are those of the adapters that were compiled in; other rows take theirs from a table
    // domain -> place, 0 for an unknown domain
    const at::Tensor logits = model.run({rows["dense"], rows["ids"], rows["lengths"], rows["places"]})[0];
    for (std::int64_t row = 0; row < logits.numel(); ++row) std::printf("%.9g\n", logits[row].item<float>());
    const at::Tensor wanted = rows["logits"];
    const double off = ((logits - wanted).abs() / wanted.abs().clamp_min(1)).max().item<double>();
    return off <= 1e-5 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
