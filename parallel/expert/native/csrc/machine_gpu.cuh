// The machine of a GPU (sm_90): a warp is a warp, NVLink is load and store through NCCL's LSA pointers, the rail is
// NCCL's GIN (NCCL >= 2.30.4). Needs no link to NCCL on the device side. Compiled, never run: no GPU was there.
#pragma once
// GPUs that post to InfiniBand themselves; NCCL's other ways over the network need a stack and more registers.
#ifdef __CUDA_ARCH__  // the headers need one way in the host pass
#define NCCL_GIN_PROXY_ENABLE 0
#define NCCL_GIN_GPI_ENABLE 0
#define NCCL_GIN_EFA_GDA_ENABLE 0
#endif
#include <nccl.h>
#include <nccl_device.h>

#include "failure.h"
#include "shape.h"

namespace ep {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int BULK_BYTES = 16384;  // shared memory of a warp, for bulk copies

struct GpuRank {
  Shape shape;
  Layout layout;
  Progress progress;
  ncclWindow_t window;
  unsigned long long* counters;       // [NUM_COUNTERS]
  unsigned long long* failed_values;  // [2]
  uint64_t patience_ns;
  int contexts;  // GIN contexts: queues
};

class GpuMachine {
 public:
  static constexpr int WIDTH = 32;
  static constexpr int TICKS = 256;  // spins between two looks at the clock

  // The value of peer i is in lane i: no register array that is indexed, so no stack.
  class Lanes {
   public:
    EP_FN explicit Lanes(const GpuMachine&) {}
    EP_FN Lanes(const GpuMachine& d, const uint64_t* from, int count) : value_(d.lane() < count ? from[d.lane()] : 0) {}
    EP_FN uint64_t get(int i) const { return __shfl_sync(ALL_LANES, value_, i); }
    EP_FN uint64_t get_own(int) const { return value_; }
    EP_FN void set(int i, uint64_t v) { if (lane_id() == i) value_ = v; }
    EP_FN void put(int, uint64_t v) { value_ = v; }
    EP_FN void add(int i, uint64_t v) { if (lane_id() == i) value_ += v; }
    EP_FN void store(uint64_t* to, int count) const { if (lane_id() < count) to[lane_id()] = value_; }

   private:
    uint64_t value_ = 0;
  };

