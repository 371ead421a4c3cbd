// The part of the C interface that only does sums. Included once by each library.
#pragma once
#include "abi.h"

extern "C" {

size_t ep_window_bytes(const ep::Shape* s) { return ep::Layout::make(*s).window_bytes; }
size_t ep_routing_ints(const ep::Shape* s, int tokens, int top_k) {
  return ep::Routing{}.place(*s, tokens, top_k, nullptr);
}
size_t ep_totals_at(const ep::Shape* s, int tokens, int top_k) {
  ep::Routing r{};
  alignas(16) static int32_t origin[4];
  r.place(*s, tokens, top_k, origin);
  return (size_t)(r.totals - origin);
}
}
