#pragma once
// The launch of conv_wgmma and conv_wgmma_ieee, on the host: the TMA's map of the input, the choice of a plan, the kernels'
// order.

#include "conv_wgmma.cuh"
#include "parts.cuh"

#include <map>
#include <mutex>

namespace fused_kernels::wgmma {

// ---- the kernel's launch ----

template <typename T, Source S, class C>
struct WgmmaLaunch {
  static void run(const CUtensorMap& map, const Tensor& input, const Workspace& workspace, Tensor& output,
                  const ConvWgmmaPlan& plan, const WindowPlan& windows, int shared_bytes, dim3 grid, cudaStream_t stream);
};

#if !LAUNCHES_LIE_ELSEWHERE
template <typename T, Source S, class C>
void WgmmaLaunch<T, S, C>::run(const CUtensorMap& map, const Tensor& input, const Workspace& workspace, Tensor& output,
                               const ConvWgmmaPlan& plan, const WindowPlan& windows, int shared_bytes, dim3 grid,
                               cudaStream_t stream) {
  const auto kernel = conv_wgmma_kernel<T, S, C>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  launch_early(kernel, grid, Roles<S, C::SPLIT>::kThreads, shared_bytes, stream, map,
               static_cast<const Raw<T>*>(input.data_ptr()), reinterpret_cast<const char*>(workspace.packed),
               workspace.constants, static_cast<T*>(output.data_ptr()), workspace.partial, plan, windows);
}
#endif

template <typename T>
constexpr Source kChannelsLast = channels_last_source(sizeof(T));

template <typename T, class... Configs>
auto share_of_launches(List<Configs...>) {
  return share_of(List<WgmmaLaunch<T, kChannelsLast<T>, Configs>..., WgmmaLaunch<T, Source::kPlanes, Configs>...>());
}

// ---- the TMA's map of the input ----

// The driver's function, which the runtime finds: no library to link.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(pointer && found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(pointer);
  }();
  return encoder;
}

