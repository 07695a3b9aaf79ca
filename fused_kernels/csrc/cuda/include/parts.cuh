#pragma once
// Compiling a source with many kernels as several translation units at once, and linking these to one library.
//
// build.py does so where a source says "Compiled in up to N parts". Part 0 has everything but the kernels and their launches; each
// other part, 1 to FUSED_KERNELS_PARTS, has a share of these. Without the macros, one unit has everything.

#include <array>
#include <cstddef>
#include <utility>

#include "plan.h"

#ifndef FUSED_KERNELS_PART
#define FUSED_KERNELS_PART 0
#define FUSED_KERNELS_PARTS 0
#endif
// Whether the launches are only declared here, and defined in another part.
#define LAUNCHES_LIE_ELSEWHERE (FUSED_KERNELS_PARTS > 0 && FUSED_KERNELS_PART == 0)

namespace fused_kernels {

template <class Launch, size_t NUMBER>
constexpr auto address_in_this_part() -> decltype(&Launch::run) {
  constexpr size_t kPart = FUSED_KERNELS_PART, kParts = FUSED_KERNELS_PARTS;
  if constexpr (kPart > 0 && NUMBER % kParts + 1 == kPart) return &Launch::run;
  return nullptr;
}

// Takes the addresses of this part's share of Launch::run, which makes the compiler instantiate those, and so their kernels.
template <class... Launches, size_t... NUMBERS>
auto share_of(List<Launches...>, std::index_sequence<NUMBERS...>) {
  return std::array{address_in_this_part<Launches, NUMBERS>()...};
}

template <class... Launches>
auto share_of(List<Launches...> launches) {
  return share_of(launches, std::index_sequence_for<Launches...>());
}

}  // namespace fused_kernels
