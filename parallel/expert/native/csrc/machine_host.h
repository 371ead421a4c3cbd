// The machine of a CPU: a warp is one thread, NVLink is shared memory, the rail is the thread of network_host.h.
#pragma once
#include <chrono>
#include <cstring>

#include "failure.h"
#include "network_host.h"
#include "shape.h"

namespace ep {

// What the warps of a rank share.
struct HostRank {
  Shape shape;
  Layout layout;
  int rank;
  char* world;
  uint64_t patience_ns;
  Network network;
  uint64_t counters[NUM_COUNTERS] = {};
  uint64_t failed_values[2] = {};

  char* window(int r) const { return world + (size_t)r * layout.window_bytes; }
};

class HostMachine {
 public:
  static constexpr int WIDTH = 1;
  static constexpr int TICKS = 1;

  class Lanes {
   public:
    explicit Lanes(const HostMachine&) {}
    Lanes(const HostMachine&, const uint64_t* from, int count) { std::memcpy(value_, from, 8 * (size_t)count); }
    uint64_t get(int i) const { return value_[i]; }
    uint64_t get_own(int i) const { return value_[i]; }
    void set(int i, uint64_t v) { value_[i] = v; }
    void put(int i, uint64_t v) { value_[i] = v; }
    void add(int i, uint64_t v) { value_[i] += v; }
    void store(uint64_t* to, int count) const { std::memcpy(to, value_, 8 * (size_t)count); }

   private:
    uint64_t value_[32] = {};
  };

  explicit HostMachine(HostRank& host) : h_(host) {}
  int lane() const { return 0; }
  int rank() const { return h_.rank; }
  int node() const { return h_.rank / h_.shape.locals; }
  int local() const { return h_.rank % h_.shape.locals; }
  char* own(size_t offset) const { return h_.window(h_.rank) + offset; }
  char* peer(int u, size_t offset) const { return h_.window(node() * h_.shape.locals + u) + offset; }

  template <int SITE>
  uint64_t load(size_t offset) const {
    return __atomic_load_n(word_at(own(0), offset), ordered<SITE>() ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED);
  }
  template <int SITE>
  void nvl_add(int u, size_t offset, uint64_t v) const {
    __atomic_fetch_add(word_at(peer(u, 0), offset), v, ordered<SITE>() ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
  }
  template <int SITE>
  void rail_put(int n, size_t target, size_t source, size_t bytes, int c) const {
    h_.network.post<SITE>(c, {Operation::PUT, on_rail(n), target, source, bytes, 0});
  }
  template <int SITE, int SIGNAL, bool STRONG>
  void rail_add(int n, size_t offset, uint64_t v, int c) const {
    const bool strong = STRONG && ordered<SIGNAL>();
    h_.network.post<SITE>(c, {strong ? Operation::STRONG_SIGNAL : Operation::WEAK_SIGNAL, on_rail(n), offset, 0, 0, v});
  }

  template <class To>
  void fan_out(const char* source, size_t bytes, uint32_t mask, To to) const {
    for (; mask != 0; mask &= mask - 1) std::memcpy(to(__builtin_ctz(mask)), source, bytes);
  }
  uint32_t reduce_or(uint32_t v) const { return v; }
  uint32_t ballot(bool v) const { return v; }
  uint64_t broadcast(uint64_t v) const { return v; }
  void sync() const {}
  template <class Load, class Store>
  int prefix(int count, int start, Load load, Store store) const {
    for (int i = 0; i < count; ++i) {
      const int value = load(i);
      store(i, start);
      start += value;
    }
    return start;
  }

  void pause(int spins) const { nap(spins); }
  uint64_t now() const {
    return (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  uint64_t patience() const { return h_.patience_ns; }
  bool stopped() const { return __atomic_load_n(word_at(own(0), h_.layout.abort), __ATOMIC_RELAXED) != 0; }
  // The first failure wins everywhere; its values stay with its rank.
  void fail(const Failure& failure, uint64_t mine, uint64_t theirs) const {
    if (!set_abort(h_.rank, failure)) return;
    h_.failed_values[0] = mine, h_.failed_values[1] = theirs;
    for (int r = 0; r < h_.shape.ranks(); ++r) set_abort(r, failure);
  }
  // Who to name for a wait: the rank that is furthest behind in transfers, if it is behind this one.
  int culprit(int peer) const {
    int last = peer;
    uint64_t least = begun(h_.rank);
    for (int r = 0; r < h_.shape.ranks(); ++r)
      if (begun(r) < least) last = r, least = begun(r);
    return last;
  }
  void begin() const { __atomic_fetch_add(word_at(own(0), h_.layout.begun), 1, __ATOMIC_RELAXED); }
  void count(Counter counter, uint64_t n) const { __atomic_fetch_add(&h_.counters[counter], n, __ATOMIC_RELAXED); }

 private:
  uint64_t begun(int r) const { return __atomic_load_n(word_at(h_.window(r), h_.layout.begun), __ATOMIC_RELAXED); }
  int on_rail(int n) const { return n * h_.shape.locals + local(); }
  bool set_abort(int r, const Failure& failure) const {
    uint64_t none = 0;
    return __atomic_compare_exchange_n(word_at(h_.window(r), h_.layout.abort), &none, failure.pack(), false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  }
  HostRank& h_;
};

}  // namespace ep