// Describes the input to the TMA; tells whether it can be described.
template <typename T>
bool encode_tensor_map(CUtensorMap& map, const Tensor& input, const ConvShape& shape, Source source, const ConvWgmmaPlan& plan) {
  using torch::headeronly::ScalarType;
  const bool planes = source == Source::kPlanes;
  // From the innermost dimension out: channels, columns, rows; or columns, rows, channels. Then images.
  const int order[4] = {planes ? 3 : 1, planes ? 2 : 3, planes ? 1 : 2, 0};
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i] = input.size(order[i]);
    if (i > 0) strides[i - 1] = shape.input_strides[order[i]] * sizeof(T);
  }
  box[3] = 1;
  if (source == Source::kTiles) {
    box[0] = kRowChannels, box[1] = plan.pitch, box[2] = plan.slot_rows;
  } else if (planes) {
    box[0] = plan.line, box[1] = plan.slot_rows, box[2] = kGroup * plan.parts;
  } else {
    box[0] = kRowChannels, box[1] = kGroup * plan.parts, box[2] = 1;
  }
  const auto type = sizeof(T) == 4                            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : input.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_encoder()(&map, type, 4, input.data_ptr(), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              source == Source::kTiles ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                              CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---- launch ----

// Packs the weights, runs the kernel, and where the output channels were split between blocks combines their minima.
template <typename T, Source S, class C>
void launch_conv_wgmma(const ConvWgmmaCandidate& candidate, const ConvShape& shape, const Tensor& input, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Scale& scale, Tensor& output, Winners winners,
                       const Device& device) {
  ConvWgmmaPlan plan = candidate.plan;
  plan.scale_first = scale.first;
  plan.factor = scale.factor;
  const int taps = plan.kernel[0] * plan.kernel[1], steps = taps * plan.chunk / kStepDepth;
  const WeightOrder order{plan.in_channels, {plan.kernel[0], plan.kernel[1]}, {plan.kernel[0], plan.kernel[1]}, 1, 1,
                          plan.chunk,       plan.chunks,                      steps,                            plan.blocks_n};
  const int64_t packed_bytes = static_cast<int64_t>(plan.blocks_n) * plan.chunks * steps * C::kStepBytes;
  const Workspace workspace(input, packed_bytes, plan.blocks_n * C::BLOCK_N * kConstants,
                            plan.splits > 1 ? plan.splits * shape.pixels() : 0);
  plan.out_channels = static_cast<int>(shape.out_channels);
  plan.winners = winners;
  plan.partial_winners = workspace.partial_winners;
  const cudaStream_t stream = current_stream(input);
  pack_weights<T, CoreMatrixOrder<C::kParts>>(order, shape, C::BLOCK_N, weight, bias, scale, workspace, device, stream);

  CUtensorMap map{};
  if (plan.bulk) {
    STD_TORCH_CHECK(encode_tensor_map<T>(map, input, shape, S, plan), "input: conv_wgmma found no map for its strides");
  }
  const dim3 grid(std::min(plan.tiles, std::max(device.multiprocessors / plan.splits, 1)), plan.splits);
  WgmmaLaunch<T, S, C>::run(map, input, workspace, output, plan,
                            WindowPlan(order, shape, scale.first, C::SPLIT, input, workspace, output), candidate.shared_bytes,
                            grid, stream);
  if (plan.splits > 1) combine<T>(workspace, plan.splits, shape.pixels(), output, winners, stream);
}

// Launches the cheapest of these configurations. The plan is remembered by all that it depends on: planning takes as long as a
// small kernel.
// NOTE: static, because otherwise all libraries built from this text, changed or not, would share the variables in it.
template <typename T, Source S, class... Configs>
static void launch_cheapest(List<Configs...> configs, const ConvShape& shape, Way way, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, const Scale& scale, Tensor& output, Winners winners) {
  static std::map<std::string, ConvWgmmaCandidate> plans;
  static std::mutex mutex;
  constexpr size_t kMostPlans = 1024;
  struct Question {
    ConvShape shape;
    int64_t bulk, scale_first;
    Device device;
  };
  static_assert(std::has_unique_object_representations_v<Question>);
  const int index = input.get_device_index();
  const Question question{shape, way.bulk, scale.first,
                          {attribute(cudaDevAttrMultiProcessorCount, index),
                           attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)}};
  const std::string key(reinterpret_cast<const char*>(&question), sizeof question);
  ConvWgmmaCandidate best;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = plans.find(key); found != plans.end()) best = found->second;
  }
  if (best.config < 0) {
    best = plan_conv_wgmma(configs, shape, way, sizeof(T), question.scale_first, question.device);
    STD_TORCH_CHECK(best.config >= 0, "input: expected a shape that conv_wgmma can cut to fit in shared memory");
    const std::lock_guard lock(mutex);
    if (plans.size() >= kMostPlans) plans.clear();
    plans.emplace(key, best);
  }
  int config = 0;
  const auto launch = [&](auto tile) {
    if (config++ != best.config) return;
    launch_conv_wgmma<T, S, decltype(tile)>(best, shape, input, weight, bias, scale, output, winners, question.device);
  };
  (launch(Configs()), ...);
}

template <typename T, class Configs>
static void run_conv_wgmma(Configs configs, const ConvShape& shape, const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias, const Scale& scale, Tensor& output, Winners winners) {
  const Way way = choose_way(shape, sizeof(T), is_aligned(input));
  if (way.source == Source::kPlanes) {
    launch_cheapest<T, Source::kPlanes>(configs, shape, way, input, weight, bias, scale, output, winners);
  } else {
    launch_cheapest<T, kChannelsLast<T>>(configs, shape, way, input, weight, bias, scale, output, winners);
  }
}

// Checks the arguments: these rungs take neither strides nor groups.
inline ConvShape check_plain_conv(const char* rung, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvShape shape = check_conv(input, weight, bias, stride, padding, dilation, groups);
  for (int64_t s : shape.stride) STD_TORCH_CHECK(s == 1, "stride: ", rung, " expected 1, got ", s);
  STD_TORCH_CHECK(groups == 1, "groups: ", rung, " expected 1, got ", groups);
  return shape;
}

}  // namespace fused_kernels::wgmma
