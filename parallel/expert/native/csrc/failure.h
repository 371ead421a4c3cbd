// Why a kernel ended early: one 64-bit word, set once in the window of every rank.
#pragma once
#include <cstdint>

#include "order.h"

namespace ep {

enum Code : int { TIMEOUT = 1, MISMATCH = 2, BAD_ID = 3, STOPPED = 4, DISORDER = 5 };

enum Role : int {
  LAYOUT, NOTIFY_SENDER, NOTIFY_FORWARDER, NOTIFY_RECEIVER, DISPATCH_SENDER, DISPATCH_FORWARDER, DISPATCH_RECEIVER,
  COMBINE_SENDER, COMBINE_FORWARDER, COMBINE_RECEIVER
};

enum Argument : int { NO_ARGUMENT, TOP_K, ROW_BYTES, FORMAT };

// rank: who failed; peer: whom it waited for or disagrees with.
struct Failure {
  int code, role, channel, rank, peer, argument;

  EP_BOTH uint64_t pack() const {
    return 1ull << 63 | (uint64_t)code << 56 | (uint64_t)role << 48 | (uint64_t)argument << 44 |
           (uint64_t)channel << 32 | (uint64_t)rank << 16 | (uint64_t)peer;
  }
  static Failure unpack(uint64_t w) {
    return {int(w >> 56 & 127), int(w >> 48 & 255), int(w >> 32 & 4095), int(w >> 16 & 65535), int(w & 65535),
            int(w >> 44 & 15)};
  }
};

// Where a role stands, for its waits.
struct Post {
  Role role;
  int channel;
};

}  // namespace ep
