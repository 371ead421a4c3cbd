// Every acquire, release and strong signal of the kernels, by number, so that each can be weakened by a build flag
// (-DEP_WEAKEN=n makes site n relaxed, or a weak signal) and shown to matter.
#pragma once

#ifdef __CUDACC__
#define EP_FN __device__ __forceinline__
#define EP_BOTH __host__ __device__ __forceinline__
#define EP_UNROLL _Pragma("unroll")
#else
#define EP_FN inline
#define EP_BOTH inline
#define EP_UNROLL
#endif

#ifndef EP_WEAKEN
#define EP_WEAKEN 0
#endif

// X(number, name, kind, role that executes it). race_table.py reads this list.
#define EP_SITES(X)                                               \
  X(1, NOTIFY_POST, release, "notify send")                       \
  X(2, NOTIFY_SIGNAL, strong, "notify send")                      \
  X(3, NOTIFY_SELF, release, "notify send")                       \
  X(4, NOTIFY_WAIT, acquire, "notify forward")                    \
  X(5, NOTIFY_FORWARD, release, "notify forward")                 \
  X(6, NOTIFY_RECEIVE, acquire, "notify receive")                 \
  X(7, DISPATCH_SEND_ROOM, acquire, "dispatch IB send")           \
  X(8, DISPATCH_SEND_POST, release, "dispatch IB send")           \
  X(9, DISPATCH_SEND_SIGNAL, strong, "dispatch IB send")          \
  X(10, DISPATCH_SEND_SELF, release, "dispatch IB send")          \
  X(11, DISPATCH_FORWARD_WAIT, acquire, "dispatch forward")       \
  X(12, DISPATCH_FORWARD_ROOM, acquire, "dispatch forward")       \
  X(13, DISPATCH_FORWARD_TAIL, release, "dispatch forward")       \
  X(14, DISPATCH_FORWARD_CREDIT, release, "dispatch forward")     \
  X(15, DISPATCH_FORWARD_SELF_CREDIT, release, "dispatch forward") \
  X(16, DISPATCH_RECEIVE_WAIT, acquire, "dispatch NVLink receive") \
  X(17, DISPATCH_RECEIVE_CREDIT, release, "dispatch NVLink receive") \
  X(18, COMBINE_SEND_ROOM, acquire, "combine NVLink send")        \
  X(19, COMBINE_SEND_TAIL, release, "combine NVLink send")        \
  X(20, COMBINE_FORWARD_WAIT, acquire, "combine forward")         \
  X(21, COMBINE_FORWARD_CREDIT, release, "combine forward")       \
  X(22, COMBINE_FORWARD_ROOM, acquire, "combine forward")         \
  X(23, COMBINE_FORWARD_POST, release, "combine forward")         \
  X(24, COMBINE_FORWARD_SIGNAL, strong, "combine forward")        \
  X(25, COMBINE_FORWARD_SELF, release, "combine forward")         \
  X(26, COMBINE_RECEIVE_WAIT, acquire, "combine IB receive")      \
  X(27, COMBINE_RECEIVE_CREDIT, release, "combine IB receive")    \
  X(28, COMBINE_RECEIVE_SELF_CREDIT, release, "combine IB receive")

namespace ep {

enum Site : int {
  // Orders nothing: a tail signal, whose data were released by their own put; a credit, which follows no put.
  UNORDERED = 0,
#define EP_SITE(number, name, kind, role) name = number,
  EP_SITES(EP_SITE)
#undef EP_SITE
};

// Whether the ordering of a site is in force in this build.
template <int SITE>
EP_BOTH constexpr bool ordered() {
  return SITE != UNORDERED && SITE != EP_WEAKEN;
}

}  // namespace ep