  EP_FN GpuMachine(const ncclDevComm& comm, const GpuRank& g, int channel, char* bulk, uint64_t* barrier)
      : g_(g), gin_(comm, channel % g.contexts), rail_(ncclTeamRail(comm)), local_(ncclTeamLsa(comm).rank),
        bulk_(shared_address(bulk)), barrier_(shared_address(barrier)) {
    if (lane() == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
  }
  EP_FN int lane() const { return lane_id(); }
  EP_FN int node() const { return rail_.rank; }
  EP_FN int local() const { return local_; }
  EP_FN int rank() const { return node() * g_.shape.locals + local(); }
  EP_FN char* own(size_t offset) const { return (char*)ncclGetLocalPointer(g_.window, offset); }
  EP_FN char* peer(int u, size_t offset) const { return (char*)ncclGetLsaPointer(g_.window, offset, u); }

  // Lane 0 acquires; the warp barrier hands the order on to the other lanes.
  template <int SITE>
  EP_FN uint64_t load(size_t offset) const {
    unsigned long long v = 0;
    if (lane() == 0) {
      if (ordered<SITE>()) asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(own(offset)) : "memory");
      else asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(own(offset)) : "memory");
    }
    __syncwarp();
    return __shfl_sync(ALL_LANES, v, 0);
  }
  template <int SITE>
  EP_FN void nvl_add(int u, size_t offset, uint64_t v) const {
    __syncwarp();
    if (lane() == 0) {
      if (ordered<SITE>()) asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(peer(u, offset)), "l"(v) : "memory");
      else asm volatile("red.relaxed.sys.global.add.u64 [%0], %1;" ::"l"(peer(u, offset)), "l"(v) : "memory");
    }
    __syncwarp();
  }
  template <int SITE>
  EP_FN void rail_put(int n, size_t target, size_t source, size_t bytes, int) const {
    gin_.put(rail_, n, g_.window, target, g_.window, source, bytes, ncclGin_None{}, ncclGin_None{}, ncclCoopWarp{},
             ncclGin_None{}, cuda::thread_scope_thread, released<SITE>());
  }
  template <int SITE, int SIGNAL, bool STRONG>
  EP_FN void rail_add(int n, size_t offset, uint64_t v, int) const {
    if constexpr (STRONG && ordered<SIGNAL>())
      gin_.signal(rail_, n, ncclGin_StrongVASignalAdd{g_.window, offset, v}, ncclCoopWarp{}, ncclGin_None{},
                  cuda::thread_scope_thread, released<SITE>());
    else
      gin_.signal(rail_, n, ncclGin_WeakVASignalAdd{g_.window, offset, v}, ncclCoopWarp{}, ncclGin_None{},
                  cuda::thread_scope_thread, released<SITE>());
  }

  // One bulk read into shared memory, one bulk write to each destination; no data pass through registers. Bulk copies
  // belong to the async proxy: a fence before the read, as its data were acquired by a load, and one after the writes,
  // as they are released by a store or put.
  template <class To>
  EP_FN void fan_out(const char* source, size_t bytes, uint32_t mask, To to) {
    if (mask == 0) return;
    __syncwarp();
    for (size_t at = 0; at < bytes; at += BULK_BYTES) {
      const uint32_t part = bytes - at < BULK_BYTES ? (uint32_t)(bytes - at) : BULK_BYTES;
      if (lane() == 0) {
        asm volatile("fence.proxy.async;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_), "r"(part) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(bulk_),
                     "l"(source + at), "r"(part), "r"(barrier_) : "memory");
      }
      await_bulk();
      for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        char* target = to(__ffs((int)rest) - 1) + at;
        if (lane() == 0)
          asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(bulk_), "r"(part) : "memory");
      }
      if (lane() == 0) {
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      }
      __syncwarp();
    }
    if (lane() == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncwarp();
  }

  EP_FN uint32_t reduce_or(uint32_t v) const { return __reduce_or_sync(ALL_LANES, v); }
  EP_FN uint32_t ballot(bool v) const { return __ballot_sync(ALL_LANES, v); }
  EP_FN uint64_t broadcast(uint64_t v) const { return __shfl_sync(ALL_LANES, v, 0); }
  EP_FN void sync() const { __syncwarp(); }
  template <class Load, class Store>
  EP_FN int prefix(int count, int start, Load load, Store store) const {
    for (int base = 0; base < count; base += 32) {
      const int i = base + lane(), value = i < count ? load(i) : 0;
      int sum = value;
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane() >= step) sum += left;
      }
      if (i < count) store(i, start + sum - value);
      start += __shfl_sync(ALL_LANES, sum, 31);
    }
    return start;
  }

  EP_FN void pause(int spins) const { if (spins > 64) __nanosleep(64); }
  EP_FN uint64_t now() const {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return broadcast(t);
  }
  EP_FN uint64_t patience() const { return g_.patience_ns; }
  EP_FN int culprit(int peer) const { return peer; }  // who is behind is not known across nodes
  // Passes a failure on: other nodes tell the GPU of their index, which tells its node.
  EP_FN bool stopped() const {
    uint64_t word = 0;
    if (lane() == 0) word = relaxed(g_.layout.abort) | relaxed(g_.layout.rail_abort);
    word = broadcast(word);
    if (word != 0 && lane() == 0) tell_node(word);
    return word != 0;
  }
  EP_FN void fail(const Failure& failure, uint64_t mine, uint64_t theirs) const {
    const uint64_t word = failure.pack();
    if (atomicCAS_system((unsigned long long*)own(g_.layout.abort), 0ull, (unsigned long long)word) != 0) return;
    g_.failed_values[0] = mine, g_.failed_values[1] = theirs;
    tell_node(word);
    for (int n = 0; n < g_.shape.nodes; ++n)
      if (n != node()) gin_.putValue(rail_, n, g_.window, g_.layout.rail_abort, word);
  }
  EP_FN void count(Counter counter, uint64_t n) const { if (lane() == 0) atomicAdd(g_.counters + counter, (unsigned long long)n); }

 private:
  EP_FN static int lane_id() { return threadIdx.x & 31; }
  EP_FN static uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
  template <int SITE>
  EP_FN static cuda::thread_scope released() { return ordered<SITE>() ? cuda::thread_scope_system : cuda::thread_scope_thread; }
  EP_FN void await_bulk() {
    uint32_t done = 0;
    while (!done)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done) : "r"(barrier_), "r"(phase_) : "memory");
    phase_ ^= 1;
    __syncwarp();
  }
  EP_FN uint64_t relaxed(size_t offset) const {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(own(offset)) : "memory");
    return v;
  }
  EP_FN void tell_node(uint64_t word) const {
    for (int u = 0; u < g_.shape.locals; ++u)
      atomicCAS_system((unsigned long long*)peer(u, g_.layout.abort), 0ull, (unsigned long long)word);
  }

  const GpuRank& g_;
  ncclGin gin_;
  ncclTeam rail_;
  int local_;
  uint32_t bulk_, barrier_, phase_ = 0;
};

}  // namespace ep
